# SPDX-License-Identifier: Apache-2.0
"""Writes a .pte with kernels of ours: matrices are packed as in a .moss, and nothing is delegated."""

import math
from pathlib import Path

import numpy as np

from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.plan.capabilities import OWN_KERNELS, Activations
from mossquant.progress import Progress
from mossquant.targets.executorch.kernels.library import check_compiler, compiled
from mossquant.targets.executorch.kernels.lower import begins, lower
from mossquant.targets.executorch.metadata import Metadata
from mossquant.targets.executorch.open import open_program, open_to_run
from mossquant.targets.executorch.record import PROGRAM, program_record
from mossquant.targets.metadata import activations_of, common_metadata
from mossquant.targets.native.blocks.calls import Matrix, Small, calls
from mossquant.targets.native.blocks.constants import form
from mossquant.targets.native.export import Isa, host_layout
from mossquant.targets.native.metadata import Layout
from mossquant.targets.taken import Taken, changed_inputs
from mossquant.targets.target import Exported, Prepared

CAPABILITIES = OWN_KERNELS["executorch"]

_PROGRAM_BYTES, _CONSTANT_BYTES = 1 << 18, 1 << 11
"""What a program says about itself; and of each constant, alignment, and its values and nodes in three methods."""
_LOWERING_BYTES, _COPIES = 10**9, 4
"""PyTorch with ExecuTorch's compiler; and constants in the copies that it makes of them."""


def prepare(
    weights: Weights, *, activations: Activations | None, progress: Progress | None, isa: Isa = "host"
) -> Prepared:
    """Prepare to lower weights; what writes the program also opens it, and runs it where this machine can.

    Raises:
        InputError: fp32 activations are asked for with quantized weights; there is no compiler for the operators.
    """
    asked = activations if weights.origin.recipe is not None else None
    taken = Taken(weights, CAPABILITIES, asked)
    layout = host_layout() if isa == "host" else isa
    runs_here = layout == host_layout()
    if runs_here:
        check_compiler()
    formats = {name: "float32" if (own := weights.format(name)) is None else own.name for name in weights.specs}
    chunk = CAPABILITIES.limits.max_chunk or 1

    def write(folder: Path) -> Exported:
        if runs_here:
            begins(progress, "compiling the operators, once")
            compiled()
        said = {"activations": activations_of(taken), "max_chunk": chunk, "layout": layout}
        metadata = Metadata.model_validate(common_metadata(weights) | said)
        lower(taken, formats, layout, chunk, metadata.model_dump(), folder / PROGRAM, progress)
        try:
            opened = (open_to_run if runs_here else open_program)(folder / PROGRAM)
        except InputError as error:  # a fault of the lowering, not of the user
            raise RuntimeError(f"what was lowered cannot be used: {error}") from error
        changed = changed_inputs(weights, taken) if activations is None else ()
        return Exported(program_record(opened), tuple(f"{PROGRAM}: {note}" for note in changed))

    constants = {one for call in calls(weights.config, last=True) for one in call.held}
    size = _PROGRAM_BYTES + sum(_CONSTANT_BYTES + _bytes(one, formats[one.name], layout) for one in constants)
    return Prepared(write, size, _LOWERING_BYTES + _COPIES * size)


def _bytes(constant: Matrix | Small, storage: str, layout: Layout) -> int:
    kind, shape = form(constant, storage, layout)
    return math.prod(shape) * np.dtype(kind).itemsize
