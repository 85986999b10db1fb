# SPDX-License-Identifier: Apache-2.0
"""Reading back: it passes on what was exported, and names the first difference of what was changed."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hardening.seals import reseal
from lowered import MODELS, Lowered, Workshop
from lowered import read_back as verify
from onnx import helper, numpy_helper
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.targets.export import export
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx.file_graph import expanded
from mossquant.targets.onnx.metadata import initializers


@pytest.mark.parametrize(
    ("model", "recipe"),
    [*((model, "int4") for model in MODELS), ("wide", "int8"), ("experts", None), ("wide", "g128"), ("wide", "mixed")],
)
def test_what_was_exported_passes(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe)
    report = verify(lowered.checkpoint, lowered.artifact)
    assert report.differences == ()
    assert report.passed
    assert report.summary == "all equal"
    assert report.weights == lowered.runner.info.parameters


def test_names_with_a_range() -> None:
    names = [f"layers.0.mixer.experts.{e}.x_proj" for e in (1, 2, 3)]
    assert list(expanded("layers.0.mixer.experts.1-3.x_proj")) == names
    assert list(expanded("layers.0.mlp.experts.1.w1")) == ["layers.0.mlp.experts.1.w1"]


def _changed(lowered: Lowered, folder: Path, name: str, place: int, bits: int) -> Path:
    """A copy of the program with some bits of one byte of an initializer flipped."""
    proto = onnx.load(lowered.program)
    tensor = next(tensor for tensor in initializers(proto.graph) if tensor.name == name)
    data = bytearray(tensor.raw_data)
    data[place] ^= bits
    tensor.raw_data = bytes(data)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


CHANGES = [
    # Embedding codes are [80, 2, 16] bytes: byte 32 · 7 + 3 holds columns 6 and 7 of row 7.
    ("backbone.embeddings.weight", 32 * 7 + 3, 0x10, r"backbone\.embeddings\.weight: code \[7, 7\] is"),
    ("backbone.embeddings.weight.scale", 1, 0x01, r"backbone\.embeddings\.weight: scale \[0, 0\] is"),
    ("layers.0.mlp.experts.3.w1", 5, 0x01, r"backbone\.layers\.0\.mlp\.experts\.3\.w1\.weight: code \[0, 10\] is"),
    # x_proj of an expert is 44 rows of 96 columns, which are 48 bytes; this is row 2 of expert 1.
    ("layers.0.mixer.experts.0-3.x_proj", 48 * 46, 0x01, r"experts\.1\.x_proj\.weight: code \[2, 0\] is"),
    # dt_proj of four experts is 96 rows of four blocks of 16 bytes; this is row 1, expert 2.
    ("layers.0.mixer.experts.0-3.dt_proj", 64 + 33, 0x10, r"experts\.2\.dt_proj\.weight: code \[1, 3\] is"),
    # Byte 7 of a block holds columns 14 and 15, and dt_rank is 12: even padding is looked at.
    ("layers.0.mixer.experts.0-3.dt_proj", 7, 0x01, r"experts\.0\.dt_proj\.weight: code \[0, 14\] is"),
    ("layers.0.mixer.experts.0-3.dt_proj.scale", 8 + 6, 0x02, r"experts\.3\.dt_proj\.weight: scale \[1, 0\] is"),
    ("layers.1.mixer.experts.0-3.dt_proj.bias", 96 * 2 + 5, 0x04, r"experts\.2\.dt_proj\.bias: code \[0, 5\] is"),
    ("layers.1.mixer.A_log", 16 + 2, 0x01, r"layers\.1\.mixer\.A_log: code \[1, 2\] is"),
    ("layers.0.mixer.router", 4, 0x01, r"layers\.0\.mixer\.router\.weight: value \[0, 1\] is"),
]


@pytest.mark.parametrize(("name", "place", "bits", "message"), CHANGES)
def test_a_changed_bit_is_named(
    workshop: Workshop, tmp_path: Path, name: str, place: int, bits: int, message: str
) -> None:
    lowered = workshop("wide", "int4")
    report = verify(lowered.checkpoint, _changed(lowered, tmp_path, name, place, bits))
    assert not report.passed
    # The tied table is read by two nodes.
    assert len(report.differences) == (2 if name.startswith("backbone.embeddings") else 1)
    assert re.search(message, report.differences[0])


@pytest.mark.parametrize("scales", [False, True])
def test_every_initializer_matters(workshop: Workshop, tmp_path: Path, scales: bool) -> None:
    """Whatever byte of whatever weight is changed, reading back sees it."""
    lowered, random = workshop("wide", "int4"), np.random.default_rng(0)
    proto, names = lowered.proto(), set[str]()
    for tensor in initializers(proto.graph):
        if "." in tensor.name and tensor.name.endswith(".scale") == scales:
            data, low = bytearray(tensor.raw_data), tensor.name.endswith(".scale")
            # Of a scale the lower half, so that it stays a positive number.
            place = int(random.integers(len(data)))
            data[place & ~1 if low else place] ^= 0x10
            tensor.raw_data = bytes(data)
            names.add(tensor.name.removesuffix(".scale"))
    assert len(names) > 30
    onnx.save(proto, tmp_path / "model.onnx")
    different = {line.split(":")[0] for line in verify(lowered.checkpoint, tmp_path / "model.onnx").differences}
    different |= {name.removeprefix("backbone.").removesuffix(".weight") for name in different}
    assert {name for name in names if different.isdisjoint(expanded(name))} == set()


def test_a_changed_byte_of_external_weights(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    checkpoint = workshop.checkpoint("mamba48")
    artifact = export(checkpoint, tmp_path / "external")
    assert verify(checkpoint, artifact.folder).passed
    data = artifact.folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx\.data is not the file that model\.onnx was written with"):
        verify(checkpoint, artifact.folder)
    reseal(artifact.folder)
    (artifact.folder / "manifest.json").unlink()  # it repeats what the program says of its weights
    assert "value [0, 0] is" in verify(checkpoint, artifact.folder).summary


def test_a_program_is_held_against_the_manifest_beside_it(workshop: Workshop, tmp_path: Path) -> None:
    """Also where what was changed is no weight."""
    lowered = workshop("experts", "int4")
    folder = Path(shutil.copytree(lowered.artifact, tmp_path / "artifact"))
    proto = lowered.proto()
    proto.doc_string = "another"
    onnx.save(proto, folder / "model.onnx")
    with pytest.raises(InputError, match=r"is not what its manifest\.json says: model\.onnx has another SHA-256"):
        verify(lowered.checkpoint, folder)
    (folder / "manifest.json").unlink()
    assert verify(lowered.checkpoint, folder).passed


def test_what_is_wired_wrongly(workshop: Workshop, tmp_path: Path) -> None:
    """The right codes at the wrong node: w1 and w3 of an expert have one shape."""
    lowered = workshop("experts", "int4")
    proto = lowered.proto()
    branches = [a.g for node in proto.graph.node if node.op_type == "If" for a in node.attribute if len(a.g.node) > 1]
    nodes = {node.name: node for node in branches[0].node}
    w1, w3 = (nodes[f"layers.0.mlp.experts.0.{which}"] for which in ("w1", "w3"))
    w1.input[1], w3.input[1] = w3.input[1], w1.input[1]
    onnx.save(proto, tmp_path / "model.onnx")
    report = verify(lowered.checkpoint, tmp_path / "model.onnx")
    assert [line.split(":")[0] for line in report.differences] == [
        "backbone.layers.0.mlp.experts.0.w1.weight",
        "backbone.layers.0.mlp.experts.0.w3.weight",
    ]


def test_what_is_left_over(workshop: Workshop, tmp_path: Path) -> None:
    lowered = workshop("experts", "int4")
    proto = lowered.proto()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(100, np.float32), "extra.weight"))
    prop = proto.metadata_props[0]
    values = json.loads(prop.value)
    prop.value = json.dumps(values | {"weight_bytes": values["weight_bytes"] + 400})
    onnx.save(proto, tmp_path / "model.onnx")
    report = verify(lowered.checkpoint, tmp_path / "model.onnx")
    assert report.differences == ("extra.weight is in the file and belongs to no tensor",)


@pytest.mark.parametrize("recipe", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_more_experts_than_a_graph_has_small_constants_for(tmp_path: Path, recipe: str) -> None:
    config = replace(SMALL, num_mlp_experts=17, num_ssm_experts=17, num_hidden_layers=1)
    checkpoint = write_model(tmp_path / "model", random_model(config, dtype=torch.float32), dtype=torch.bfloat16)
    quantize(checkpoint, tmp_path / "quantized", recipe=recipe)
    report = verify(tmp_path / "quantized", export(tmp_path / "quantized", tmp_path / "out").folder)
    assert report.differences == ()


def test_what_is_missing(workshop: Workshop, tmp_path: Path) -> None:
    lowered = workshop("experts", "int4")
    proto = lowered.proto()
    for node in proto.graph.node:
        if node.name == "layers.1.mixer.out_proj":
            node.name = "something"
    onnx.save(proto, tmp_path / "model.onnx")
    report = verify(lowered.checkpoint, tmp_path / "model.onnx")
    assert report.differences[0] == "backbone.layers.1.mixer.out_proj.weight: is not in the file"


def test_an_artifact_of_another_recipe(workshop: Workshop) -> None:
    report = verify(workshop.checkpoint("wide", "int4"), workshop("wide", "int8").artifact)
    assert "has 8-bit codes in blocks of 32, the checkpoint has int4_g32 (and " in report.summary
    assert report.to_json()["passed"] is False


def test_values_that_a_stranger_makes_large_are_not_made(workshop: Workshop, tmp_path: Path) -> None:
    """A chain of doublings, or a very long one, between a weight and its node: the tensor is not found."""
    lowered = workshop("experts", "int4")
    for kind, count in (("Concat", 40), ("Identity", 3000)):
        proto = lowered.proto()
        node = next(node for node in proto.graph.node if node.input[0] == "layers.0.mixer.D")
        names = [node.input[0], *(f"long{index}" for index in range(count))]
        for before, after in pairwise(names):
            inputs, axis = ([before, before], {"axis": 0}) if kind == "Concat" else ([before], {})
            proto.graph.node.append(helper.make_node(kind, inputs, [after], **axis))
        node.input[0] = names[-1]
        onnx.save(proto, tmp_path / "model.onnx")
        report = verify(lowered.checkpoint, tmp_path / "model.onnx")
        assert [line.split(":")[0] for line in report.differences] == ["backbone.layers.0.mixer.D"]


def test_weights_from_a_file_of_another(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    checkpoint = workshop.checkpoint("mamba48")
    artifact = export(checkpoint, tmp_path / "external")
    proto = onnx.load(artifact.program("onnx"), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
    onnx.save(proto, artifact.program("onnx"))
    shutil.copy(artifact.folder / "model.onnx.data", tmp_path / "secret")
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"does not lie where it says"):
        verify(checkpoint, artifact.folder)
