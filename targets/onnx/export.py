# SPDX-License-Identifier: Apache-2.0
"""Writes an .onnx: the lowered graph, weights inside or (above 200 MB) beside it."""

from pathlib import Path

import onnx
import onnx_ir as ir

from mossquant.checkpoint.weights import Weights
from mossquant.plan.capabilities import Activations, get_capabilities
from mossquant.progress import Progress
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.metadata import activations_of, common_metadata
from mossquant.targets.onnx.graph import OPSETS
from mossquant.targets.onnx.initializers import SESSION, Scales
from mossquant.targets.onnx.lower import lower
from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM, Metadata
from mossquant.targets.onnx.save import disk_bytes, external, memory_bytes, save_data, save_program
from mossquant.targets.taken import Taken, changed_inputs
from mossquant.targets.target import Exported, Prepared

PROGRAM = "model.onnx"

_METADATA_BYTES = 1 << 16
_STANDARD = "ai.onnx"


def prepare(
    weights: Weights, *, activations: Activations | None, progress: Progress | None, scales: Scales = "folded"
) -> Prepared:
    """Lower weights to a graph; what writes it, writes weights beside it where they are large."""
    taken = Taken(weights, get_capabilities("onnx"), activations)
    model, weight_bytes = lower(taken, list(weights.specs.values()), progress, scales)

    def write(folder: Path) -> Exported:
        data = save_data(model, folder) if external(weight_bytes) else None
        said = {"activations": activations_of(taken), "weight_bytes": weight_bytes, "data": data}
        metadata = Metadata.model_validate(common_metadata(weights) | said)
        model.metadata_props.update(metadata.to_props())
        save_program(model, folder / PROGRAM)
        ports = MethodPorts(
            inputs=[_port(value) for value in model.graph.inputs],
            outputs=[_port(value) for value in model.graph.outputs],
        )
        runtime = Runtime(
            name="onnxruntime",
            minimum=RUNTIME_MINIMUM,
            domains={domain or _STANDARD: opset for domain, opset in OPSETS.items()},
            operators=_operators(model),
            session=SESSION[scales],
        )
        record = ProgramRecord(file=PROGRAM, methods={"run": ports}, runtime=runtime, model=metadata.model_dump())
        changed = changed_inputs(weights, taken) if activations is None else ()
        return Exported(record, tuple(f"{PROGRAM}: {note}" for note in (*changed, *_notes(taken, scales))))

    # The metadata, which lies in the program, names every file of the source.
    return Prepared(write, disk_bytes(model, weight_bytes) + _METADATA_BYTES, memory_bytes(model, weight_bytes))


def _notes(weights: Weights, scales: Scales) -> tuple[str, ...]:
    if scales == "initializers" and not any(map(weights.format, weights.specs)):
        return ("nothing is quantized, so that --scales changes nothing",)
    slow = [
        name
        for name, spec in weights.specs.items()
        if spec.site is not None
        and (number_format := weights.format(name)) is not None
        and number_format.bits == 8
        and weights.activation(spec.site) == "fp32"
    ]
    if not slow:
        return ()
    return (
        f"{len(slow)} matrices have int8 weights and fp32 activations: onnxruntime decodes them at every step, "
        "65 to 140 times slower than with int8 activations",
    )


def _port(value: ir.Value) -> Port:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return Port(name=value.name, type=onnx.TensorProto.DataType.Name(value.dtype.value).lower(), shape=shape)


def _operators(model: ir.Model) -> dict[str, list[str]]:
    operators: dict[str, set[str]] = {}
    for graph in model.graphs():
        for node in graph:
            operators.setdefault(node.domain or _STANDARD, set()).add(node.op_type)
    return {domain: sorted(names) for domain, names in sorted(operators.items())}
