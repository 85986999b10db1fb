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
from mossquant.eval.windows import WINDOW
from mossquant.runner import Runner, Tokens

_SPLIT = (0, 1, 8, 72, 333, 777)
"""Where the calls of a split prefill begin."""


def growth(values: NDArray[np.float64], *, skip: int) -> tuple[float, float, int] | None:
    """Least squares slope of values [T] over position, of means of windows.

    One window, however large, moves such a slope by less than two of its standard errors.

    Args:
        values: one value a position.
        skip: positions left out at the beginning, where two runs from one state have not yet drifted apart.

    Returns:
        The change per 10,000 tokens, its standard error and the number of windows; None for fewer than three.
    """
    kept = values[skip:]
    windows = len(kept) // WINDOW
    if windows < 3:
        return None
    means = kept[: windows * WINDOW].reshape(windows, WINDOW).mean(1)
    position = np.arange(windows) * WINDOW / 10_000
    position -= position.mean()
    spread = np.square(position).sum()
    slope = position @ means / spread
    residual = means - means.mean() - slope * position
    return float(slope), float(np.sqrt(np.square(residual).sum() / (windows - 2) / spread)), windows


def forms(runner: Runner, tokens: Tokens, *, every: int, split: int) -> dict[str, NDArray[np.float64]]:
    """Read tokens [T] in other forms than one call: KL(one call ‖ other form) at every position.

    Args:
        runner: what reads.
        tokens: what is read.
        every: tokens that are read token by token.
        split: tokens that are read in uneven calls.
    """
    length = min(len(tokens), split)
    plans = {
        "token by token": list(range(min(length, every))),
        "split": [start for start in _SPLIT if start < length],
    }
    divergences = {}
    for name, starts in plans.items():
        stop = starts[-1] + 1 if name == "token by token" else length
        whole, _ = advance(runner, tokens[None, :stop], runner.initial_state(1), logits="all")
        state, parts = runner.initial_state(1), []
        for start, end in zip(starts, [*starts[1:], stop], strict=True):
            part, state = advance(runner, tokens[None, start:end], state, logits="all")
            parts.append(part[0])
        divergences[name] = divergence.kl(Predictions(whole[0]), Predictions(np.concatenate(parts)))
    return divergences


def continuation(runner: Runner, prompts: Tokens, *, steps: int) -> Tokens:
    """Continue prompts [B, T] greedily: [B, steps]."""
    logits, state = advance(runner, prompts, runner.initial_state(prompts.shape[0]))
    chosen = [logits[:, -1].argmax(-1)]
    for _ in range(steps - 1):
        logits, state = runner(chosen[-1][:, None].astype(np.int64), state, logits="last")
        chosen.append(logits[:, -1].argmax(-1))
    return np.stack(chosen, 1).astype(np.int64)
