# SPDX-License-Identifier: Apache-2.0
"""How sure a mean over a text is: neighbouring tokens are alike, so that windows are counted, not tokens.

A stream is cut into windows of `WINDOW` predicted tokens (the last may be shorter). A mean over tokens is a ratio of
two sums over windows, m = Σ s_i / Σ n_i, with

    standard error = √( w/(w−1) · Σ (s_i − m n_i)² ) / Σ n_i              (w windows; Cochran 1977, eq. 6.13)

Intervals are percentile bootstraps (Efron & Tibshirani 1993, ch. 13): windows are drawn with replacement, the same
draws for both sides of a comparison, so that it is paired. The seed is fixed: the same text gives the same interval.
"""

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 256
"""Predicted tokens a window."""
RESAMPLES = 2000
"""Bootstrap resamples: enough for two digits of a 95 % interval."""
_SEED = 0
_PERCENTILES = (2.5, 97.5)
_Z = 1.959964
"""The normal distribution's 97.5 % quantile."""


class Interval(NamedTuple):
    """A 95 % interval; [low, high] in JSON."""

    low: float
    high: float


def share_interval(counted: int, of: int) -> Interval:
    """95 % interval of a share of independent draws: Wilson's score interval (Wilson 1927; Brown et al. 2001, eq. 4).

    Args:
        counted: draws that count.
        of: all draws, at least 1.
    """
    share, z = counted / of, _Z**2 / of
    centre, half = share + z / 2, _Z * math.sqrt(share * (1 - share) / of + z / (4 * of))
    return Interval(max(0.0, (centre - half) / (1 + z)), min(1.0, (centre + half) / (1 + z)))


class Windows:
    """The windows of a passage of S streams with T predicted tokens each."""

    def __init__(self, streams: int, length: int, *, window: int = WINDOW) -> None:
        self._edges = np.arange(0, length, window)
        sizes = np.diff(self._edges, append=length)
        self.counts: NDArray[np.float64] = np.tile(sizes, streams).astype(np.float64)

    def sums(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """values [S, T] → their sum in every window [w]."""
        added: NDArray[np.float64] = np.add.reduceat(values.astype(np.float64), self._edges, axis=1)
        return added.reshape(-1)

    def standard_error(self, values: NDArray[np.float64]) -> float | None:
        """Standard error of the mean of values [S, T]; None where there is only one window."""
        w = len(self.counts)
        if w < 2:
            return None
        sums, total = self.sums(values), self.counts.sum()
        residual = sums - sums.sum() / total * self.counts
        return float(np.sqrt(w / (w - 1) * np.square(residual).sum()) / total)

    def resampled_means(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """Means [RESAMPLES] of values [S, T] over resampled windows; the draws are the same in every call."""
        draws = self._draws
        resampled: NDArray[np.float64] = (draws @ self.sums(values)) / (draws @ self.counts)
        return resampled

    def interval(self, values: NDArray[np.float64] | NDArray[np.bool_]) -> Interval | None:
        """95 % interval of the mean of values [S, T]; None where there is only one window."""
        return self.percentiles(self.resampled_means(values))

    def ratio_interval(self, values: NDArray[np.float64], to: NDArray[np.float64]) -> Interval | None:
        """95 % interval of mean(values) / mean(to), both [S, T]; None for one window, or where mean(to) may be 0."""
        below = self.resampled_means(to)
        return self.percentiles(self.resampled_means(values) / below) if below.all() else None

    def percentiles(self, statistic: NDArray[np.float64]) -> Interval | None:
        """95 % interval of a statistic computed from resampled means; None where there is only one window."""
        if len(self.counts) < 2:
            return None
        low, high = np.percentile(statistic, _PERCENTILES)
        return Interval(float(low), float(high))

    @cached_property
    def _draws(self) -> NDArray[np.float64]:
        """How often each window was drawn: [RESAMPLES, w]."""
        w = len(self.counts)
        return np.random.default_rng(_SEED).multinomial(w, np.full(w, 1 / w), size=RESAMPLES).astype(np.float64)
