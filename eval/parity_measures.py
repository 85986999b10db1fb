# SPDX-License-Identifier: Apache-2.0
"""Three ways to hold a running artifact against the reference; `mossquant.eval.parity` judges what they find.

Growth: whether the divergence of two free runs grows along the text.
Forms: the artifact reads the same tokens in one call, token by token, and in uneven calls.
Continuation: prompts are continued greedily.
"""

import numpy as np
from numpy.typing import NDArray

from mossquant import divergence
from mossquant.divergence import Predictions
from mossquant.eval.scores import advance
from mossquant.eval.windows import RESAMPLES, WINDOW, Interval
from mossquant.runner import Runner, Tokens

__all__ = ["continuation", "forms", "growth"]

_SPLIT = (0, 1, 8, 72)
"""Where the calls of a split prefill begin."""
_SEED = 0


def growth(values: NDArray[np.float64], *, skip: int) -> tuple[float, Interval] | None:
    """Least squares slope of values [T] over position, of means of windows, bootstrapped over windows.

    Args:
        values: one value a position.
        skip: positions left out at the beginning, where two runs from one state have not yet drifted apart.

    Returns:
        The change per 10,000 tokens, with its 95 % interval; None for fewer than three windows.
    """
    kept = values[skip:]
    windows = len(kept) // WINDOW
    if windows < 3:
        return None
    means = kept[: windows * WINDOW].reshape(windows, WINDOW).mean(1)
    position = np.arange(windows) * WINDOW / 10_000
    draws = np.random.default_rng(_SEED).integers(0, windows, (RESAMPLES, windows))
    x, y = position[draws], means[draws]
    x_centred = x - x.mean(1, keepdims=True)
    spread = np.square(x_centred).sum(1)
    slopes = (x_centred * y).sum(1)[spread > 0] / spread[spread > 0]
    centred = position - position.mean()
    low, high = np.percentile(slopes, (2.5, 97.5))
    return float(centred @ means / np.square(centred).sum()), Interval(float(low), float(high))


def forms(runner: Runner, tokens: Tokens) -> dict[str, NDArray[np.float64]]:
    """Read tokens [T] in one call, token by token and in uneven calls: KL(one call ‖ other form) at every position."""
    length = len(tokens)
    plans = {"token by token": list(range(length)), "split": [start for start in _SPLIT if start < length]}
    whole, _ = advance(runner, tokens[None], runner.initial_state(1), logits="all")
    original = Predictions(whole[0])
    divergences = {}
    for name, starts in plans.items():
        state, parts = runner.initial_state(1), []
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            part, state = advance(runner, tokens[None, start:stop], state, logits="all")
            parts.append(part[0])
        divergences[name] = divergence.kl(original, Predictions(np.concatenate(parts)))
    return divergences


def continuation(runner: Runner, prompts: Tokens, *, steps: int) -> Tokens:
    """Continue prompts [B, T] greedily: [B, steps]."""
    logits, state = advance(runner, prompts, runner.initial_state(prompts.shape[0]))
    chosen = [logits[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        logits, state = runner(chosen[-1][:, None].astype(np.int64), state, logits="last")
        chosen.append(logits[:, -1].argmax(-1))
    return np.stack(chosen, 1).astype(np.int64)
