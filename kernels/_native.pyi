# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels on NumPy arrays: contiguous, of the types that are named, outputs given by the caller.

Shapes and formulas are in the headers: `scan/scan.h`, `conv/conv.h`, `rms_norm/rms_norm.h`, `quantize/quantize.h`,
`linear/linear.h`, `linear/layout.h`. Where no type is named all arrays are float32, or all float64. bf16 scales are
given as their bits, uint16. A wrong shape, type or layout raises ValueError. `threads` is the most threads to use, the
calling one included; `kernel` None is the best kernel this machine can run.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

CHUNK: int  # steps between two checkpoints of the scan

def cpu_flags() -> list[str]: ...
def kernel_names(op: str, numbers: str, flags: Sequence[str]) -> list[str]: ...
def selected(op: str, numbers: str, flags: Sequence[str]) -> str: ...
def read_bandwidth(array: _Array, *, threads: int, passes: int) -> float: ...  # 10⁹ bytes a second, of uint8
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
def rms_norm(x: _Array, weight: _Array, eps: float, y: _Array, *, kernel: str | None) -> None:
    """x, y [M, D], weight [D]; y may be x."""

def quantize_int8_block(
    x: _Array, codes: _Array, scales: _Array, sums: _Array, *, block: int, kernel: str | None
) -> None:
    """x float32 [M, K] → codes int8 [M, C], scales float32 [M, C / block], sums int32 [M, C / block].

    C is K padded to whole blocks.
    """

def packed_bytes(layout: str, weight_format: str, outputs: int, columns: int) -> int:
    """Bytes of a packed matrix."""

def pack(layout: str, weight_format: str, codes: _Array, scales: _Array, packed: _Array) -> None:
    """Codes int8 [N, K], scales float32 [N, 1] or bf16 [N, blocks] → packed uint8 [packed_bytes]."""

def unpack(layout: str, weight_format: str, packed: _Array, codes: _Array, scales: _Array) -> None:
    """The inverse of `pack`."""

def packed_row(layout: str, weight_format: str, packed: _Array, outputs: int, row: int, values: _Array) -> None:
    """One row of a packed matrix of so many outputs as its codes mean it: values float32 [K]."""

def linear_layout(lhs: str, weight_format: str, kernel: str | None) -> str:
    """The layout in which the linear kernel for inputs `lhs` ("f32", "int8_block") wants its weights."""

def linear_f32(
    weight_format: str,
    x: _Array,
    packed: _Array,
    bias: _Array | None,
    y: _Array,
    *,
    threads: int,
    kernel: str | None,
) -> None:
    """x float32 [M, K], weights packed in the kernel's layout, bias float32 [N] → y float32 [M, N]."""

def linear_int8_block(
    weight_format: str,
    x_codes: _Array,
    x_scales: _Array,
    x_sums: _Array,
    packed: _Array,
    bias: _Array | None,
    y: _Array,
    *,
    threads: int,
    kernel: str | None,
) -> None:
    """The same on an input as `quantize_int8_block` leaves it, in the blocks of the weight format."""

def quantized_linear(
    weight_format: str, x: _Array, packed: _Array, bias: _Array | None, y: _Array, *, threads: int
) -> None:
    """`quantize_int8_block` of x float32 [M, K], then `linear_int8_block`, by the best kernels."""
