# SPDX-License-Identifier: Apache-2.0
"""Single steps of an artifact from the reference's own state, where no error can build up.

The reference walks along the text; at every position its state is written into the artifact, both advance by one token,
and KL(reference ‖ artifact) and the states after it are compared.

With quantized activations fp32 rounding decides about a code now and then (`mossquant.eval.noise`). Whether that is
what happened is tested: the reference repeats the step with noise before the codes. If rounding was it, some repetition
falls as the artifact did, and then agrees with it to `EXPLAINED_KL`; an error of arithmetic agrees with none. Where a
router nearly chose otherwise, rounding decides as well; such positions are known from the reference alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mossquant import divergence
from mossquant.divergence import Predictions
from mossquant.eval.noise import with_noise
from mossquant.runner import Arrays, Floats, Runner, Tokens
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import streams

__all__ = ["EXPLAINED_KL", "OneStep", "compared_positions", "one_step"]

LANES = 8
"""Parts of the text that the reference walks side by side."""
STATES_AT_ONCE = 64
"""States that are written into the artifact at a time."""
VARIANTS = (16, 64)
"""Repetitions of a step with noise, the second number where the first did not do; a code at the border falls the other
way in about every third."""
EXPLAINED_KL = 1e-7
"""KL up to which two steps count as equal; what fp32 rounding leaves without such a code is below 1e-11."""
EXPLAINED_AT_MOST = 600
"""Positions that are repeated; where more differ, rounding is not what is wrong, and the rest counts as unexplained."""


@dataclass(frozen=True)
class OneStep:
    """One value a position [n].

    Attributes:
        kl: KL(reference ‖ artifact), nats.
        margin: distance of the nearest router from another choice of experts.
        state_error: largest difference of a state array after the step ÷ largest value of that array.
        unexplained: the KL is above `EXPLAINED_KL`, and rounding before the codes does not explain it.
    """

    kl: NDArray[np.float64]
    margin: NDArray[np.float64]
    state_error: NDArray[np.float64]
    unexplained: NDArray[np.bool_]


def one_step(reference: TorchRunner, artifact: Runner, tokens: Tokens, *, positions: int) -> OneStep:
    """Compare single steps from the reference's own state at places spread evenly over tokens [T].

    Args:
        reference: gives the states.
        artifact: what is compared.
        tokens: the text.
        positions: wanted; `compared_positions` says how many it becomes.
    """
    count, steps = _lanes_and_steps(len(tokens), positions)
    lanes = streams(tokens, count)
    stride = lanes.shape[1] // steps
    state = reference.initial_state(count)
    pending: list[_Position] = []
    parts: list[OneStep] = []
    together = min(STATES_AT_ONCE, artifact.info.max_batch or STATES_AT_ONCE)
    rounding = _Rounding(reference)
    for at in range(0, steps * stride, stride):
        if stride > 1:
            _, state = reference(lanes[:, at : at + stride - 1], state)
        before = reference.read(state)
        state = reference.write(before)  # both start from the same fp32 values
        here = lanes[:, at + stride - 1 : at + stride]
        logits, state, margins = reference.run_with_margins(here, state)
        after = reference.read(state)
        if pending and _sizes(pending[0].before) != _sizes(before):  # a state that grows: one length at a time
            parts.append(_step(artifact, pending, rounding))
            pending.clear()
        for lane in range(count):
            row = slice(lane, lane + 1)
            pending.append(_Position(_rows(before, row), here[row], logits[row], _rows(after, row), margins[row, 0]))
        while len(pending) >= together:
            parts.append(_step(artifact, pending[:together], rounding))
            del pending[:together]
    if pending:
        parts.append(_step(artifact, pending, rounding))
    return OneStep(
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.margin for part in parts]),
        np.concatenate([part.state_error for part in parts]),
        np.concatenate([part.unexplained for part in parts]),
    )


def compared_positions(length: int, positions: int) -> int:
    """How many positions are compared in a text of that length: those asked for, made up to whole lanes, or, where the
    text has hardly as many, all that fit into its lanes."""
    count, steps = _lanes_and_steps(length, positions)
    return count * steps


def _lanes_and_steps(length: int, positions: int) -> tuple[int, int]:
    count = min(LANES, positions, length // 2)
    return count, min(-(-positions // count), length // count)


@dataclass(frozen=True)
class _Position:
    """What the reference did at one position; every array has a batch axis of 1."""

    before: Arrays
    token: Tokens
    logits: Floats
    after: Arrays
    margin: Floats


class _Rounding:
    """Repeats steps of the reference with noise before the codes."""

    def __init__(self, reference: TorchRunner) -> None:
        self._runner = with_noise(reference)
        self._left = EXPLAINED_AT_MOST

    def explains(self, position: _Position, logits: Floats) -> bool:
        """Whether one of the repetitions is what the artifact computed, logits [V]."""
        if self._runner is None or self._left == 0:
            return False
        self._left -= 1
        artifact = Predictions(logits[None])
        for count in VARIANTS:
            state = self._runner.write({name: np.repeat(value, count, 0) for name, value in position.before.items()})
            repeated, _ = self._runner(np.repeat(position.token, count, 0), state)
            if (divergence.kl(Predictions(repeated[:, 0]), artifact) <= EXPLAINED_KL).any():
                return True
        return False


def _rows(arrays: Arrays, rows: slice) -> Arrays:
    return {name: value[rows] for name, value in arrays.items()}


def _sizes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [value.shape[1:] for value in arrays.values()]


def _stack(parts: Sequence[Arrays]) -> dict[str, NDArray[np.float32]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _step(artifact: Runner, positions: Sequence[_Position], rounding: _Rounding) -> OneStep:
    state = artifact.write(_stack([position.before for position in positions]))
    logits, state = artifact(np.concatenate([position.token for position in positions]), state, logits="last")
    original = Predictions(np.concatenate([position.logits for position in positions]))
    kl = divergence.kl(original, Predictions(logits))[:, 0]
    after, expected = artifact.read(state), _stack([position.after for position in positions])
    error = np.zeros(len(positions))
    for name, value in expected.items():
        axes = tuple(range(1, value.ndim))
        largest = np.maximum(np.abs(value).max(axes, initial=0), np.finfo(np.float32).tiny)
        error = np.maximum(error, np.abs(after[name] - value).max(axes, initial=0) / largest)
    margin = np.concatenate([position.margin for position in positions]).astype(np.float64)
    # Written so that a KL that is not a number is unexplained too.
    unexplained = np.array(
        [
            not kl[i] <= EXPLAINED_KL and not rounding.explains(position, logits[i, 0])
            for i, position in enumerate(positions)
        ]
    )
    return OneStep(kl, margin, error, unexplained)
