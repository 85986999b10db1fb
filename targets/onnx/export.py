# SPDX-License-Identifier: Apache-2.0
"""Writes an .onnx artifact: the lowered graph, weights inside or (above 200 MB) beside it, tokenizer and manifest."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from mossquant.capabilities import check
from mossquant.checkpoint import Checkpoint
from mossquant.outputs import file_sha256
from mossquant.quantized import QuantizedCheckpoint
from mossquant.release import release
from mossquant.space import check_space
from mossquant.targets.artifact import TOKENIZER, Port, Runtime, write_artifact_manifest
from mossquant.targets.onnx.graph import OPSETS
from mossquant.targets.onnx.lower import lower
from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM, DataFile, Metadata
from mossquant.targets.onnx.save import disk_bytes, external, memory_bytes, save_data, save_program
from mossquant.targets.onnx.source import CheckpointSource, QuantizedSource, Source
from mossquant.targets.registry import Activations, Exported, Progress, exporter

__all__ = ["PROGRAM", "export_onnx"]

PROGRAM = "model.onnx"

# Manifest and metadata name files, operators and, in the manifest, every input and output.
_MANIFEST_BYTES = 1 << 16
_STANDARD = "ai.onnx"
_FORMATS = {"int8": "int8_block", "fp32": "fp32"}


@exporter("onnx")
def export_onnx(
    source: Checkpoint | QuantizedCheckpoint,
    folder: Path,
    *,
    activations: Activations | None,
    progress: Progress | None,
) -> Exported:
    """Write program, tokenizer and manifest into `folder`.

    Raises:
        InputError: the quantized checkpoint holds something that the target cannot; too little disk or memory.
    """
    if isinstance(source, Checkpoint):
        tensors: Source = CheckpointSource(source)
    else:
        # Formats that are overridden need not be any that the target can take.
        check(source.plan if activations is None else replace(source.plan, activations=()), ["onnx"])
        tensors = QuantizedSource(source, _FORMATS[activations] if activations else None)
    model, weight_bytes = lower(tensors, list(source.specs.values()), progress)
    tokenizer = source.tokenizer_path
    beside = _MANIFEST_BYTES + (tokenizer.stat().st_size if tokenizer is not None else 0)
    check_space(
        folder,
        disk_bytes=disk_bytes(model, weight_bytes) + beside,
        memory_bytes=memory_bytes(model, weight_bytes),
    )
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
    data = save_data(model, folder) if external(weight_bytes) else None
    metadata = _metadata(source, tensors, weight_bytes, tokenizer, data)
    model.metadata_props.update(metadata.to_props())
    save_program(model, folder / PROGRAM)
    manifest = write_artifact_manifest(
        folder,
        target="onnx",
        release=metadata.release,
        program=PROGRAM,
        inputs=[_port(value) for value in model.graph.inputs],
        outputs=[_port(value) for value in model.graph.outputs],
        runtime=Runtime(
            name="onnxruntime",
            minimum=RUNTIME_MINIMUM,
            domains={domain or _STANDARD: opset for domain, opset in OPSETS.items()},
            operators=_operators(model),
        ),
        model=metadata.model_dump(),
    )
    return Exported(manifest, _notes(source, tensors))


def _metadata(
    source: Checkpoint | QuantizedCheckpoint,
    tensors: Source,
    weight_bytes: int,
    tokenizer: Path | None,
    data: DataFile | None,
) -> Metadata:
    quantized = isinstance(source, QuantizedCheckpoint)
    return Metadata(
        release=release(),
        config=source.config.to_json(torch_dtype=source.torch_dtype),
        weights=source.recipe_name if isinstance(source, QuantizedCheckpoint) else source.torch_dtype,
        activations=_activations(source, tensors),
        parameters=source.parameters,
        payload_bytes=source.payload_bytes if isinstance(source, QuantizedCheckpoint) else source.stored_bytes,
        weight_bytes=weight_bytes,
        source_kind="quantized checkpoint" if quantized else "checkpoint",
        source_files=source.hashes(),
        tokenizer_sha256=None if tokenizer is None else file_sha256(tokenizer),
        seen_text=list(source.seen_text()),
        data=data,
    )


def _linears(source: Checkpoint | QuantizedCheckpoint, tensors: Source) -> list[str]:
    return [name for name, spec in source.specs.items() if spec.site is not None and tensors.format(name) is not None]


def _activations(source: Checkpoint | QuantizedCheckpoint, tensors: Source) -> Literal["fp32", "int8_block", "mixed"]:
    kinds = {tensors.int8_activations(name) for name in _linears(source, tensors)}
    return "mixed" if len(kinds) > 1 else "int8_block" if True in kinds else "fp32"


def _notes(source: Checkpoint | QuantizedCheckpoint, tensors: Source) -> tuple[str, ...]:
    slow = [
        name
        for name in _linears(source, tensors)
        if not tensors.int8_activations(name) and (found := tensors.format(name)) is not None and found.bits == 8
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
