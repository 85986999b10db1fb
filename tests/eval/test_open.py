# SPDX-License-Identifier: Apache-2.0
"""One PATH argument opens anything that runs, and nothing else."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.errors import InputError
from mossquant.eval.open import open_model, open_runner
from mossquant.files.outputs import file_sha256
from mossquant.targets.export import export

BYTES = replace(SMALL, vocab_size=256)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level checkpoint, its int8 form and the .onnx of that."""
    above = tmp_path_factory.mktemp("open")
    paths = {
        "checkpoint": write_model(above / "model", random_model(BYTES)),
        "quantized checkpoint": above / "int8",
        "onnx": above / "onnx",
    }
    quantize(paths["checkpoint"], paths["quantized checkpoint"], recipe="int8-uniform")
    export(paths["quantized checkpoint"], paths["onnx"])
    return paths


@pytest.mark.parametrize("kind", ["checkpoint", "quantized checkpoint", "onnx"])
def test_every_kind_opens_with_its_tokenizer(folders: dict[str, Path], kind: str) -> None:
    opened = open_model(folders[kind], threads=1)
    info = opened.runner.info
    assert (info.kind, info.path, info.vocab_size) == (kind, str(folders[kind]), 256)
    assert info.parameters == open_runner(folders["checkpoint"]).info.parameters
    assert opened.tokenizer.sha256 is None
    assert not opened.has_bundled_tokenizer
    assert info.config["hidden_size"] == BYTES.hidden_size
    assert info.weight_bytes > 0
    logits, _ = opened.runner(np.array([[1, 2, 3]]), opened.runner.initial_state(1))
    assert np.isfinite(logits).all()


def test_the_program_file_is_the_artifact(folders: dict[str, Path]) -> None:
    opened = open_model(folders["onnx"] / "model.onnx")
    assert opened.folder == folders["onnx"]
    assert opened.runner.info.kind == "onnx"


def test_the_bundled_model_by_name() -> None:
    opened = open_model(BUNDLED)
    assert opened.folder == asset_folder(BUNDLED)
    assert opened.has_bundled_tokenizer
    assert opened.runner.info.weights == "bfloat16"


def test_a_quantized_checkpoint_runs_with_the_activations_that_are_asked_for(folders: dict[str, Path]) -> None:
    tokens = np.arange(40)[None]
    logits = {}
    for activations in (None, "fp32", "planned", "int8_block"):
        runner = open_runner(folders["quantized checkpoint"], activations=activations)
        assert runner.info.activations == (activations or "fp32")
        logits[activations] = runner(tokens, runner.initial_state(1), logits="all")[0]
    assert np.array_equal(logits[None], logits["fp32"])
    assert np.array_equal(logits["planned"], logits["int8_block"])
    assert 0 < np.abs(logits["planned"] - logits["fp32"]).max() < 1


def test_activations_of_anything_else_can_only_be_confirmed(folders: dict[str, Path]) -> None:
    assert open_runner(folders["onnx"], activations="int8_block").info.activations == "int8_block"
    with pytest.raises(InputError, match="has int8_block activations built in"):
        open_runner(folders["onnx"], activations="fp32")
    with pytest.raises(InputError, match="has no planned activations"):
        open_runner(folders["checkpoint"], activations="planned")
    with pytest.raises(InputError, match="int7"):
        open_runner(folders["quantized checkpoint"], activations="int7")


def test_a_checkpoint_and_what_was_lowered_from_it_are_one_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its hash is that of the config and the stored weights: `sha256sum config.json model* | sha256sum`."""
    hashes = {kind: open_runner(path).info.model_sha256 for kind, path in folders.items()}
    assert hashes["quantized checkpoint"] == hashes["onnx"] != hashes["checkpoint"]
    listed = [f"{file_sha256(folders['checkpoint'] / name)}  {name}\n" for name in ("config.json", "model.safetensors")]
    assert hashes["checkpoint"] == hashlib.sha256("".join(listed).encode()).hexdigest()
    exact = export(folders["quantized checkpoint"], tmp_path / "exact", activations="fp32")
    assert open_runner(exact.folder).info.model_sha256 == hashes["onnx"]
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folders["checkpoint"], same)
    (same / "training.json").write_text('{"version": 1, "text": []}')
    write_model(other, random_model(BYTES, seed=1))
    assert open_runner(same).info.model_sha256 == hashes["checkpoint"] != open_runner(other).info.model_sha256
