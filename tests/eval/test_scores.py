# SPDX-License-Identifier: Apache-2.0
"""The loop behind every measurement: against probabilities worked out directly, and independent of how it is cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import CUT_NATS
from numpy.typing import NDArray

from mossquant.errors import InputError
from mossquant.eval import scores
from mossquant.eval.open import open_runner
from mossquant.eval.scores import advance, score
from mossquant.runner import Runner
from mossquant.targets.torch.runner import TorchRunner


def _tokens(streams: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 256, (streams, length), np.int64)


def test_nll_is_that_of_the_whole_stream_in_one_float64_pass(byte_model: Path) -> None:
    tokens = _tokens(2, 90)
    losses = score([open_runner(byte_model)], tokens)[0]
    exact = TorchRunner.open(byte_model, dtype=torch.float64, scan="sequential")
    logits, _ = exact(tokens[:, :-1], exact.initial_state(2), logits="all")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, tokens[:, 1:, None], -1)[..., 0])
    assert losses.nll.shape == (2, 89)
    np.testing.assert_allclose(losses.nll, expected, rtol=0, atol=CUT_NATS)
    assert not losses.kl.any()
    assert losses.agree.all()


def test_a_stream_does_not_see_the_others(byte_model: Path) -> None:
    tokens = _tokens(3, 40)
    runner = open_runner(byte_model)
    together = score([runner], tokens)[0].nll
    apart = np.concatenate([score([runner], tokens[i : i + 1])[0].nll for i in range(3)])
    np.testing.assert_allclose(together, apart, rtol=0, atol=CUT_NATS)


@pytest.mark.parametrize(("piece", "logits_bytes"), [(1, 256_000_000), (7, 256_000_000), (512, 40_000)])
def test_the_cut_changes_rounding_only(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, piece: int, logits_bytes: int
) -> None:
    tokens = _tokens(4, 60)
    runners = [open_runner(byte_model), open_runner(byte_model)]
    whole = score(runners, tokens)
    monkeypatch.setattr(scores, "PIECE", piece)
    monkeypatch.setattr(scores, "LOGITS_BYTES", logits_bytes)
    cut = score(runners, tokens)
    np.testing.assert_allclose(cut[0].nll, whole[0].nll, rtol=0, atol=CUT_NATS)
    assert not cut[1].kl.any()


def test_logits_held_at_a_time_stay_below_the_limit(byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_runner(byte_model)
    largest = 0

    def watched(runner: Runner, tokens: NDArray[np.int64], state: object, *, logits: str) -> object:
        nonlocal largest
        largest = max(largest, tokens.size * 256)
        return advance(runner, tokens, state, logits=logits)  # type: ignore[arg-type]

    monkeypatch.setattr(scores, "advance", watched)
    monkeypatch.setattr(scores, "LOGITS_BYTES", 100_000)
    score([runner, runner], _tokens(3, 50))
    assert 0 < 2 * 4 * largest <= 100_000


def test_a_candidate_is_held_against_the_first(byte_model: Path, other_byte_model: Path) -> None:
    tokens = _tokens(1, 60)
    original, near = score([open_runner(byte_model), open_runner(other_byte_model)], tokens)
    assert 0 < near.kl.mean() < 1
    assert abs(near.nll.mean() - original.nll.mean()) < 1
    assert 0 < near.agree.mean() <= 1


def test_progress_ends_with_all(byte_model: Path) -> None:
    told: list[tuple[int, int]] = []
    score([open_runner(byte_model)], _tokens(2, 30), progress=lambda _, done, of: told.append((done, of)))
    assert told[-1] == (58, 58)


def test_logits_that_are_not_finite_are_refused(byte_model: Path) -> None:
    runner = TorchRunner.open(byte_model)
    runner.model.norm_f.detach()[:] = float("nan")
    with pytest.raises(InputError, match="not finite at token 0"):
        score([runner], _tokens(1, 5))


def test_a_loss_that_no_model_has_is_refused(byte_model: Path) -> None:
    """It would be a perplexity beyond the largest number."""
    runner = TorchRunner.open(byte_model)
    runner.model.norm_f.detach().mul_(1e6)
    with pytest.raises(InputError, match=r"loses \d+ nats a token at token 0 of a stream"):
        score([runner], _tokens(1, 5))


def test_max_batch_and_max_chunk_are_kept(byte_model: Path) -> None:
    tokens = _tokens(3, 30)
    plain = score([open_runner(byte_model)], tokens)[0].nll
    limited = score([_Limited(byte_model)], tokens)[0].nll
    np.testing.assert_allclose(limited, plain, rtol=0, atol=CUT_NATS)


class _Limited:
    """A Runner that takes two streams and four tokens at most."""

    def __init__(self, path: Path) -> None:
        from dataclasses import replace

        self._inner = TorchRunner.open(path)
        self.info = replace(self._inner.info, max_batch=2, max_chunk=4)
        self.initial_state = self._inner.initial_state

    def __call__(self, tokens: NDArray[np.int64], state: object, *, logits: str = "last") -> object:
        assert tokens.shape[0] <= 2
        assert tokens.shape[1] <= 4
        return self._inner(tokens, state, logits=logits)  # type: ignore[arg-type]
