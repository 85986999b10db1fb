# SPDX-License-Identifier: Apache-2.0
"""Everything that measures or runs takes a .pte like an .onnx."""

import shutil
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.eval.compare import compare
from mossquant.eval.info import info
from mossquant.eval.open import open_model, open_runner
from mossquant.eval.perplexity import perplexity
from mossquant.eval.verify import verify


def test_it_opens_with_its_tokenizer(pte_folder: Path, quantized_folder: Path) -> None:
    opened = open_model(pte_folder / "model.pte", activations="int8_row_asym", threads=1)
    assert opened.folder == pte_folder
    assert opened.tokenizer.sha256 is None
    assert (opened.runner.info.kind, opened.runner.info.vocab_size) == ("executorch", 256)
    assert opened.runner.info.model_sha256 == open_runner(quantized_folder).info.model_sha256
    with pytest.raises(InputError, match="has int8_row_asym activations built in"):
        open_runner(pte_folder, activations="fp32")


def test_a_folder_with_two_programs_needs_a_choice(pte_folder: Path, artifact_folder: Path, tmp_path: Path) -> None:
    for program in (pte_folder / "model.pte", artifact_folder / "model.onnx"):
        shutil.copy(program, tmp_path)
    with pytest.raises(InputError, match=r"holds 2 programs; give one of them: .*model\.onnx, .*model\.pte"):
        open_runner(tmp_path)
    assert open_runner(tmp_path / "model.pte").info.kind == "executorch"


@pytest.mark.parametrize("streams", [1, 3])
def test_perplexity_and_comparison(
    pte_folder: Path, artifact_folder: Path, checkpoint_folder: Path, text: Path, streams: int
) -> None:
    """Several streams are read one after the other: a .pte runs one at a time."""
    alone = perplexity(pte_folder, text=text, tokens=600, streams=streams, threads=1)
    report = compare(
        checkpoint_folder, [pte_folder, artifact_folder], text=text, tokens=600, streams=streams, threads=1
    )
    pte, onnx = report.candidates
    assert pte.perplexity == alone.perplexity
    # The same weights with inputs rounded in two ways: as far from the original as one another, to a factor.
    assert 0 < pte.kl_mean < 3 * onnx.kl_mean


def test_verification_of_the_weights_of_both_targets(
    pte_folder: Path, artifact_folder: Path, quantized_folder: Path, checkpoint_folder: Path
) -> None:
    report = verify(quantized_folder, [pte_folder, artifact_folder], weights_only=True)
    assert report.failures() == []
    assert [artifact.weights.weights for artifact in report.artifacts] == [report.artifacts[0].weights.weights] * 2
    assert not verify(checkpoint_folder, [pte_folder], weights_only=True).passed


def test_info_accounts_for_every_byte(pte_folder: Path, quantized_folder: Path) -> None:
    report = info(pte_folder)
    assert (report.kind, report.weights) == ("executorch", "int4-uniform")
    assert report.program_bytes == (pte_folder / "model.pte").stat().st_size
    assert report.weight_bytes == open_runner(pte_folder).info.weight_bytes
    assert report.payload_bytes == info(quantized_folder).payload_bytes
    assert report.active_parameters == report.parameters
    assert dict(report.facts)["methods"].startswith("decode, prefill, score")
