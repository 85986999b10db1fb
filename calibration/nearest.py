# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest solvers: find the scales of a matrix; codes are then its values rounded to nearest.

    nearest      s = max|w| / code_max over the group (row): nothing is clipped
    nearest-mse  s minimises Σ h (w − s · q(w / s))² over the group (h = 1, or a weight for each column), among
                 1. the scale of `nearest`, so that no group comes out worse,
                 2. that scale times a grid of ratios (clipping the largest values; for 4 bits 7/8 puts −max on −8),
                 3. three rounds of least squares from the best so far: s = ⟨w, h q⟩ / ⟨q, h q⟩, then codes anew.

Every candidate is rounded to the stored scale type before it is judged, so what is judged is what is stored. Sums run
in a fixed order of additions, whatever the machine's vectors and threads: the same weights give the same bytes.
Clipping by mean squared error: Sung, Shin & Hwang 2015 (arXiv 1511.06488), sec. 3; per group.
"""

from functools import partial

import torch
from torch import Tensor

from mossquant.calibration.solver import Solver
from mossquant.formats import NumberFormat, QuantizedTensor

# 4-bit groups clip deep; 8-bit groups gain from where the steps happen to fall.
_RATIOS = {
    4: tuple(hundredths / 100 for hundredths in range(40, 108, 2)),
    8: tuple(thousandths / 1000 for thousandths in range(700, 1020, 8)),
}
_ROUNDS = 3


def nearest(number_format: NumberFormat, matrix: Tensor) -> QuantizedTensor:
    """Scale = largest absolute value / code_max."""
    return number_format.quantize(matrix, number_format.absmax_scales(matrix))


def nearest_mse(number_format: NumberFormat, matrix: Tensor, weights: Tensor | None = None) -> QuantizedTensor:
    """Clip each group (row) by least squares; positive `weights` [columns] say what an error of a column costs."""
    return number_format.quantize(matrix, mse_scales(number_format, matrix, weights))


def mse_scales(number_format: NumberFormat, matrix: Tensor, weights: Tensor | None = None) -> Tensor:
    """The scales of `nearest_mse`, [rows, groups] in the stored type."""
    grouped = number_format.grouped(matrix)
    importance = None
    if weights is not None:
        importance = number_format.grouped(weights.float().expand(matrix.shape)).flatten(0, 1).T.contiguous()
    # Groups side by side, [G, rows · groups]: scales then lie along the long axis, where arithmetic is fast.
    search = _Search(grouped.flatten(0, 1).T.contiguous(), number_format, importance)
    scales = number_format.absmax_scales(matrix).flatten()
    error = search.error(scales)
    widest = grouped.abs().amax(-1).flatten() / number_format.code_max
    for ratio in _RATIOS[number_format.bits]:
        scales, error = search.better(number_format.round_scales(widest * ratio), scales, error)
    for _ in range(_ROUNDS):
        scales, error = search.better(number_format.round_scales(search.fitted(scales)), scales, error)
    return scales.view(grouped.shape[:2])


class _Search:
    """Judges scales of many groups at once: weights and their importance [G, n], scales and errors [n]."""

    def __init__(self, weights: Tensor, number_format: NumberFormat, importance: Tensor | None) -> None:
        self._weights, self._format, self._importance = weights, number_format, importance
        self._work = torch.empty_like(weights)

    def _codes(self, scales: Tensor) -> Tensor:
        codes = torch.div(self._weights, scales.float(), out=self._work)
        return codes.round_().clamp_(self._format.code_min, self._format.code_max)

    def error(self, scales: Tensor) -> Tensor:
        """Σ h (w − s · q)² of each group."""
        return fixed_sum(self._weighed(self._codes(scales).mul_(scales.float()).sub_(self._weights).square_()))

    def fitted(self, scales: Tensor) -> Tensor:
        """⟨w, h q⟩ / ⟨q, h q⟩ of each group, for the codes that these scales give."""
        codes = self._codes(scales)
        return fixed_sum(self._weighed(codes * self._weights)) / fixed_sum(self._weighed(codes.square_()))

    def _weighed(self, values: Tensor) -> Tensor:
        """h times these, in place."""
        return values if self._importance is None else values.mul_(self._importance)

    def better(self, tried: Tensor, scales: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Per group, the tried scale where its error is strictly smaller."""
        tried_error = self.error(tried)
        smaller = tried_error < error
        return torch.where(smaller, tried, scales), torch.where(smaller, tried_error, error)


NEAREST = Solver("nearest", (), lambda number_format, statistics: partial(nearest, number_format))
NEAREST_MSE = Solver("nearest-mse", (), lambda number_format, statistics: partial(nearest_mse, number_format))


def fixed_sum(values: Tensor) -> Tensor:
    """Sum over the first axis by halving, in place: the same additions in the same order on every machine."""
    count = values.shape[0]
    while count > 1:
        half = (count + 1) // 2
        values[: count - half] += values[half:count]
        count = half
    return values[0].clone()
