# SPDX-License-Identifier: Apache-2.0
"""Runs a .pte once, in the child process of `mossquant.targets.trial`.

ExecuTorch checks the outer flatbuffer only, not offsets of planned memory, indices of values or the delegates' graphs.
The runtime is loaded with this module, so that limits on a program's memory count from there.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from mossquant.targets.executorch.kernels.library import load_operators
from mossquant.targets.executorch.packages import load_method, load_program, load_runtime

_FEW = 3

load_runtime()


def run(path: Path, methods: Sequence[str], *, own_kernels: bool = False) -> None:
    """Run every method, on few tokens and on as many as it takes, from the table's first row to its last, and on zeros.

    Raises:
        RuntimeError: the runtime refuses the program.
        ValueError: it gives arrays of other shapes than it should, or values that are not finite.
    """
    if own_kernels:
        load_operators()
    program = load_program(path)
    for name in methods:
        method = load_method(program, name)
        meta = method.method_meta()
        (_, longest), *shapes = (meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs()))
        vocabulary = meta.output_tensor_meta(0).sizes()[-1]
        for length in sorted({min(_FEW, longest), longest}):
            tokens = torch.linspace(vocabulary - 1, 0, length, dtype=torch.float64).long()[None]
            logits, *states = method([tokens, *(torch.zeros(tuple(shape)) for shape in shapes)])
            expected = [(1, length if name == "score" else 1), *map(tuple, shapes)]
            shapes_given = [tuple(logits.shape[:2]), *(tuple(state.shape) for state in states)]
            if shapes_given != expected:
                raise ValueError(f"{name} gives arrays of other shapes than it should")
            if not all(bool(torch.isfinite(array).all()) for array in (logits, *states)):
                raise ValueError(f"{name} gives values that are not finite")
