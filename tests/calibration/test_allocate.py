# SPDX-License-Identifier: Apache-2.0
"""Allocation against every choice there is, on problems small enough to try them all."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mossquant.calibration.allocate import Choice, Option, choose, frontier

SAME = 1e-9
"""Sums of the same few losses in another order."""


def problem(groups: int, options: int, seed: int) -> list[list[Option]]:
    """Like ours: more bytes lose less, by about a factor sixteen for twice the bytes; sometimes not."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(groups):
        weights, sensitivity = int(random.integers(100, 100_000)), random.lognormal(0, 2)
        bits = [4.125, 4.5, 8.1, 8.5, 16.0][:options]
        losses = [sensitivity * 4.0**-b * random.lognormal(0, 0.3) for b in bits]
        made.append([Option(f"{b}", int(weights * b / 8), loss) for b, loss in zip(bits, losses, strict=True)])
    return made


def every_choice(groups: list[list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.cost for o in picked), sum(o.loss for o in picked)) for picked in product(*groups)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.9])
def test_the_choice_is_the_best_of_all(seed: int, share: float) -> None:
    groups = problem(6, 4, seed)
    everything = every_choice(groups)
    low, high = min(size for size, _ in everything), max(size for size, _ in everything)
    budget = low + share * (high - low)
    chosen = choose(groups, cost_at_most=budget)
    assert chosen is not None
    assert chosen.gap == 0
    assert chosen.cost <= budget
    best = min(loss for size, loss in everything if size <= budget)
    assert chosen.loss == pytest.approx(best, rel=SAME)
    smallest = choose(groups, cost_at_most=np.inf, loss_at_most=best * (1 + SAME))
    assert smallest is not None
    assert smallest.cost == min(size for size, loss in everything if loss <= best * (1 + SAME))


@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_is_the_hull_of_all_choices(seed: int) -> None:
    groups = problem(5, 4, seed)
    everything, found = every_choice(groups), frontier(groups)
    assert_monotone(found)
    assert found[0].cost == min(size for size, _ in everything)
    assert found[-1].loss == pytest.approx(min(loss for _, loss in everything), rel=SAME)
    for before, after in pairwise(found):
        price = (before.loss - after.loss) / (after.cost - before.cost)
        least = min(loss + price * size for size, loss in everything)
        for choice in (before, after):
            assert choice.loss + price * choice.cost == pytest.approx(least, rel=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_no_worse_than_the_frontier_and_uniform_formats(seed: int, groups: int, options: int) -> None:
    made = problem(groups, options, seed)
    found = frontier(made)
    assert_monotone(found)
    uniform = [[pick] * groups for pick in range(options)]
    sums = [sum(o[p[0]].cost for o, p in zip(made, [p] * groups, strict=True)) for p in uniform]
    for pick, size in zip(range(options), sums, strict=True):
        chosen = choose(made, cost_at_most=size)
        assert chosen is not None
        assert chosen.loss <= sum(options[pick].loss for options in made) * (1 + SAME)
        within = [choice.loss for choice in found if choice.cost <= size]
        assert not within or chosen.loss <= min(within) * (1 + SAME)


def test_what_cannot_be_is_said() -> None:
    groups = problem(3, 2, 0)
    assert choose(groups, cost_at_most=min(o.cost for o in groups[0])) is None
    assert choose(groups, cost_at_most=np.inf, loss_at_most=0) is None


def test_a_model_of_two_hundred_groups_is_solved() -> None:
    groups = problem(200, 5, 1)
    low, high = frontier(groups)[0].cost, frontier(groups)[-1].cost
    chosen = choose(groups, cost_at_most=low + 0.1 * (high - low))
    assert chosen is not None
    assert chosen.gap <= 1e-3
    above = [choice for choice in frontier(groups) if choice.cost > chosen.cost]
    assert chosen.loss >= above[-1].loss


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """The library prints a line of its own now and then, past Python."""
    for seed in range(6):
        groups = problem(100, 5, seed)
        low, high = frontier(groups)[0].cost, frontier(groups)[-1].cost
        assert choose(groups, cost_at_most=low + 0.1 * (high - low)) is not None
    assert capfd.readouterr().out == ""


def assert_monotone(choices: list[Choice]) -> None:
    for before, after in pairwise(choices):
        assert after.cost > before.cost
        assert after.loss < before.loss
