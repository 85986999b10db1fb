# SPDX-License-Identifier: Apache-2.0
"""Writes a .moss: a header, then one tensor at a time, packed for a family of processors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mossquant.checkpoint.weights import Weights
from mossquant.formats.dtypes import dtype_name
from mossquant.kernels import _native
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import Activations, get_capabilities
from mossquant.progress import Progress
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.metadata import activations_of, common_metadata
from mossquant.targets.native.header import header_bytes
from mossquant.targets.native.metadata import (
    METADATA_KEY,
    RUNTIME_KEY,
    RUNTIME_MINIMUM,
    Layout,
    Metadata,
    runtime_metadata,
)
from mossquant.targets.native.stored import kept_bytes, packed_blocks, stored_bytes
from mossquant.targets.taken import Taken, changed_inputs
from mossquant.targets.target import Exported, Prepared

PROGRAM = "model.moss"
Isa = Literal["host", "x86", "arm", "rows"]
"""What matrices are packed for: the machine that exports, another, or none in particular."""

_REST_BYTES = 1 << 24
"""Memory for blocks of rows, and first uses."""


def prepare(
    weights: Weights, *, activations: Activations | None, progress: Progress | None, isa: Isa = "host"
) -> Prepared:
    """Lay out the file; what writes it, takes one tensor after the other.

    Raises:
        InputError: fp32 activations are asked for with quantized weights.
    """
    asked = activations if weights.origin.recipe is not None else None
    taken = Taken(weights, get_capabilities("native"), asked)
    layout = host_layout() if isa == "host" else isa
    formats = {name: _storage(weights, name) for name in weights.specs}
    sizes = {name: stored_bytes(spec, formats[name], layout) for name, spec in weights.specs.items()}
    states = {spec.name: weights.state(spec.name) for spec in state_specs(weights.config)}
    rounded = {name: state for name, state in states.items() if state != "fp32"}
    said = {
        "activations": activations_of(taken),
        "layout": layout,
        "weight_bytes": sum(sizes.values()),
        "state_format": ", ".join(sorted(set(states.values()))),
    }
    metadata = Metadata.model_validate(common_metadata(weights) | said)
    to_runtime = json.dumps(runtime_metadata(weights.config, layout, formats, rounded), separators=(",", ":"))
    header = header_bytes({METADATA_KEY: metadata.model_dump_json(), RUNTIME_KEY: to_runtime}, sizes)

    def write(folder: Path) -> Exported:
        done, total = 0, metadata.weight_bytes
        with (folder / PROGRAM).open("wb") as file:
            file.write(header)
            for name, spec in weights.specs.items():
                written = sum(file.write(part.data) for part in _data(weights, spec, layout))
                file.write(bytes(sizes[name] - written))
                done += sizes[name]
                if progress is not None:
                    progress(name, done, total)
        record = ProgramRecord(
            file=PROGRAM,
            methods={"forward": _ports(weights.config)},
            runtime=Runtime(name="libmoss", minimum=RUNTIME_MINIMUM, domains={}, operators={}),
            model=metadata.model_dump(),
        )
        changed = changed_inputs(weights, taken) if activations is None else ()
        return Exported(record, tuple(f"{PROGRAM}: {note}" for note in changed))

    return Prepared(write, len(header) + metadata.weight_bytes, _memory_bytes(weights, len(header)))


def host_layout() -> Layout:
    """The layout that the best kernel of this machine wants."""
    layout: Layout = _native.linear_layout("int8_block", "int4_g32", None)  # type: ignore[assignment]
    return layout


def _storage(weights: Weights, name: str) -> str:
    """The number format of a tensor, or the type in which it is kept."""
    number_format = weights.format(name)
    return dtype_name(weights.kept(name).dtype) if number_format is None else number_format.name


def _data(weights: Weights, spec: TensorSpec, layout: Layout) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, without the padding behind it, a block of rows at a time."""
    number_format = weights.format(spec.name)
    if number_format is None:
        yield kept_bytes(weights.kept(spec.name))
        return
    yield from packed_blocks(weights.quantized(spec.name), spec, layout)


def _memory_bytes(weights: Weights, header: int) -> int:
    """Anonymous memory that writing takes: the codes of the largest tensor, one a byte, and a step on the way there."""
    largest = 0
    for name, spec in weights.specs.items():
        number_format, (rows, columns) = weights.format(name), spec.matrix_shape
        own = 4 * spec.count if number_format is None else 2 * rows * number_format.padded_columns(columns)
        largest = max(largest, own)
    return largest + 4 * header + _REST_BYTES


def _ports(config: MossNetConfig) -> MethodPorts:
    """Tokens and the arrays of a state, in the order of `moss_state_read`; logits of all positions or the last."""
    states = [Port(name=spec.name, type="float", shape=["B", *spec.shape]) for spec in state_specs(config)]
    tokens = Port(name="tokens", type="int64", shape=["B", "T"])
    logits = Port(name="logits", type="float", shape=["B", "positions", config.vocab_size])
    after = [Port(name=f"{state.name}.out", type="float", shape=state.shape) for state in states]
    return MethodPorts(inputs=[tokens, *states], outputs=[logits, *after])
