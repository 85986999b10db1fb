# SPDX-License-Identifier: Apache-2.0
"""Headers that are damaged, or say something that cannot be, give one line; libmoss refuses what it maps itself too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowered import Lowered, Workshop

from mossquant.errors import InputError
from mossquant.targets.export import export
from mossquant.targets.native.library import Model, MossError
from mossquant.targets.native.open import open_program
from mossquant.targets.native.runner import NativeRunner


@pytest.fixture(scope="module")
def lowered(workshop: Workshop) -> Lowered:
    return workshop("pruned", "int4", target="native")


@pytest.fixture
def program(lowered: Lowered, tmp_path: Path) -> Path:
    """A copy of a program, to damage; without the manifest, by which any damage would be seen."""
    return Path(shutil.copy(lowered.program, tmp_path / "model.moss"))


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, 0.999])
def test_a_file_that_was_cut_short(program: Path, kept: float) -> None:
    data = program.read_bytes()
    program.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"is not a readable \.moss \(cut short") as caught:
        open_program(program)
    assert "\n" not in str(caught.value)
    with pytest.raises(MossError):
        Model(program)


@pytest.mark.parametrize("content", [b"plain text, not a program\n" * 20, b"PK\x03\x04 pickle", bytes(5000)])
def test_other_files(program: Path, content: bytes) -> None:
    program.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a readable \.moss"):
        NativeRunner(program)
    with pytest.raises(MossError):
        Model(program)


def _edited(program: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """The header with something else in it; the tensors stay, and begin at a multiple of 64 still."""
    data = program.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    program.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _runtime(**values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        said = json.loads(header["__metadata__"]["moss"])
        for key, value in values.items():
            said[key] = {**said.get(key, {}), **value} if isinstance(value, dict) else value
        header["__metadata__"]["moss"] = json.dumps(said)

    return edit


def _metadata(**values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        said = json.loads(header["__metadata__"]["mossquant"]) | values
        header["__metadata__"]["mossquant"] = json.dumps(said)

    return edit


def _tensor(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


D, S, W = "backbone.layers.0.mixer.D", "layers.0.mixer.ssm", "layers.1.mixer.conv"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "nothing": (lambda header: None, ""),
    "more is said": (_runtime(config={"later": 1}, later=[1]), ""),
    "no metadata": (lambda header: header.pop("__metadata__") and None, "holds no mossquant metadata"),
    "not ours": (lambda header: header["__metadata__"].pop("mossquant") and None, "holds no mossquant metadata"),
    "metadata of another kind": (lambda header: header.update(__metadata__=3), r"is not a readable \.moss"),
    "a tensor is gone": (lambda header: header.pop(D) and None, "does not follow the tensor before it"),
    "renamed": (lambda header: header.update({"x\n": header.pop(D)}), rf"{D} is missing; x\\n is unexpected"),
    "another type": (_tensor(D, dtype="F32"), "mixer.D is no row of bytes"),
    "a larger shape": (_tensor(D, shape=[1 << 62]), "mixer.D is no row of bytes"),
    "before the data": (_tensor(D, data_offsets=[-64, 0], shape=[64]), "mixer.D is no row of bytes"),
    "the other way": (_tensor(D, data_offsets=[64, 0], shape=[-64]), "mixer.D is no row of bytes"),
    "over another": (_tensor(D, data_offsets=[0, 64], shape=[64]), "does not follow the tensor before it"),
    "a list": (lambda header: header.update({D: [1]}), "mixer.D is no row of bytes"),
    "another version": (_runtime(version=3), "is of another version than 1 and 2"),
    "rounded states": (_runtime(states={S: "int8"}), "says another version to libmoss than its metadata does"),
    "states it does not say": (
        _runtime(version=2, states={S: "int8"}),
        "its states are fp32, int8, its metadata says fp32",
    ),
    "an unknown state": (_runtime(version=2, states={S: "int3"}), "mixer.ssm is carried in 'int3', which libmoss"),
    "a rounded window": (_runtime(version=2, states={W: "int8"}), "mixer.conv is carried in 'int8', which libmoss"),
    "no states": (_runtime(version=2, states=[1]), "does not say how its states are carried"),
    "another layout": (_runtime(layout="sparc"), "says another layout to libmoss than its metadata does"),
    "another config": (_runtime(config={"state_size": 6}), "says another config to libmoss than its metadata does"),
    "no config": (_runtime(config=None), "says another config to libmoss"),
    "no formats": (_runtime(formats=None), "does not say how its tensors are stored"),
    "another format": (_runtime(formats={D: "int4_g32"}), r"mixer\.D has 128 bytes, int4_g32 needs 64"),
    "an unknown format": (_runtime(formats={D: "int3"}), r"mixer\.D is stored in 'int3', which libmoss does not read"),
    "a quantized norm": (_runtime(formats={"backbone.norm_f.weight": "int8"}), "norm_f.weight is stored in 'int8'"),
    "other bytes": (_metadata(weight_bytes=64), r"its weights have \d+ bytes, its metadata says 64"),
    "fewer parameters": (_metadata(parameters=7), "its metadata says 7 parameters, fewer than the model has"),
    "another target": (_metadata(target="onnx"), "its metadata cannot be read"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_that_was_changed(program: Path, name: str) -> None:
    edit, message = EDITS[name]
    _edited(program, edit)
    if not message:
        NativeRunner(program)
        return
    with pytest.raises(InputError, match=message) as caught:
        NativeRunner(program)
    assert str(caught.value).isprintable()


def test_tensors_that_begin_elsewhere(program: Path) -> None:
    data = program.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    program.write_bytes((end - 7).to_bytes(8, "little") + data[8:end] + b" " + data[end:])
    with pytest.raises(InputError, match="its tensors do not begin at a multiple of 64"):
        open_program(program)


def test_bytes_behind_the_last_tensor(program: Path) -> None:
    program.write_bytes(program.read_bytes() + bytes(64))
    with pytest.raises(InputError, match=r"it has [\d,]+ bytes, and its tensors end at"):
        open_program(program)


def test_a_header_without_end(program: Path) -> None:
    """Its length is believed up to 16 MB, and depth up to 32."""
    for header in (b"[" * 100_000, b" " * (1 << 24) + b"{}", b'{"a":1,"a":1}', b'"', b"[]", b"\xff{}"):
        program.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(InputError, match=r"is not a readable \.moss"):
            open_program(program)
        with pytest.raises(MossError):
            Model(program)


def test_a_tokenizer_of_another_model(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(workshop.checkpoint("experts"), tmp_path / "model"))
    (checkpoint / "tokenizer.json").write_text("{}")
    artifact = export(checkpoint, tmp_path / "artifact", target="native")
    (artifact.folder / "manifest.json").unlink()
    (artifact.folder / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match=r"is not the tokenizer of model\.moss"):
        NativeRunner(artifact.folder)
