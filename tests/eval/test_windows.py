# SPDX-License-Identifier: Apache-2.0
"""Windows, standard errors and intervals: by hand, and by how often they hold what they should."""

import math

import numpy as np
import pytest

from mossquant.eval.windows import Windows, share_interval


def test_sums_and_counts_by_hand() -> None:
    windows = Windows(2, 5, window=2)
    assert windows.counts.tolist() == [2, 2, 1, 2, 2, 1]
    values = np.array([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50]])
    assert windows.sums(values).tolist() == [3, 7, 5, 30, 70, 50]


def test_standard_error_by_hand() -> None:
    # Window means 1 and 3 of equal size: the usual s/√w = √2/√2.
    assert Windows(1, 4, window=2).standard_error(np.array([[1.0, 1, 3, 3]])) == pytest.approx(1.0)


def test_one_window_gives_no_interval() -> None:
    windows = Windows(1, 5, window=8)
    values = np.arange(5.0)[None]
    assert windows.standard_error(values) is None
    assert windows.interval(values) is None


def test_the_same_values_give_the_same_interval_and_the_draws_are_paired() -> None:
    values = np.random.default_rng(0).standard_normal((2, 900))
    windows = Windows(2, 900)
    assert windows.interval(values) == windows.interval(values.copy())
    difference = windows.resampled_means(values + 1.0) - windows.resampled_means(values)
    np.testing.assert_allclose(difference, 1.0, atol=1e-12)


def test_windows_of_like_values_are_less_sure_than_tokens() -> None:
    level = np.repeat(np.random.default_rng(1).standard_normal(40), 256)[None]
    error = Windows(1, level.size).standard_error(level)
    assert error is not None
    assert error > 10 * level.std() / math.sqrt(level.size)


def test_intervals_hold_the_mean_about_as_often_as_they_say() -> None:
    generator, held, errors = np.random.default_rng(2), 0, []
    windows = Windows(1, 60 * 16, window=16)
    for _ in range(200):
        values = np.repeat(generator.standard_normal(60), 16)[None] + generator.standard_normal((1, 960))
        interval = windows.interval(values)
        assert interval is not None
        held += interval.low <= 0 <= interval.high
        errors.append(windows.standard_error(values))
    # 95 % of 200 is 190; a percentile bootstrap of 60 windows is a little narrow, and ±4 is one standard deviation.
    assert 178 <= held <= 199
    assert np.mean(errors) == pytest.approx(math.sqrt((1 + 1 / 16) / 60), rel=0.05)


def test_the_interval_of_a_ratio_is_paired() -> None:
    cost = np.random.default_rng(3).gamma(1.0, size=(1, 3000))
    windows = Windows(1, 3000)
    # Half of it everywhere is surely half of it; half of it on the whole is not sure at all.
    exact = windows.ratio_interval(cost / 2, cost)
    assert exact is not None
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5))
    loose = windows.ratio_interval(cost[:, ::-1].copy() / 2, cost)
    assert loose is not None
    assert loose.low < 0.49 < 0.51 < loose.high
    assert Windows(1, 5, window=8).ratio_interval(np.ones((1, 5)), np.ones((1, 5))) is None


def test_the_interval_of_a_share_holds_it_about_as_often_as_it_says() -> None:
    # For 0 of n the bounds are 0 and z²/(n + z²).
    none = share_interval(0, 100)
    assert none.low == 0
    assert (share_interval(0, 2003).low, share_interval(100, 100).high) == (0, 1), "of rounding, no share is beyond"
    assert none.high == pytest.approx(1.959964**2 / (100 + 1.959964**2))
    drawn = np.random.default_rng(4).binomial(2000, 0.02, 2000)
    held = sum(interval.low <= 0.02 <= interval.high for interval in (share_interval(int(n), 2000) for n in drawn))
    # 1,900 expected; a binomial jumps, ±30 is three standard deviations.
    assert 1860 <= held <= 1940
