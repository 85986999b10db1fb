# SPDX-License-Identifier: Apache-2.0
"""Runs models in lockstep over the same tokens and keeps one number a token: the one loop behind every measurement.

Logits are not kept: a piece of every stream goes through the original and each candidate, at most `LOGITS_BYTES` of
logits are held, and what remains are nats a token. The pieces depend on the number of streams, the vocabulary and what
the Runners can take, and change results by rounding only.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mossquant import divergence
from mossquant.divergence import Predictions
from mossquant.errors import InputError
from mossquant.progress import Progress
from mossquant.runner import Floats, LogitsWanted, Runner, State, Tokens

LOGITS_BYTES = 256_000_000
"""Most memory for logits at a time, of all Runners together."""

MOST_NATS = 300.0
"""Largest mean loss of a piece: exp(709) is the largest number, and a window may lose twice its piece's mean."""

PIECE = 512
"""Most tokens of a stream that go through a model in one call."""

# Logits whose float64 log probabilities are worked on at a time, so that they stay in the cache of a core.
_BLOCK_LOGITS = 1 << 17


@dataclass(frozen=True)
class Scores:
    """What one Runner made of tokens [S, L]; every array is [S, L − 1], one value a predicted token.

    Attributes:
        nll: −log p of the token that came, nats.
        kl: KL(original ‖ this), nats; zeros for the original itself.
        agree: whether this and the original find the same token most likely.
    """

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]


def score(
    runners: Sequence[Runner], tokens: Tokens, *, at_once: int = 1, progress: Progress | None = None
) -> list[Scores]:
    """Run every Runner over tokens [S, L] from its initial state, each stream by itself.

    Args:
        runners: the original first, then the candidates.
        tokens: [S, L], L ≥ 2.
        at_once: Runners that work at the same time, each in a thread of its own; changes no result.
        progress: told after every piece, in tokens.

    Returns:
        One `Scores` for each Runner.

    Raises:
        InputError: a Runner computed logits that are not finite, or lost more than `MOST_NATS` a token.
    """
    total, length = tokens.shape[0], tokens.shape[1] - 1
    shape = (total, length)
    scores = [Scores(np.zeros(shape), np.zeros(shape), np.ones(shape, np.bool_)) for _ in runners]
    batches = [runner.info.max_batch or total for runner in runners]
    seconds, states = [0.0] * len(runners), list[State]()
    with ThreadPoolExecutor(at_once) as pool:
        for part, span in pieces(shape, runners[0].info.vocab_size, held=len(runners), max_batch=min(batches)):
            if span.start == 0:
                states = [runner.initial_state(part.stop - part.start) for runner in runners]
            # The slowest begins first, so that no core waits for it in the end.
            order = sorted(range(len(runners)), key=seconds.__getitem__, reverse=True)
            calls = {i: pool.submit(_timed_advance, runners[i], tokens[part, span], states[i]) for i in order}
            logits, states, seconds = map(list, zip(*(calls[i].result() for i in sorted(calls)), strict=True))
            _keep(pool, scores, logits, tokens[part, span.start + 1 : span.stop + 1], part, span)
            _check_losses(runners, scores, part, span)
            if progress is not None:
                progress("tokens", read_by(shape, part, span), total * length)
    return scores


def pieces(shape: tuple[int, int], vocab_size: int, *, held: int, max_batch: int) -> Iterator[tuple[slice, slice]]:
    """(streams, tokens) that go through the models in one call; the streams' states begin where tokens begin at 0.

    Args:
        shape: streams, and tokens that each predicts.
        vocab_size: V.
        held: arrays of logits that are held at a time.
        max_batch: most streams in one call.
    """
    total, length = shape
    rows = max(1, LOGITS_BYTES // (4 * held * vocab_size))
    together = min(total, rows, max_batch)
    piece = max(1, min(PIECE, rows // together))
    for first in range(0, total, together):
        for start in range(0, length, piece):
            yield slice(first, min(first + together, total)), slice(start, min(start + piece, length))


def read_by(shape: tuple[int, int], part: slice, span: slice) -> int:
    """Tokens that were read when a piece is done."""
    done: int = part.start * shape[1] + (part.stop - part.start) * span.stop
    return done


def _timed_advance(runner: Runner, tokens: Tokens, state: State) -> tuple[Floats, State, float]:
    begun = time.perf_counter()
    logits, state = advance(runner, tokens, state, logits="all")
    return logits, state, time.perf_counter() - begun


def _keep(
    pool: Executor, scores: Sequence[Scores], logits: Sequence[Floats], targets: Tokens, part: slice, span: slice
) -> None:
    """What remains of one piece: logits [B, T, V] of every Runner and the tokens that came [B, T]."""
    batch, time_steps, vocab_size = logits[0].shape
    step = max(1, _BLOCK_LOGITS // vocab_size)

    def keep_block(row: int, at: int) -> None:
        block = slice(at, min(at + step, time_steps))
        place = (part.start + row, slice(span.start + block.start, span.start + block.stop))
        original = Predictions(logits[0][row, block])
        scores[0].nll[place] = divergence.nll(original, targets[row, block])
        for candidate_scores, candidate_logits in zip(scores[1:], logits[1:], strict=True):
            candidate = Predictions(candidate_logits[row, block])
            candidate_scores.nll[place] = divergence.nll(candidate, targets[row, block])
            candidate_scores.kl[place] = divergence.kl(original, candidate)
            candidate_scores.agree[place] = divergence.agreement(original, candidate)

    blocks = product(range(batch), range(0, time_steps, step))
    for kept in [pool.submit(keep_block, *block) for block in blocks]:
        kept.result()


def divergences(original: Floats, candidate: Floats) -> NDArray[np.float64]:
    """KL(original ‖ candidate) of logits [B, T, V] in nats [B, T], some positions at a time."""
    found = np.empty(original.shape[:2])
    step = max(1, _BLOCK_LOGITS // original.shape[2])
    for row, at in product(range(original.shape[0]), range(0, original.shape[1], step)):
        place = row, slice(at, at + step)
        found[place] = divergence.kl(Predictions(original[place]), Predictions(candidate[place]))
    return found


def _check_losses(runners: Sequence[Runner], scores: Sequence[Scores], part: slice, span: slice) -> None:
    for runner, own in zip(runners, scores, strict=True):
        lost = own.nll[part, span]
        if not np.isfinite(lost).all():
            raise InputError(not_finite(runner, span.start))
        if lost.mean() > MOST_NATS:
            loss = f"{lost.mean():.0f} nats a token at token {span.start} of a stream"
            raise InputError(f"{runner.info.path} loses {loss}, which no model does; its weights are damaged")


def not_finite(runner: Runner, token: int) -> str:
    """What to say where a Runner's logits are not finite."""
    return (
        f"{runner.info.path} computed logits that are not finite at token {token} of a stream; "
        "its weights or its activation format do not hold this model"
    )


def advance(runner: Runner, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
    """One call of a Runner, in as many pieces as its `max_chunk` asks for."""
    limit = max(1, runner.info.max_chunk or tokens.shape[1])
    parts: list[Floats] = []
    for start in range(0, max(1, tokens.shape[1]), limit):
        part, state = runner(tokens[:, start : start + limit], state, logits=logits)
        parts = [*parts, part] if logits == "all" else [part]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts, 1)), state
