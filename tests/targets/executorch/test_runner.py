# SPDX-License-Identifier: Apache-2.0
"""The ExecuTorch Runner keeps the protocol's promises, and refuses what it was not given whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from lowered import Lowered, Workshop

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.targets.executorch import open as open_module
from mossquant.targets.executorch import packages
from mossquant.targets.executorch.open import read_metadata
from mossquant.targets.executorch.program_file import ProgramFile
from mossquant.targets.executorch.runner import ExecutorchRunner


@pytest.fixture
def folder(int4: Lowered, tmp_path: Path) -> Path:
    """A copy of an artifact, to damage; without the manifest, by which any damage would be seen."""
    return Path(shutil.copytree(int4.artifact, tmp_path / "artifact", ignore=lambda *_: ["manifest.json"]))


def test_info(int4: Lowered) -> None:
    info = int4.runner.info
    assert (info.path, info.kind, info.weights) == (str(int4.artifact), "executorch", "int4-uniform")
    assert (info.activations, info.state_format, info.vocab_size) == ("int8_row_asym", "fp32", int4.config.vocab_size)
    assert (info.max_batch, info.max_chunk) == (1, None)
    assert info.file_bytes == int4.program.stat().st_size
    assert info.files == {"model.pte": file_sha256(int4.program)}
    assert 4.5 < info.bits_per_weight < 9
    assert info.config["model_type"] == "mossnet"
    assert info.model_sha256 == int4.reference().info.model_sha256


def test_threads_belong_to_the_process(int4: Lowered) -> None:
    """Runners that were opened with other numbers of threads go on, with the same numbers, whoever is called."""
    tokens = int4.tokens(1, 9)
    expected, _ = int4.runner(tokens, int4.runner.initial_state(1), logits="all")
    runners = [int4.runner]
    for threads in (2, None, 1, 1, 3):
        runners.append(ExecutorchRunner(int4.program, threads=threads))
        for runner in runners:
            found, _ = runner(tokens, runner.initial_state(1), logits="all")
            np.testing.assert_array_equal(found, expected)
    ExecutorchRunner(int4.program, threads=1)


@pytest.mark.slow
def test_a_state_without_values_is_read_and_written(workshop: Workshop) -> None:
    """A convolution of width 1 carries none. Of other models `test_promises` holds it."""
    lowered = workshop("no window", "int4", target="executorch")
    runner, tokens, config = lowered.runner, lowered.tokens(1, 9), lowered.config
    _, state = runner(tokens, runner.initial_state(1))
    arrays = runner.read(state)
    assert arrays["layers.1.mixer.ssm"].shape == (1, config.d_inner, config.state_size)
    assert arrays["layers.1.mixer.conv"].shape == (1, config.d_inner, config.conv_kernel - 1)
    written = runner.write({name: np.asfortranarray(array) for name, array in arrays.items()})
    for step in (tokens[:, :1], tokens):
        expected, state = runner(step, state)
        found, written = runner(step, written)
        np.testing.assert_array_equal(found, expected)


def test_one_stream_at_a_time(int4: Lowered) -> None:
    runner = int4.runner
    message = r"a \.pte runs one stream, and 2 were asked for; run them one after the other"
    with pytest.raises(InputError, match=message):
        runner.initial_state(2)
    arrays = runner.read(runner.initial_state(1))
    with pytest.raises(InputError, match=message):
        runner.write({name: np.concatenate([array, array]) for name, array in arrays.items()})


def test_metadata_of_a_model_of_another_shape(folder: Path) -> None:
    """Inputs and outputs must be those that the metadata promise; hashes cannot tell."""
    data, metadata = (folder / "model.pte").read_bytes(), read_metadata(ProgramFile(folder / "model.pte"))
    assert metadata.config["hidden_size"] == 64
    for old, new in ((b'"state_size": 16', b'"state_size": 17'), (b'"max_chunk": 128', b'"max_chunk": 512')):
        assert data.count(old) == 1
        (folder / "model.pte").write_bytes(data.replace(old, new))
        with pytest.raises(
            InputError, match=r"do not fit its metadata: .*takes or gives other arrays than the model's"
        ):
            ExecutorchRunner(folder)


def test_metadata_of_a_rounded_state(folder: Path) -> None:
    """Only libmoss carries states in other formats than fp32."""
    data, said = (folder / "model.pte").read_bytes(), b'"state_format": "fp32"'
    assert data.count(said) == 1
    (folder / "model.pte").write_bytes(data.replace(said, said.replace(b"fp32", b"fp16")))
    with pytest.raises(InputError, match=r"metadata cannot be read \(state_format: "):
        ExecutorchRunner(folder)


def test_a_tokenizer_of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder / "tokenizer.json"
    own.write_text("{}")
    update = {"tokenizer_sha256": file_sha256(own)}
    monkeypatch.setattr(open_module, "read_metadata", lambda file: read_metadata(file).model_copy(update=update))
    assert ExecutorchRunner(folder).info.tokenizer_sha256 == file_sha256(own)
    own.write_text("[]")
    with pytest.raises(InputError, match=r"is not the tokenizer of model\.pte"):
        ExecutorchRunner(folder)


def test_packages_that_are_missing_or_others(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    message = r"executorch is not installed, and \.pte programs need it; run: pip install 'mossquant\[executorch\]'"
    with pytest.raises(InputError, match=message):
        ExecutorchRunner(int4.program)
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    with pytest.raises(InputError, match=r"executorch 0\.1 is installed and 1\.4\.1 is needed"):
        ExecutorchRunner(int4.program)
