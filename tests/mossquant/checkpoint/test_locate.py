# SPDX-License-Identifier: Apache-2.0
"""What a PATH argument is taken for."""

import json
from pathlib import Path

import pytest

from mossquant.checkpoint.locate import asset_folder, locate
from mossquant.errors import InputError


def folder(path: Path, *files: str, config: object = None) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_bytes(b"")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_kinds(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain", config={"model_type": "mossnet"})
    quantized = folder(tmp_path / "quantized", config={"quantization_config": {}})
    artifact = folder(tmp_path / "artifact", "model.onnx", "tokenizer.json", "manifest.json")
    statistics = folder(tmp_path / "statistics", "statistics.safetensors")
    (statistics / "manifest.json").write_text(json.dumps({"kind": "statistics"}))
    broken = folder(tmp_path / "broken", config=None)
    (broken / "config.json").write_bytes(b"{")
    for path, found, kind in (
        (plain, plain, "checkpoint"),
        (quantized, quantized, "quantized checkpoint"),
        (artifact, artifact / "model.onnx", "onnx"),
        (artifact / "model.onnx", artifact / "model.onnx", "onnx"),
        (statistics, statistics, "statistics"),
        (broken, broken, "checkpoint"),  # whoever reads it says what is wrong with it
    ):
        located = locate(path)
        assert (located.path, located.kind) == (found, kind)
        assert locate(str(path)) == located


def test_the_bundled_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("tiny").path == asset_folder("tiny")
    own = folder(tmp_path / "tiny", config={"model_type": "mossnet"})
    assert locate("tiny").path == asset_folder("tiny"), "the name means one model wherever it is used"
    assert locate("./tiny").path.resolve() == own


def test_refused(tmp_path: Path) -> None:
    folder(tmp_path / "empty")
    folder(tmp_path / "two", "a.onnx", "b.onnx")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02")
    for name, message in (
        ("none", "does not exist, and nothing is downloaded; give a checkpoint folder, an artifact, or the name tiny"),
        ("empty", "holds neither config.json nor a program"),
        ("two", r"holds 2 programs; give one of them: .*a\.onnx, .*b\.onnx"),
        ("weights.bin", r"no program by its name, which ends in \.onnx, \.pte, \.moss"),
        ("n" * 300, "cannot be opened"),
    ):
        with pytest.raises(InputError, match=message) as error:
            locate(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_verb_says_what_it_needs(tmp_path: Path) -> None:
    located = locate(folder(tmp_path / "artifact", "model.onnx"))
    assert located.require("onnx", "checkpoint", verb="bench").name == "model.onnx"
    with pytest.raises(InputError, match="is of kind 'onnx', but quantize needs: checkpoint; give one of those"):
        located.require("checkpoint", verb="quantize")
