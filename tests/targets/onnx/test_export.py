# SPDX-License-Identifier: Apache-2.0
"""What an export writes: the same bytes each time, everything that the manifest promises, or nothing at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lowered import MODELS, Workshop
from small import random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.model.config import PRESETS
from mossquant.targets.artifact import Artifact
from mossquant.targets.export import export
from mossquant.targets.metadata import parsed
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx.metadata import Metadata, read_program
from mossquant.targets.onnx.open import open_program


@pytest.mark.parametrize("recipe", [None, "int4"])
@pytest.mark.parametrize("above", [0, 10**9])
def test_the_same_bytes_each_time(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str | None, above: int
) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", above)
    checkpoint = workshop.checkpoint("wide", recipe)
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    for name, source in (("one", checkpoint), ("two", moved)):
        export(source, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert ("model.onnx.data" in files) == (above == 0)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_external_weights_begin_on_pages(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    artifact = export(workshop.checkpoint("mamba48"), tmp_path / "external")
    opened = open_program(artifact.program("onnx"))
    places = [{e.key: e.value for e in tensor.external_data} for tensor in opened.proto.graph.initializer]
    offsets = [int(place["offset"]) for place in places if place]
    assert offsets
    assert all(offset % 4096 == 0 for offset in offsets)
    assert opened.metadata.data is not None
    assert opened.metadata.data.bytes == (artifact.folder / "model.onnx.data").stat().st_size
    assert opened.bytes == artifact.bytes


def test_metadata(workshop: Workshop) -> None:
    lowered = workshop("wide", "int4")
    source, metadata = QuantizedCheckpoint.open(lowered.checkpoint), read_program(lowered.program).metadata
    assert (metadata.version, metadata.target, metadata.weights) == (1, "onnx", "int4-uniform")
    assert (metadata.activations, metadata.state_format) == ("int8_block", "fp32")
    with pytest.raises(InputError, match=r"metadata cannot be read \(state_format: "):
        parsed(Metadata, metadata.model_dump_json().replace('"state_format":"fp32"', '"state_format":"fp16"'), Path())
    assert metadata.config == source.config.to_json(torch_dtype="bfloat16")
    assert metadata.source_files == source.origin.files
    assert metadata.source_kind == "quantized checkpoint"
    assert metadata.payload_bytes == source.origin.payload_bytes
    assert metadata.parameters == source.origin.parameters
    assert metadata.tokenizer_sha256 is None
    assert open_program(lowered.program).config == MODELS["wide"]


def test_texts_that_were_seen_are_named(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(workshop.checkpoint("wide"), tmp_path / "model"))
    (checkpoint / "training.json").write_text(json.dumps({"version": 1, "text": [{"sha256": "ab" * 32}]}))
    (checkpoint / "tokenizer.json").write_text("{}")
    quantize(checkpoint, tmp_path / "quantized", recipe="int4-uniform")
    artifact = export(tmp_path / "quantized", tmp_path / "artifact")
    metadata = read_program(artifact.program("onnx")).metadata
    assert metadata.seen_text == ["ab" * 32]
    assert metadata.tokenizer_sha256 == file_sha256(artifact.folder / "tokenizer.json")
    assert artifact.bytes == artifact.program("onnx").stat().st_size


def test_weights_take_the_bytes_of_the_checkpoint(workshop: Workshop) -> None:
    """At 4 bits to the byte; at one scale a row, rows are padded to blocks of 32."""
    for model in MODELS:
        metadata = read_program(workshop(model, "int4").program).metadata
        assert metadata.weight_bytes == metadata.payload_bytes
        assert read_program(workshop(model).program).metadata.weight_bytes == metadata.parameters * 2


def test_manifest(workshop: Workshop) -> None:
    lowered = workshop("wide", "int8")
    artifact = Artifact.open(lowered.artifact)
    record = artifact.manifest.programs["onnx"]
    ports = record.methods["run"]
    assert artifact.program("onnx") == lowered.program
    assert set(artifact.files) == {"model.onnx"}
    assert artifact.files["model.onnx"].sha256 == file_sha256(lowered.program)
    assert record.model == read_program(lowered.program).metadata.model_dump()
    graph = lowered.proto().graph
    assert [port.name for port in ports.inputs] == [port.name for port in graph.input]
    assert [port.name for port in ports.outputs] == [port.name for port in graph.output]
    assert ports.inputs[0].model_dump() == {"name": "tokens", "type": "int64", "shape": ["B", "T"]}
    assert record.runtime.domains == {"ai.onnx": 21, "com.microsoft": 1}
    assert record.runtime.minimum == "1.23.2"
    assert {"Scan", "If", "ScatterND"} <= set(record.runtime.operators["ai.onnx"])
    assert {"MatMulNBits", "GatherBlockQuantized"} <= set(record.runtime.operators["com.microsoft"])


def test_slow_combinations_are_said(workshop: Workshop, tmp_path: Path) -> None:
    assert export(workshop.checkpoint("wide", "int8"), tmp_path / "a").notes == ()
    assert export(workshop.checkpoint("wide", "int4"), tmp_path / "b", activations="fp32").notes == ()
    (note,) = export(workshop.checkpoint("wide", "int8"), tmp_path / "c", activations="fp32").notes
    assert "65 to 140 times slower" in note


def test_progress_reaches_the_end(workshop: Workshop, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    artifact = export(workshop.checkpoint("wide", "int4"), tmp_path / "a", progress=lambda *now: seen.append(now))
    total = read_program(artifact.program("onnx")).metadata.weight_bytes
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_bad_input_is_refused_before_any_work(workshop: Workshop, tmp_path: Path) -> None:
    full = workshop.checkpoint("wide")
    cases = [
        (full, {"target": "tflite"}, "unknown target 'tflite'; known targets: onnx"),
        (full, {"activations": "int8"}, "is not quantized, and int8 activations meet quantized weights only"),
        (
            workshop("wide", "int4").program,
            {},
            "is of kind 'onnx', but export needs: checkpoint or quantized checkpoint",
        ),
        (tmp_path / "nothing", {}, "does not exist"),
    ]
    for model, options, message in cases:
        with pytest.raises(InputError, match=message):
            export(model, tmp_path / "artifact", **options)
        assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_target(workshop: Workshop, tmp_path: Path) -> None:
    """Inputs in a format that onnxruntime lacks are rounded in its own, which is said."""
    recipe = tmp_path / "rows.yaml"
    recipe.write_text(
        "version: 1\nname: rows\ntargets: [torch]\nweights:\n"
        '  - {role: "*norm*", keep: fp32, why: few}\n  - {role: "*.router", keep: fp32, why: few}\n'
        '  - {role: "*", format: int8}\n'
        'activations:\n  - {role: "*", format: int8_row_asym}\nstate:\n  - {role: "*", format: fp32}\n'
    )
    quantize(workshop.checkpoint("wide"), tmp_path / "rows", recipe=recipe)
    artifact = export(tmp_path / "rows", tmp_path / "artifact")
    assert artifact.notes == ("model.onnx: inputs are int8_block in place of the planned int8_row_asym",)
    assert read_program(tmp_path / "artifact/model.onnx").metadata.activations == "int8_block"


@pytest.mark.slow
def test_the_graph_of_tiny_is_small(tmp_path: Path) -> None:
    """The preset that ships: nodes, names and metadata are a few per cent of the weights."""
    checkpoint = write_model(tmp_path / "model", random_model(PRESETS["tiny"], dtype=torch.float32))
    quantize(checkpoint, tmp_path / "int4", recipe="int4-uniform")
    artifact = export(tmp_path / "int4", tmp_path / "artifact")
    assert artifact.bytes <= 1.03 * QuantizedCheckpoint.open(tmp_path / "int4").origin.payload_bytes
