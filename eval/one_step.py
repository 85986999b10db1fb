# SPDX-License-Identifier: Apache-2.0
"""Single steps of an artifact from the reference's own state, where no error can build up.

The reference walks along the text; at every position its state is written into the artifact, both advance by one token,
and KL(reference ‖ artifact) and the states after it are compared.

With quantized activations fp32 rounding decides about a code now and then (`mossquant.eval.noise`). Whether that is
what happened is tested: the reference repeats the step with noise before the codes. If rounding was it, some repetition
falls as the artifact did, and then agrees with it to `EXPLAINED_KL` and `EXPLAINED_STATE`; an error of arithmetic
agrees with none. Where a router nearly chose otherwise, rounding decides as well; such positions are known from the
reference alone.

A state that is rounded after every token falls the other way likewise, value by value, and no repetition finds the same
of thousands. It follows the step's output, so that nothing else moves with it: up to `TURNED_SHARE` of an array may lie
one step of its format off, and counts as equal. A fault in what decides the roundings turns half of it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant import divergence
from mossquant.divergence import Predictions
from mossquant.eval.noise import with_noise
from mossquant.formats.states import StateFormat
from mossquant.runner import Arrays, Floats, Runner, Tokens
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import streams

LANES = 8
"""Parts of the text that the reference walks side by side."""
STATES_AT_ONCE = 64
"""States that are written into the artifact at a time."""
VARIANTS = (16, 256)
"""Repetitions of a step with noise, the second number where the first did not do: k equal values of a block that lie
at a border fall together in one of k + 1, and a row may have such values in two of its blocks."""
EXPLAINED_KL = 1e-7
"""KL up to which two steps count as equal; what fp32 rounding leaves without such a code is below 1e-11."""
EXPLAINED_STATE = 1e-5
"""Relative difference of states up to which two steps count as equal; fp32 rounding leaves below 5e-6."""
TURNED_SHARE = 0.01
"""Of the values of a rounded state: so many may lie a step off. fp32 leaves 1e-7 of a value open, and more where terms
cancel; a step of fp16 is 5e-4 of it or more."""
TURNED_STEPS = 1.01
"""How far off such a value lies at most: a step, and the rounding of the scale."""
EXPLAINED_AT_MOST = 100
"""Positions that are repeated; the rest is not asked about."""


class OneStep(NamedTuple):
    """One value a position [n].

    Attributes:
        kl: KL(reference ‖ artifact), nats.
        margin: distance of the nearest router from another choice of experts.
        state_error: largest difference of a state array after the step ÷ largest value of that array.
        unexplained: 1 where the step differs (`EXPLAINED_KL`, `EXPLAINED_STATE`) and rounding before the codes does not
            explain it, else 0; NaN after `EXPLAINED_AT_MOST` repetitions.
    """

    kl: NDArray[np.float64]
    margin: NDArray[np.float64]
    state_error: NDArray[np.float64]
    unexplained: NDArray[np.float64]


def one_step(reference: TorchRunner, artifact: Runner, tokens: Tokens, *, positions: int) -> OneStep:
    """Compare single steps from the reference's own state at places spread evenly over tokens [T].

    Args:
        reference: gives the states.
        artifact: what is compared.
        tokens: the text.
        positions: wanted; `compared_positions` says how many it becomes.
    """
    together = min(STATES_AT_ONCE, artifact.info.max_batch or STATES_AT_ONCE)
    rounding = _Rounding(reference)
    parts = []
    walk = _walk(reference, tokens, *_lanes_and_steps(len(tokens), positions))
    for _, alike in groupby(walk, key=_Position.sizes):  # a state that grows: one length at a time
        while batch := list(islice(alike, together)):
            parts.append(_step(artifact, batch, rounding, reference.states))
    return OneStep(*map(np.concatenate, zip(*parts, strict=True)))


def compared_positions(length: int, positions: int) -> int:
    """How many positions are compared in a text of that length: those asked for, made up to whole lanes, or, where the
    text has hardly as many, all that fit into its lanes."""
    lanes, steps = _lanes_and_steps(length, positions)
    return lanes * steps


def _lanes_and_steps(length: int, positions: int) -> tuple[int, int]:
    lanes = min(LANES, positions, length // 2)
    return lanes, min(-(-positions // lanes), length // lanes)


class _Position(NamedTuple):
    """What the reference did at one position; every array has a batch axis of 1."""

    before: Arrays
    token: Tokens
    logits: Floats
    after: Arrays
    margin: Floats

    def sizes(self) -> list[tuple[int, ...]]:
        """Of the state arrays before the step."""
        return [value.shape for value in self.before.values()]


def _walk(reference: TorchRunner, tokens: Tokens, count: int, steps: int) -> Iterator[_Position]:
    """Advance the reference along `count` lanes of tokens [T], and stop in each at `steps` places."""
    lanes = streams(tokens, count)
    stride = lanes.shape[1] // steps
    state = reference.initial_state(count)
    for at in range(0, steps * stride, stride):
        if stride > 1:
            _, state = reference(lanes[:, at : at + stride - 1], state)
        before = reference.read(state)
        state = reference.write(before)  # both start from the same fp32 values
        here = lanes[:, at + stride - 1 : at + stride]
        logits, state, margins = reference.run_with_margins(here, state)
        after = reference.read(state)
        for lane in range(count):
            row = slice(lane, lane + 1)
            yield _Position(_rows(before, row), here[row], logits[row], _rows(after, row), margins[row, 0])


class _Rounding:
    """Repeats steps of the reference with noise before the codes."""

    def __init__(self, reference: TorchRunner) -> None:
        self._runner, self._states = with_noise(reference), reference.states
        self._left = EXPLAINED_AT_MOST

    def unexplained(self, position: _Position, logits: Floats, after: Arrays) -> float:
        """Whether no repetition is what the artifact computed, logits [1, 1, V] and states; NaN if none was made."""
        if self._runner is None:
            return 1.0
        if self._left == 0:
            return math.nan
        self._left -= 1
        for count in VARIANTS:
            state = self._runner.write({name: np.repeat(value, count, 0) for name, value in position.before.items()})
            repeated, state = self._runner(np.repeat(position.token, count, 0), state)
            found = np.repeat(logits, count, 0), {name: np.repeat(value, count, 0) for name, value in after.items()}
            if _equal(*_apart(repeated, self._runner.read(state), *found, self._states)).any():
                return 0.0
        return 1.0


def _apart(
    expected: Floats,
    expected_after: Arrays,
    found: Floats,
    found_after: Arrays,
    states: Mapping[str, StateFormat],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL of logits [n, 1, V], and largest relative difference of the states after them: [n], [n]."""
    error = np.zeros(len(expected))
    for name, value in expected_after.items():
        axes = tuple(range(1, value.ndim))
        largest = np.maximum(np.abs(value).max(axes, initial=0), np.finfo(np.float32).tiny)
        off = np.abs(found_after[name] - value)
        if (step := states[name].step) is not None:
            turned = (off > 0) & (off <= TURNED_STEPS * step(torch.from_numpy(value)).numpy())
            few = turned.mean(axes, keepdims=True) <= TURNED_SHARE
            off = np.where(turned & few, 0, off)
        error = np.maximum(error, off.max(axes, initial=0) / largest)
    return divergence.kl(Predictions(expected), Predictions(found))[:, 0], error


def _equal(kl: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.bool_]:
    # Written so that what is not a number is not equal.
    return (kl <= EXPLAINED_KL) & (error <= EXPLAINED_STATE)


def _rows(arrays: Arrays, rows: slice) -> Arrays:
    return {name: value[rows] for name, value in arrays.items()}


def _stack(parts: Sequence[Arrays]) -> dict[str, NDArray[np.float32]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _step(
    artifact: Runner, positions: Sequence[_Position], rounding: _Rounding, states: Mapping[str, StateFormat]
) -> OneStep:
    before, token, expected, after, margin = zip(*positions, strict=True)
    logits, state = artifact(np.concatenate(token), artifact.write(_stack(before)), logits="last")
    stepped = artifact.read(state)
    kl, error = _apart(np.concatenate(expected), _stack(after), logits, stepped, states)
    unexplained = np.zeros(len(positions))
    for i in map(int, np.flatnonzero(~_equal(kl, error))):
        row = slice(i, i + 1)
        unexplained[i] = rounding.unexplained(positions[i], logits[row], _rows(stepped, row))
    return OneStep(kl, np.concatenate(margin).astype(np.float64), error, unexplained)
