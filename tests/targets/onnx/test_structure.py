# SPDX-License-Identifier: Apache-2.0
"""A graph that takes, holds or says what no model of its config does is refused, and every reason is named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from kept import KEPT_ONNX
from lowered import Workshop
from onnx import TensorProto, numpy_helper

from mossquant.errors import InputError
from mossquant.release import release
from mossquant.targets.export import export
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx import structure
from mossquant.targets.onnx.file_graph import expanded
from mossquant.targets.onnx.metadata import graphs, initializers
from mossquant.targets.onnx.open import open_program
from mossquant.targets.onnx.runner import OnnxRunner

Change = Callable[[onnx.ModelProto], object]


def _opened(proto: onnx.ModelProto, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    open_program(folder / "model.onnx")


@pytest.mark.parametrize("before", ["layers.0.mlp", "elsewhere"])
def test_names_of_ranges_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """They are neither expanded nor believed; a thousand of them took seconds."""
    proto, asked = onnx.load(KEPT_ONNX), list[str]()
    for index in range(1000):
        name = f"{before}.experts.0-9999.w1" + (f".{index}" if before == "elsewhere" else "")
        proto.graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[0]))

    def spied(name: str) -> Iterator[str]:
        for one in expanded(name):
            asked.append(one)
            yield one

    monkeypatch.setattr(structure, "expanded", spied)
    if before == "elsewhere":
        _opened(proto, tmp_path)  # no tensor of the model: `verify` says that they are left over
    else:
        with pytest.raises(InputError, match=r"holds what is held already|is there twice"):
            _opened(proto, tmp_path)
    assert len(asked) < 3000


def _node(kind: str, proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == kind)


def _set(kind: str, attribute: str, value: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        next(one for one in _node(kind, proto).attribute if one.name == attribute).i = value

    return change


def _constant(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if "." not in t.name and t.data_type == TensorProto.INT64)


def _weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("in_proj"))


def _set_metadata(proto: onnx.ModelProto, **values: object) -> None:
    prop = proto.metadata_props[0]
    prop.value = json.dumps(json.loads(prop.value) | values)


def _in_a_branch(proto: onnx.ModelProto) -> None:
    branch = next(a.g for a in _node("If", proto).attribute if len(a.g.node) > 1)
    next(node for node in branch.node if node.op_type == "MatMulNBits").attribute[0].i += 32


def _hidden(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "v9999"))


def _file_in_an_attribute(proto: onnx.ModelProto) -> None:
    tensor = next(one for one in _node("ConstantOfShape", proto).attribute if one.name == "value").t
    tensor.external_data.add(key="location", value="/etc/passwd")


CHANGES: dict[str, tuple[Change, str]] = {
    "an operator": (lambda proto: setattr(_node("TopK", proto), "op_type", "Tile"), "Tile is an operator that no"),
    "a domain": (lambda proto: setattr(_node("TopK", proto), "domain", "x"), "TopK is an operator that no"),
    "a size in a matmul": (
        _set("MatMulNBits", "N", 64),
        r"MatMulNBits layers\.0\.mixer\.in_proj has other sizes than its weights",
    ),
    "a size without end": (_set("MatMulNBits", "N", 10**6), r"N of MatMulNBits .* is larger than any size"),
    "a matmul in a branch": (_in_a_branch, r"layers\.0\.mlp\.experts\.0\.w1 has other sizes than its weights"),
    "a file in an attribute": (_file_in_an_attribute, "value of ConstantOfShape is larger than"),
    "a constant": (
        lambda proto: setattr(_constant(proto), "raw_data", np.int64(10**12).tobytes() * 3),
        r"v\d+ is no constant that a model of its config needs",
    ),
    "a weight that is called like a constant": (_hidden, "v9999 is no constant that a model of its config needs"),
    "fewer bytes of a weight": (
        lambda proto: setattr(_weight(proto), "raw_data", b"\x88"),
        r"layers\.0\.mixer\.in_proj does not lie where it says, or has another size",
    ),
    "another size of a weight": (lambda proto: _weight(proto).dims.insert(0, 2), r"in_proj does not lie where"),
    "a type that no format has": (
        lambda proto: setattr(_weight(proto), "data_type", TensorProto.INT8),
        r"layers\.0\.mixer\.in_proj has a type or size that no format gives it",
    ),
    "a type of no weight": (lambda proto: setattr(_weight(proto), "data_type", TensorProto.INT32), "has a type that"),
    "a weight that is gone": (lambda proto: proto.graph.initializer.remove(_weight(proto)), r"in_proj is not in it"),
    "a weight that is there twice": (lambda proto: proto.graph.initializer.append(_weight(proto)), "is there twice"),
    "an input more": (lambda proto: proto.graph.input.append(proto.graph.input[0]), "it takes other arrays than"),
    "an input of any size": (
        lambda proto: setattr(proto.graph.input[2].type.tensor_type.shape.dim[1], "dim_param", "any"),
        "it takes other arrays than",
    ),
    "an output less": (lambda proto: proto.graph.output.pop(), "it gives other arrays than"),
    "a function": (lambda proto: proto.functions.add(name="Scan"), "it has functions or a training of its own"),
    "settings of the runtime": (
        lambda proto: proto.metadata_props.add(key="ort_config", value="{}"),
        "its metadata has more than one entry",
    ),
    "bytes of weights": (lambda proto: _set_metadata(proto, weight_bytes=7), "its weights have .* its metadata says 7"),
    "parameters": (lambda proto: _set_metadata(proto, parameters=7), "its metadata says 7 parameters, fewer than"),
    "another release": (
        lambda proto: (_set_metadata(proto, release="9.9"), setattr(_node("TopK", proto), "op_type", "Tile")),
        rf"\(mossquant 9\.9 wrote it, this is {release()}\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    proto = onnx.load(KEPT_ONNX)
    change(proto)
    with pytest.raises(InputError, match=message):
        _opened(proto, tmp_path)


def test_all_offenders_at_once(tmp_path: Path) -> None:
    proto = onnx.load(KEPT_ONNX)
    for name in ("an operator", "a size without end", "fewer bytes of a weight", "an output less", "parameters"):
        CHANGES[name][0](proto)
    with pytest.raises(InputError) as caught:
        _opened(proto, tmp_path)
    for part in ("Tile", "N of MatMulNBits", "does not lie where", "gives other arrays", "says 7 parameters"):
        assert part in str(caught.value)


def test_a_graph_that_does_not_run_is_found_in_the_child_process(tmp_path: Path) -> None:
    proto = onnx.load(KEPT_ONNX)
    _node("Transpose", proto).attribute[0].ints[:] = [0, 1, 2]
    _opened(proto, tmp_path)
    with pytest.raises(InputError, match=r"model\.onnx cannot be run \(.*export again$"):
        OnnxRunner(tmp_path / "model.onnx")


def test_operators_are_those_of_what_is_lowered(workshop: Workshop) -> None:
    used = {
        (node.domain, node.op_type)
        for model, recipe in (("wide", "int4"), ("wide", "mixed"), ("no window", None))
        for graph in graphs(workshop(model, recipe).proto().graph)
        for node in graph.node
    }
    assert used == {(domain, name) for domain, names in structure.OPERATORS.items() for name in names}


VALUES: dict[str, tuple[str, int, bytes, str]] = {
    "a norm": ("layers.0.norm", TensorProto.FLOAT, b"\x00\x00\xc0\x7f", "holds NaN or infinite values"),
    "a scale": ("layers.0.mixer.D.scale", TensorProto.BFLOAT16, b"\x80\x7f", "holds NaN or infinite values"),
    "a negative scale": ("layers.0.mixer.D.scale", TensorProto.BFLOAT16, b"\x80\xbf", "scales that are not positive"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_model_has(tmp_path: Path, name: str) -> None:
    where, kind, data, message = VALUES[name]
    proto = onnx.load(KEPT_ONNX)
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
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="does not lie where it says"):
        open_program(artifact.program("onnx"))
