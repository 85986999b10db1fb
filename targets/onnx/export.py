# SPDX-License-Identifier: Apache-2.0
"""Writes an .onnx: the lowered graph, weights inside or (above 200 MB) beside it."""

from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from mossquant.capabilities import Activations, check, get_target
from mossquant.checkpoint import Checkpoint
from mossquant.quantized import QuantizedCheckpoint
from mossquant.space import check_space
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.metadata import activations_of, changed_inputs, common_metadata
from mossquant.targets.onnx.graph import OPSETS
from mossquant.targets.onnx.lower import lower
from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM, Metadata
from mossquant.targets.onnx.save import disk_bytes, external, memory_bytes, save_data, save_program
from mossquant.targets.registry import Exported, Progress, Writer, exporter
from mossquant.targets.source import CheckpointSource, QuantizedSource, Source

__all__ = ["PROGRAM", "export_onnx"]

PROGRAM = "model.onnx"

# Manifest and metadata name files, operators and, in the manifest, every input and output.
_MANIFEST_BYTES = 1 << 16
_STANDARD = "ai.onnx"


@exporter("onnx")
def export_onnx(
    source: Checkpoint | QuantizedCheckpoint,
    destination: Path,
    *,
    activations: Activations | None,
    progress: Progress | None,
) -> Writer:
    """Check that the target can hold the checkpoint; the writer writes the program, and weights beside it.

    Raises:
        InputError: the quantized checkpoint holds something that the target cannot; too little disk or memory.
    """
    if isinstance(source, Checkpoint):
        tensors: Source = CheckpointSource(source)
    else:
        # Formats that are overridden need not be any that the target can take.
        check(source.plan if activations is None else replace(source.plan, activations=()), ["onnx"])
        tensors = QuantizedSource(source, get_target("onnx"), activations)
    model, weight_bytes = lower(tensors, list(source.specs.values()), progress)
    check_space(
        destination,
        disk_bytes=disk_bytes(model, weight_bytes) + _MANIFEST_BYTES,
        memory_bytes=memory_bytes(model, weight_bytes),
    )

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

    return write


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
