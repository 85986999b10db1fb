# SPDX-License-Identifier: Apache-2.0
"""Comparisons: the numbers against their definitions, the JSON's shape, the gate, the pairing."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import CUT_NATS
from small import SMALL, random_model, write_model

from mossquant.errors import InputError
from mossquant.eval.compare import compare, paired_difference
from mossquant.targets.torch.runner import TorchRunner


def test_a_model_against_itself_loses_nothing(byte_model: Path, text_file: Path) -> None:
    candidate = compare(byte_model, [byte_model], text=text_file).candidates[0]
    assert (candidate.ppl_increase_pct, candidate.top1_agreement) == (0, 1)
    assert (candidate.kl_mean, candidate.kl_median) == (0, 0)
    assert candidate.kl_ci95 is not None
    assert (candidate.kl_ci95.low, candidate.kl_ci95.high) == (0, 0)


def test_the_numbers_are_what_their_definitions_say(byte_model: Path, other_byte_model: Path, text_file: Path) -> None:
    report = compare(byte_model, [other_byte_model], text=text_file, tokens=700)
    tokens = torch.tensor(list(text_file.read_bytes()[:700]))[None]
    p, q = [
        torch.log_softmax(TorchRunner.open(path, dtype=torch.float64).model(tokens[:, :-1])[0][0], -1)
        for path in (byte_model, other_byte_model)
    ]
    losses = [-x.gather(-1, tokens[0, 1:, None]).mean() for x in (p, q)]
    candidate = report.candidates[0]
    assert report.baseline.perplexity == pytest.approx(math.exp(losses[0]), rel=CUT_NATS)
    assert candidate.perplexity == pytest.approx(math.exp(losses[1]), rel=CUT_NATS)
    assert candidate.ppl_increase_pct == pytest.approx(100 * math.expm1(losses[1] - losses[0]), abs=100 * CUT_NATS)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert candidate.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert candidate.kl_median == pytest.approx(float(np.median(divergence.numpy())), rel=1e-3)
    assert candidate.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.003)
    assert candidate.ppl_increase_ci95 is not None
    assert candidate.ppl_increase_ci95.low <= candidate.ppl_increase_pct <= candidate.ppl_increase_ci95.high


def test_a_short_text_has_no_interval(byte_model: Path, text_file: Path) -> None:
    report = compare(byte_model, [byte_model], text=text_file, tokens=50)
    assert report.to_json()["candidates"][0]["ppl_increase_ci95"] is None


def test_the_gate_fails_a_candidate_above_it_and_no_other(byte_model: Path, text_file: Path, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, vocab_size=256), seed=0)
    model.embeddings += 0.05 * torch.randn(model.embeddings.shape, generator=torch.Generator().manual_seed(1))
    worse = write_model(tmp_path / "worse", model)
    rise = compare(byte_model, [worse], text=text_file).candidates[0].ppl_increase_pct
    for gate, failed in ((rise + 0.01, False), (rise - 0.01, True)):
        report = compare(byte_model, [byte_model, worse], text=text_file, max_ppl_increase=gate)
        assert [candidate.gate_failed for candidate in report.candidates] == [rise - rise > gate, failed]
        assert report.gate_failed == report.to_json()["gate"]["failed"] == any(c.gate_failed for c in report.candidates)


def test_two_candidates_are_paired() -> None:
    generator = np.random.default_rng(0)
    text = np.exp(generator.standard_normal((1, 5120)))  # how hard the text is dwarfs the difference
    better = paired_difference(text * 0.9, text)
    assert better.mean == pytest.approx(-0.1 * text.mean())
    assert better.decided
    assert not paired_difference(text + generator.standard_normal(text.shape), text).decided
    with pytest.raises(InputError, match="cannot be paired"):
        paired_difference(text, text[:, :-1])


def test_models_that_cannot_be_compared(byte_model: Path, text_file: Path) -> None:
    with pytest.raises(InputError, match="no candidate"):
        compare(byte_model, [], text=text_file)
    with pytest.raises(InputError, match="not a number of per cent"):
        compare(byte_model, [byte_model], text=text_file, max_ppl_increase=float("nan"))
