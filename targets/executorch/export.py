# SPDX-License-Identifier: Apache-2.0
"""Writes a .pte: one program with prefill, score and decode, its linears delegated to XNNPACK or its blocks ours."""

from pathlib import Path
from typing import Literal

from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan.capabilities import Activations, get_capabilities
from mossquant.progress import Progress
from mossquant.targets.executorch.kernels import export as own_kernels
from mossquant.targets.executorch.lower import CHUNK, lower
from mossquant.targets.executorch.metadata import Metadata
from mossquant.targets.executorch.open import open_to_run
from mossquant.targets.executorch.packages import check_packages
from mossquant.targets.executorch.read_back import check_linears
from mossquant.targets.executorch.record import PROGRAM, program_record
from mossquant.targets.metadata import activations_of, common_metadata
from mossquant.targets.native.export import Isa
from mossquant.targets.taken import Taken, changed_inputs
from mossquant.targets.target import Exported, Prepared

Kernels = Literal["stock", "mossquant"]
"""What computes a program: XNNPACK and ExecuTorch's own kernels, or libmoss."""

_LAYER_BYTES, _LINEAR_BYTES = 1 << 17, 1 << 13
"""Nodes and values of three methods and their delegates, of a layer and of each of its linears."""
_LOWERING_BYTES, _WEIGHT_BYTES = 10**9, 8
"""PyTorch's graphs with all that hangs on them; and codes, one a byte, in the copies that passes make."""


def prepare(
    weights: Weights,
    *,
    activations: Activations | None,
    progress: Progress | None,
    kernels: Kernels = "stock",
    isa: Isa = "host",
) -> Prepared:
    """Prepare to lower weights; what writes the program also reads it back and runs it.

    Raises:
        InputError: packages are missing, or fp32 activations are asked for with quantized weights; with kernels of
            ours, there is no compiler for them.
    """
    check_packages()
    if kernels == "mossquant":
        return own_kernels.prepare(weights, activations=activations, progress=progress, isa=isa)
    asked = activations if weights.origin.recipe is not None else None
    taken = Taken(weights, get_capabilities("executorch"), asked)
    specs = list(weights.specs.values())

    def write(folder: Path) -> Exported:
        said = {"activations": activations_of(taken), "max_chunk": CHUNK}
        metadata = Metadata.model_validate(common_metadata(weights) | said)
        lower(taken, specs, metadata.model_dump(), folder / PROGRAM, progress)
        try:
            opened = open_to_run(folder / PROGRAM)
            check_linears(opened.file, taken, specs)
        except InputError as error:  # a fault of the lowering, not of the user
            raise RuntimeError(f"what was lowered cannot be used: {error}") from error
        record = program_record(opened)
        changed = changed_inputs(weights, taken) if activations is None else ()
        return Exported(record, tuple(f"{PROGRAM}: {note}" for note in changed))

    return Prepared(write, _disk_bytes(taken, specs), _memory_bytes(specs))


def _disk_bytes(weights: Weights, specs: list[TensorSpec]) -> int:
    """Room that the program takes, at most: codes as they are, what is decoded or kept in fp32, the table once more."""
    tied = weights.config.tie_word_embeddings
    total = _LAYER_BYTES * (2 + len({spec.layer for spec in specs}))
    for spec in specs:
        number_format, table, linear = weights.format(spec.name), Use.TABLE in spec.use, spec.site is not None
        own = 4 * spec.count
        if number_format is not None and (table or linear):
            own = number_format.payload_bytes(*spec.matrix_shape)
        total += own + (_LINEAR_BYTES if linear else 0)
        if table:  # scales for look-ups are fp32; and the head's own copy
            rows, columns = spec.matrix_shape
            scales = 0 if number_format is None else 2 * number_format.groups(columns) * rows
            total += scales + (own if tied else 0)
    return total


def _memory_bytes(specs: list[TensorSpec]) -> int:
    """Memory that lowering takes, beside the interpreter with its imports: graphs, and weights some times over."""
    return _LOWERING_BYTES + _WEIGHT_BYTES * sum(spec.count for spec in specs)
