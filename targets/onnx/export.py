# SPDX-License-Identifier: Apache-2.0
"""Writes an .onnx: the lowered graph, weights inside or (above 200 MB) beside it."""

from pathlib import Path

import onnx
import onnx_ir as ir

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.plan.capabilities import Activations
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.metadata import activations_of, changed_inputs, common_metadata
from mossquant.targets.onnx.graph import OPSETS
from mossquant.targets.onnx.lower import lower
from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM, Metadata
from mossquant.targets.onnx.save import disk_bytes, external, memory_bytes, save_data, save_program
from mossquant.targets.registry import Exported, Prepared, Progress, exporter
from mossquant.targets.source import Source, source_of

__all__ = ["PROGRAM", "export_onnx"]

PROGRAM = "model.onnx"

_METADATA_BYTES = 1 << 16
_STANDARD = "ai.onnx"


@exporter("onnx")
def export_onnx(
    source: Checkpoint | QuantizedCheckpoint, *, activations: Activations | None, progress: Progress | None
) -> Prepared:
    """Lower a checkpoint to a graph; what writes it, writes weights beside it where they are large."""
    tensors = source_of(source, "onnx", activations)
    model, weight_bytes = lower(tensors, list(source.specs.values()), progress)

    def write(folder: Path) -> Exported:
        data = save_data(model, folder) if external(weight_bytes) else None
        linears = [name for name, spec in source.specs.items() if spec.site is not None]
        said = {"activations": activations_of(tensors, linears), "weight_bytes": weight_bytes, "data": data}
        metadata = Metadata.model_validate(common_metadata(source) | said)
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
        )
        record = ProgramRecord(file=PROGRAM, methods={"run": ports}, runtime=runtime, model=metadata.model_dump())
        changed = changed_inputs(source, tensors, linears) if activations is None else ()
        notes = [*changed, *_notes(tensors, linears)]
        return Exported(record, tuple(f"{PROGRAM}: {note}" for note in notes))

    # The metadata, which lies in the program, names every file of the source.
    return Prepared(write, disk_bytes(model, weight_bytes) + _METADATA_BYTES, memory_bytes(model, weight_bytes))


def _notes(tensors: Source, linears: list[str]) -> tuple[str, ...]:
    slow = [
        name
        for name in linears
        if tensors.activations(name) == "fp32" and (found := tensors.format(name)) is not None and found.bits == 8
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
    found: dict[str, set[str]] = {}
    for graph in model.graphs():
        for node in graph:
            found.setdefault(node.domain or _STANDARD, set()).add(node.op_type)
    return {domain: sorted(names) for domain, names in sorted(found.items())}
