# SPDX-License-Identifier: Apache-2.0
"""The manifest of an artifact is believed only where it can be compared."""

import hashlib
import json
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.targets.artifact import (
    Artifact,
    MethodPorts,
    Port,
    ProgramRecord,
    Runtime,
    check_beside,
    write_artifact_manifest,
)
from mossquant.targets.metadata import ProgramMetadata
from mossquant.text.declared import DeclaredText

METADATA = ProgramMetadata(
    release="0.1.0",
    config={},
    weights="int4",
    parameters=1,
    payload_bytes=1,
    source_kind="checkpoint",
    source_files={},
    tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
    seen_text=[],
    target="onnx",
    runtime_minimum="1.23.2",
    activations="fp32",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"program")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    program = ProgramRecord(
        file="model.onnx",
        methods={"run": MethodPorts(inputs=[Port(name="tokens", type="int64", shape=["B", "T"])], outputs=[])},
        runtime=Runtime(name="onnxruntime", minimum="1.23.2", domains={"ai.onnx": 21}, operators={"ai.onnx": ["Add"]}),
        model=METADATA.model_dump(),
    )
    write_artifact_manifest(tmp_path, release="0.1.0", programs={"onnx": program})
    return tmp_path


def test_round_trip(folder: Path) -> None:
    artifact = Artifact.open(folder)
    assert artifact.targets == ("onnx",)
    assert artifact.program("onnx") == folder / "model.onnx"
    assert artifact.bytes == len(b"program")
    assert set(artifact.files) == {"model.onnx", "tokenizer.json"}
    assert artifact.manifest.programs["onnx"].methods["run"].inputs[0].shape == ["B", "T"]


def test_all_offenders_at_once(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"another")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model\.onnx has another SHA-256 .*; tokenizer\.json is missing"):
        Artifact.open(folder)
    (folder / "model.onnx").write_bytes(b"longer than before")
    with pytest.raises(InputError, match=r"model\.onnx has 18 bytes, the manifest says 7"):
        Artifact.open(folder)


def test_a_tokenizer_that_is_not_listed(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    del record["files"]["tokenizer.json"]
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"tokenizer\.json does not belong to it"):
        Artifact.open(folder)


def test_a_program_is_held_against_the_manifest_beside_it(folder: Path) -> None:
    program, digest = folder / "model.onnx", file_sha256(folder / "model.onnx")
    check_beside(program, {"model.onnx": digest}, METADATA)
    with pytest.raises(InputError, match=r"model\.onnx has another SHA-256"):
        check_beside(program, {"model.onnx": "0" * 64}, METADATA)
    with pytest.raises(InputError, match=r"says something else about model\.onnx"):
        check_beside(program, {"model.onnx": digest}, METADATA.model_copy(update={"weights": "int8"}))
    stored = json.loads((folder / "manifest.json").read_text())
    declared = METADATA.model_copy(update={"text": DeclaredText(end_of_text=(3,))})
    said = json.loads(declared.model_dump_json())
    said["text"]["of a later release"] = said["of a later release"] = 1
    stored["programs"]["onnx"]["model"] = said
    (folder / "manifest.json").write_text(json.dumps(stored))
    check_beside(program, {"model.onnx": digest}, declared)
    other = program.rename(folder / "other.onnx")
    with pytest.raises(InputError, match=r"other\.onnx is not listed there"):
        check_beside(other, {"other.onnx": digest}, METADATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version 2 was written by mossquant 0\.1\.0; use that release"),
        ({"kind": "quantized checkpoint"}, "is not the manifest of an artifact: kind"),
        (
            {"programs": {"onnx": {"file": "../model.onnx"}}},
            r"is not the manifest of an artifact: programs\.onnx\.file",
        ),
        ({"files": {"/etc/passwd": {"sha256": "ab" * 32, "bytes": 1}}}, "is not the manifest of an artifact: files"),
    ],
)
def test_bad_manifests(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        Artifact.open(folder)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an artifact; give a folder that `mossquant export` wrote"):
        Artifact.open(tmp_path)
    (tmp_path / "manifest.json").write_text("no JSON")
    with pytest.raises(InputError, match="is not JSON"):
        Artifact.open(tmp_path)
