# SPDX-License-Identifier: Apache-2.0
"""Choosing one format for each group, so that the predicted loss is least at some cost.

    minimize Σ_g loss[g, c_g]   subject to   Σ_g cost[g, c_g] ≤ B        (multiple-choice knapsack)

The frontier is the one of the Lagrangian, loss + λ · cost for every λ: the lower convex hulls of all groups, their
steps taken by falling gain for their cost (Shoham & Gersho 1988). Near a budget the choice is exact, by branch and cut
(HiGHS).
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

_NODES = 100_000
"""Branches that the exact choice may take; then the best one so far is taken, with the gap that is left."""
_SCALE = 1e4
"""The frontier's objective in the solver's units: it stops within 1e-6 of the least, whatever is asked of it."""


@dataclass(frozen=True)
class Option:
    """One format for one group.

    Attributes:
        storage: its name.
        cost: bytes, or nanoseconds of a token.
        loss: predicted; not negative, in nats a token or in any unit.
    """

    storage: str
    cost: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """A format for each group.

    Attributes:
        picks: index of each group's option.
        cost: of all groups.
        loss: Σ of the options' losses.
        gap: the loss is at most this share above the least one that is possible; 0 where it is proved to be the least.
    """

    picks: tuple[int, ...]
    cost: int
    loss: float
    gap: float = 0.0


def frontier(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """The choices that some λ makes best, from least cost to least loss: costs rise, losses fall, strictly."""
    hulls = [_hull(options) for options in groups]
    picks = [hull[0] for hull in hulls]
    steps = []
    for group, hull in enumerate(hulls):
        for low, high in pairwise(hull):
            before, after = groups[group][low], groups[group][high]
            gain = (before.loss - after.loss) / (after.cost - before.cost)
            steps.append((-gain, group, high))
    choices = [_choice(groups, picks)]
    # A hull's own steps have falling gains, so that sorting keeps their order.
    for _, group, high in sorted(steps):
        picks[group] = high
        choices.append(_choice(groups, picks))
    return choices


def choose(
    groups: Sequence[Sequence[Option]], *, cost_at_most: float, loss_at_most: float | None = None
) -> Choice | None:
    """The choice of least loss at that cost; with `loss_at_most`, the cheapest one that keeps it.

    Returns None where no choice does.
    """
    spare = frontier(groups)
    if loss_at_most is None:
        kept = [choice for choice in spare if choice.cost <= cost_at_most]
        best, bound = kept[-1:], cost_at_most
    else:
        kept = [choice for choice in spare if choice.loss <= loss_at_most and choice.cost <= cost_at_most]
        best, bound = kept[:1], loss_at_most
    if not best:
        return None
    # (what is to be small, what is bounded) of every option. One that is no part of a better choice than the frontier's
    # is left out: what remains lies near in size, and the solver's tolerances are absolute.
    pairs = [
        (option.loss, option.cost) if loss_at_most is None else (option.cost, option.loss)
        for own in groups
        for option in own
    ]
    owner = [group for group, options in enumerate(groups) for _ in options]
    known = best[0].loss if loss_at_most is None else float(best[0].cost)
    left = [index for index, (cost, use) in enumerate(pairs) if cost <= known and use <= bound]
    costs = np.array([pairs[index][0] for index in left]) / (known or 1.0)
    uses = np.array([pairs[index][1] for index in left], np.float64) / (bound if np.isfinite(bound) and bound else 1.0)
    rows, columns = [owner[index] for index in left], np.arange(len(left))
    one_each = LinearConstraint(
        coo_array((np.ones(len(left)), (rows, columns)), (len(groups), len(left))).tocsr(), 1, 1
    )
    limit = LinearConstraint(uses[None], -np.inf, 1.0 if np.isfinite(bound) else np.inf)
    with _nothing_on_stdout():
        solved = milp(
            costs * _SCALE,
            integrality=np.ones(len(left)),
            bounds=Bounds(0, 1),
            constraints=[one_each, limit],
            options={"mip_rel_gap": 0.0, "node_limit": _NODES},
        )
    if solved.x is None:
        return replace(best[0], gap=1.0)
    taken = {owner[index]: index for index, share in zip(left, solved.x, strict=True) if share > 0.5}
    first = np.cumsum([0, *map(len, groups)])
    found = _choice(groups, [taken[group] - int(first[group]) for group in range(len(groups))])
    gap = 0.0 if solved.status == 0 else float(solved.mip_gap)
    cost, own = (found.loss, best[0].loss) if loss_at_most is None else (found.cost, best[0].cost)
    if cost >= own:
        return replace(best[0], gap=gap)
    # The solver keeps a bound within its tolerance only, and a budget is kept exactly.
    if found.cost > cost_at_most or (loss_at_most is not None and found.loss > loss_at_most):
        return replace(best[0], gap=own / cost - 1)
    return replace(found, gap=gap)


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Keep off the process's stdout what HiGHS prints there past Python, though asked for nothing: results go there."""
    buffered = ctypes.CDLL(None).fflush
    try:
        sys.stdout.flush()
        before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):  # there is none
        yield
        return
    try:
        buffered(None)
        os.dup2(nowhere, 1)
        yield
    finally:
        buffered(None)
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of loss over cost, from least cost to least loss."""
    order = sorted(range(len(options)), key=lambda index: (options[index].cost, options[index].loss))
    hull: list[int] = []
    for index in order:
        option = options[index]
        if hull and option.loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _above(options[hull[-2]], options[hull[-1]], option):
            hull.pop()
        if hull and options[hull[-1]].cost == option.cost:
            hull.pop()
        hull.append(index)
    return hull


def _above(before: Option, middle: Option, after: Option) -> bool:
    """Whether the one in the middle lies on or above the line between the others."""
    return (before.loss - middle.loss) * (after.cost - before.cost) <= (before.loss - after.loss) * (
        middle.cost - before.cost
    )


def _choice(groups: Sequence[Sequence[Option]], picks: Sequence[int]) -> Choice:
    picked = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return Choice(tuple(picks), sum(option.cost for option in picked), sum(option.loss for option in picked))
