# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runner keeps the protocol's promises, and refuses what it was not given whole."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lowered import Lowered, Workshop
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from mossquant.errors import InputError
from mossquant.eval.open import open_model
from mossquant.files.outputs import file_sha256
from mossquant.targets.onnx import runner as module
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx.runner import OnnxRunner


@pytest.fixture(scope="module")
def lowered(workshop: Workshop) -> Lowered:
    return workshop("wide", "int4")


@pytest.fixture
def folder(lowered: Lowered, tmp_path: Path) -> Path:
    """A copy of an artifact, to damage; without the manifest, by which any damage would be seen."""
    return Path(shutil.copytree(lowered.artifact, tmp_path / "artifact", ignore=lambda *_: ["manifest.json"]))


@pytest.fixture
def external(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact with its weights in a file beside it."""
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    from mossquant.targets.export import export

    return export(workshop.checkpoint("wide", "int4"), tmp_path / "external").folder


def test_info(lowered: Lowered) -> None:
    info = lowered.runner.info
    assert (info.path, info.kind, info.weights) == (str(lowered.artifact), "onnx", "int4-uniform")
    assert (info.activations, info.state_format, info.vocab_size) == ("int8_block", "fp32", lowered.config.vocab_size)
    assert (info.max_batch, info.max_chunk) == (None, None)
    assert info.file_bytes == lowered.program.stat().st_size
    assert info.files == {"model.onnx": file_sha256(lowered.program)}
    assert 4.5 < info.bits_per_weight < 8
    assert info.config["model_type"] == "mossnet"


@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_give_what_one_run_gives(lowered: Lowered, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    runner, tokens = lowered.runner, lowered.tokens(batch, 23)
    whole, end = runner(tokens, runner.initial_state(batch), logits="all")
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 8 * batch)
    pieces, state = runner(tokens, runner.initial_state(batch), logits="all")
    last, _ = runner(tokens, runner.initial_state(batch))
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-5)
    for name, array in runner.read(state).items():
        np.testing.assert_allclose(array, runner.read(end)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_file_that_was_cut_short(folder: Path, kept: float) -> None:
    program = folder / "model.onnx"
    data = program.read_bytes()
    program.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"not a readable ONNX file|holds no mossquant metadata"):
        OnnxRunner(folder)


@pytest.mark.parametrize("content", [b"plain text, not a program\n" * 20, b"PK\x03\x04 pickle", bytes(5000)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable ONNX file|holds no mossquant metadata"):
        OnnxRunner(path)


def test_another_programs_onnx(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, folder / "model.onnx")
    with pytest.raises(InputError, match="holds no mossquant metadata"):
        OnnxRunner(folder)


def test_metadata_of_another_release(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    proto.metadata_props[0].value = proto.metadata_props[0].value.replace('"version":1', '"version":2')
    onnx.save(proto, folder / "model.onnx")
    with pytest.raises(InputError, match=r"version: .*another release of mossquant wrote it"):
        OnnxRunner(folder)


def test_a_graph_that_runs_on_some_lengths_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the child process did not try."""
    runner = OnnxRunner(folder)

    def fails(binding: object) -> None:
        raise errors.Fail("a size does not fit")

    monkeypatch.setattr(runner._session, "run_with_iobinding", fails)
    with pytest.raises(InputError, match=r"the program cannot be run \(a size does not fit\)"):
        runner(np.zeros((1, 3), np.int64), runner.initial_state())


def test_external_weights_compute_the_same(lowered: Lowered, external: Path) -> None:
    runner, tokens = OnnxRunner(external, threads=1), lowered.tokens(2, 9)
    assert set(runner.info.files) == {"model.onnx", "model.onnx.data"}
    assert runner.info.weight_bytes == lowered.runner.info.weight_bytes
    found, _ = runner(tokens, runner.initial_state(2), logits="all")
    expected, _ = lowered.runner(tokens, lowered.runner.initial_state(2), logits="all")
    np.testing.assert_array_equal(found, expected)


def test_external_weights_that_are_not_the_programs(external: Path) -> None:
    data = external / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(InputError, match="another SHA-256"):
        OnnxRunner(external)
    data.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"has \d+ bytes, model\.onnx needs \d+"):
        OnnxRunner(external)
    data.unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data is missing"):
        OnnxRunner(external)


def test_a_tokenizer_of_another_model(workshop: Workshop, tmp_path: Path) -> None:
    from mossquant.targets.export import export

    checkpoint = Path(shutil.copytree(workshop.checkpoint("experts"), tmp_path / "model"))
    (checkpoint / "tokenizer.json").write_text("{}")
    artifact = export(checkpoint, tmp_path / "artifact")
    opened = open_model(artifact.folder)
    assert opened.runner.info.tokenizer_sha256 == file_sha256(checkpoint / "tokenizer.json")
    (artifact.folder / "tokenizer.json").rename(tmp_path / "elsewhere")
    (artifact.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"model\.onnx was exported with one: copy it there"):
        _ = open_model(artifact.folder).tokenizer
    (artifact.folder / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match=r"is not the tokenizer of model\.onnx"):
        OnnxRunner(artifact.folder)
    without = export(workshop.checkpoint("experts"), tmp_path / "without").folder
    (without / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"does not belong to model\.onnx, whose model has no tokenizer"):
        OnnxRunner(without)


def test_an_older_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.22.1")
    with pytest.raises(InputError, match=r"needs onnxruntime 1\.23\.2 or later and 1\.22\.1 is installed"):
        OnnxRunner(folder)
