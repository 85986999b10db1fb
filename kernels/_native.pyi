# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels on NumPy arrays: contiguous, float32 or float64, all of one dtype, outputs given by the caller.

Shapes and formulas are in `scan/scan.h` and `conv/conv.h`. A wrong shape, dtype or layout raises ValueError. `threads`
is the most threads to use, the calling one included; `kernel` None is the best kernel this machine can run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

CHUNK: int  # steps between two checkpoints of the scan

def cpu_flags() -> list[str]: ...
def kernel_names(op: str, dtype: str, flags: Sequence[str]) -> list[str]: ...
def selected(op: str, dtype: str, flags: Sequence[str]) -> str: ...
def scan_forward(
    x: _Array,
    dt: _Array,
    A: _Array,
    Bm: _Array,
    Cm: _Array,
    D: _Array,
    h0: _Array | None,
    y: _Array,
    hT: _Array,
    checkpoints: _Array | None,
    *,
    threads: int,
    kernel: str | None,
) -> None: ...
def scan_backward(
    x: _Array,
    dt: _Array,
    A: _Array,
    Bm: _Array,
    Cm: _Array,
    D: _Array,
    checkpoints: _Array,
    dy: _Array,
    dhT: _Array | None,
    dx: _Array,
    ddt: _Array,
    dA: _Array,
    dBm: _Array,
    dCm: _Array,
    dD: _Array,
    dh0: _Array,
    *,
    threads: int,
    kernel: str | None,
) -> None: ...
def conv_forward(
    x: _Array,
    weight: _Array,
    bias: _Array,
    window: _Array | None,
    y: _Array,
    new_window: _Array,
    *,
    threads: int,
    kernel: str | None,
) -> None: ...
def conv_backward(
    x: _Array,
    weight: _Array,
    bias: _Array,
    window: _Array | None,
    dy: _Array,
    dnew_window: _Array | None,
    dx: _Array,
    dweight: _Array,
    dbias: _Array,
    dwindow: _Array,
    *,
    threads: int,
    kernel: str | None,
) -> None: ...
