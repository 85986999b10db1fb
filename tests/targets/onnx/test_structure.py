# SPDX-License-Identifier: Apache-2.0
"""Only a graph that we would have written ourselves is opened: every change of it is named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from lowered import MODELS, Workshop
from onnx import TensorProto, helper

from mossquant.errors import InputError
from mossquant.release import release
from mossquant.targets.export import export
from mossquant.targets.onnx import OnnxRunner, structure
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx.file_graph import expanding
from mossquant.targets.onnx.metadata import initializers
from mossquant.targets.onnx.open import open_program
from mossquant.targets.onnx.structure import check_weights

Change = Callable[[onnx.ModelProto], object]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", [None, "int4", "int8", "g128"])
def test_what_was_exported_is_opened(workshop: Workshop, model: str, recipe: str | None) -> None:
    check_weights(open_program(workshop(model, recipe).program))


def test_names_of_ranges_without_end(workshop: Workshop, tmp_path: Path) -> None:
    """They are neither expanded nor believed; a thousand of them took seconds."""
    lowered = workshop("experts", "int4")
    for before, said in (("layers.0.mlp", "holds what is held already"), ("elsewhere", "is not the program")):
        proto = lowered.proto()
        for index in range(1000):
            name = f"{before}.experts.0-9999.w1" + (f".{index}" if before == "elsewhere" else "")
            proto.graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[0]))
        onnx.save(proto, tmp_path / "model.onnx")
        asked: list[str] = []

        def spied(name: str, asked: list[str] = asked) -> Iterator[str]:
            for one in expanding(name):
                asked.append(one)
                yield one

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(structure, "expanding", spied)
            with pytest.raises(InputError, match=said):
                open_program(tmp_path / "model.onnx")
        assert len(asked) < 3000


@pytest.mark.parametrize("activations", ["int8", "fp32", None])
def test_mixed_formats_are_told_apart(workshop: Workshop, activations: str | None) -> None:
    check_weights(open_program(workshop("wide", "mixed", activations).program))  # type: ignore[arg-type]


def _node(kind: str, proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == kind)


def _constant(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if "." not in t.name and t.data_type == TensorProto.INT64)


def _weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("in_proj"))


def _set_metadata(proto: onnx.ModelProto, **values: object) -> None:
    prop = proto.metadata_props[0]
    prop.value = json.dumps(json.loads(prop.value) | values)


def _in_a_branch(proto: onnx.ModelProto) -> None:
    branch = next(a.g for a in _node("If", proto).attribute if len(a.g.node) > 1)
    next(node for node in branch.node if node.op_type == "MatMulNBits").attribute[0].i += 1


def _unknown_field(proto: onnx.ModelProto) -> None:
    """A field that this release of the library does not know, at the end of the graph: 1999 = 1."""
    proto.graph.MergeFromString(b"\xf8\x7c\x01")


CHANGES: dict[str, tuple[Change, str]] = {
    "an operator": (lambda proto: setattr(_node("TopK", proto), "op_type", "Tile"), r"\(TopK\) is another one"),
    "a size in a matmul": (
        lambda proto: setattr(next(a for a in _node("MatMulNBits", proto).attribute if a.name == "N"), "i", 10**6),
        r"\(MatMulNBits layers\.0\.mixer\.in_proj\) is another one",
    ),
    "a matmul in a branch": (_in_a_branch, r"\(MatMulNBits layers\.0\.mlp\.experts\.0\.w1\) is another one"),
    "a constant": (
        lambda proto: setattr(_constant(proto), "raw_data", np.int64(10**12).tobytes()),
        r"initializer \d+ of its graph \(v\d+\) is another one",
    ),
    "fewer bytes of a weight": (
        lambda proto: setattr(_weight(proto), "raw_data", b"\x88"),
        r"layers\.0\.mixer\.in_proj has 1 bytes, it should have \d+",
    ),
    "another size of a weight": (
        lambda proto: _weight(proto).dims.insert(0, 1),
        r"\(layers\.0\.mixer\.in_proj\) is another one",
    ),
    "a type that no format has": (
        lambda proto: setattr(_weight(proto), "data_type", TensorProto.INT32),
        r"layers\.0\.mixer\.in_proj is in no format that this release knows",
    ),
    "a weight that is gone": (
        lambda proto: proto.graph.initializer.remove(_weight(proto)),
        r"backbone\.layers\.0\.mixer\.in_proj\.weight is not in it",
    ),
    "a node more": (
        lambda proto: proto.graph.node.append(helper.make_node("Identity", ["tokens"], ["more"])),
        r"has \d+ entries under node, it should have \d+",
    ),
    "a function": (lambda proto: proto.functions.add(name="Scan"), "its header is another one"),
    "an operator set": (lambda proto: setattr(proto.opset_import[0], "version", 22), "its header is another one"),
    "an unknown field": (_unknown_field, "its header is another one"),
    "settings of the runtime": (
        lambda proto: proto.metadata_props.add(key="ort_config", value="{}"),
        "its metadata has more than one entry",
    ),
    "bytes of weights": (lambda proto: _set_metadata(proto, weight_bytes=7), "its weights have .* its metadata says 7"),
    "parameters": (lambda proto: _set_metadata(proto, parameters=7), "its metadata says 7 parameters, fewer than"),
    "a range without end": (
        lambda proto: setattr(_node("Add", proto), "name", "layers.0.mlp.experts.0-999999999999.w1"),
        "is another one",
    ),
    "another release": (
        lambda proto: (_set_metadata(proto, release="9.9"), setattr(_node("TopK", proto), "op_type", "Tile")),
        rf"\(mossquant 9\.9 wrote it, this is {release()}\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(workshop: Workshop, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    proto = workshop("wide", "int4").proto()
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    for open_it in (open_program, OnnxRunner):
        with pytest.raises(InputError, match=message):
            open_it(path)


VALUES: dict[str, tuple[str, int, bytes, str]] = {
    "a norm": ("layers.0.norm", TensorProto.FLOAT, b"\x00\x00\xc0\x7f", "holds NaN or infinite values"),
    "a scale": ("layers.0.mixer.D.scale", TensorProto.BFLOAT16, b"\x80\x7f", "scales that are not positive and finite"),
    "a negative scale": ("layers.0.mixer.D.scale", TensorProto.BFLOAT16, b"\x80\xbf", "scales that are not positive"),
    "a scale that overflows": ("layers.0.mixer.D.scale", TensorProto.BFLOAT16, b"\x7f\x7f", "scales that are not"),
    "a code of eight bits": ("layers.0.mixer.D", TensorProto.INT8, b"\x80", "layers.0.mixer.D holds codes below -127"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_model_has(workshop: Workshop, tmp_path: Path, name: str) -> None:
    where, kind, data, message = VALUES[name]
    proto = workshop("wide", "int4").proto()
    tensor = next(tensor for tensor in initializers(proto.graph) if tensor.name == where)
    assert tensor.data_type == kind
    tensor.raw_data = data + tensor.raw_data[len(data) :]
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=message):
        OnnxRunner(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-1"), ("offset", "x"), ("offset", "9" * 18), ("length", "4"), ("length", "٣")]
)
def test_weights_beside_their_file(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    artifact = export(workshop.checkpoint("mamba48"), tmp_path / "external")
    proto = onnx.load(artifact.program("onnx"), load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    artifact.program("onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"does not say where in the file|lies beyond the file of weights"):
        open_program(artifact.program("onnx"))
