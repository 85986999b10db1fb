# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column after column, and let the columns that are still to come make up for each error.

    q_j = round((w_j + Σ_k (w_k − q_k) · R_kj / R_jj) / s) · s  over k before j;   R Rᵀ = Hᵖ + d · mean diag Hᵖ, R upper

These are the codes of Frantar et al. 2023 (arXiv 2210.17323), Algorithm 1, without its inverse (Chee et al. 2023, arXiv
2307.13304, Theorem 6), in the order of falling diagonals of H and with the scales fixed before: those of `nearest-mse`
with the diagonal as what an error of a column costs. p = 3/4 flattens the spectrum: what
is learned on one text then serves another better. The damping d is the one of `DAMPINGS` that leaves the least error
on held-out inputs, tried on some of the rows.

Where fewer effective tokens came than the quota, n of N, H is n/N of its own and the rest of what is known otherwise:
the mean over the layer's experts where they have the same inputs, else its own diagonal.
"""

from functools import partial

import torch
from torch import Tensor

from mossquant.calibration.nearest import mse_scales, nearest_mse
from mossquant.calibration.solver import Solve, Solver, Statistics
from mossquant.calibration.statistics import Hessian
from mossquant.formats import NumberFormat, QuantizedTensor

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1)
DEFAULT_DAMPING = 0.03
"""Where nothing was held out."""
POWER = 0.75

_COLUMNS = 64
"""Columns that are told of all errors before them at once."""


def prepare(number_format: NumberFormat, statistics: Statistics) -> Solve:
    """What solves rows of a matrix with "hessian" and "rows" of `Statistics.measured`."""
    hessian: Hessian | None = statistics["hessian"]
    if hessian is None or _blank(hessian):
        return partial(nearest_mse, number_format)
    power = _Power(shrunk(hessian))
    if not bool(hessian.sketch.any()):
        return power.solver(number_format, DEFAULT_DAMPING)
    rows: Tensor = statistics["rows"]

    def held_out_error(damping: float) -> float:
        """‖S (W − Q)ᵀ‖²."""
        error = power.solver(number_format, damping)(rows).dequantize().double() - rows.double()
        return float((hessian.sketch @ error.T).square().sum())

    # The factor of the best is made once more: holding one of each would take more memory than all the rest.
    return power.solver(number_format, min(DAMPINGS, key=held_out_error))


def note(statistics: Statistics) -> str | None:
    """What the ledger says where text was lacking."""
    hessian: Hessian | None = statistics["hessian"]
    if hessian is None:
        return "no linear multiplies it: nearest-mse"
    if hessian.effective == 0:
        return "no calibration text reached it: nearest-mse"
    if _blank(hessian):
        return "all its inputs were zero: nearest-mse"
    said = []
    if hessian.effective < hessian.needed:
        toward = "its own diagonal" if hessian.others is None else "that of all experts of its layer"
        said.append(f"{hessian.effective:.0f} of {hessian.needed:.0f} effective tokens: H shrunk toward {toward}")
    if not bool(hessian.sketch.any()):
        said.append(f"nothing was held out for it: damping {DEFAULT_DAMPING}")
    return "; ".join(said) or None


GPTQ = Solver("gptq", ("hessian", "rows"), prepare, note)


def shrunk(hessian: Hessian) -> Tensor:
    """H with as much of something else as its quota lacks, float64 [K, K]."""
    own = min(1.0, hessian.effective / hessian.needed) if hessian.needed > 0 else 1.0
    if own == 1.0:
        return hessian.mean
    other = torch.diag(hessian.mean.diagonal()) if hessian.others is None else hessian.others
    return own * hessian.mean + (1 - own) * other


def _blank(hessian: Hessian) -> bool:
    return not float(hessian.mean.diagonal().sum()) > 0


class _Power:
    """Hᵖ, by its eigenvalues, float64 [K, K] with columns in rising order of H's diagonal."""

    def __init__(self, moments: Tensor) -> None:
        self._order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        # Scaled to 1, so that neither squares nor powers of values near the ends of fp32 leave float64.
        values, vectors = torch.linalg.eigh(moments / moments.diagonal().mean())
        values = values.clamp_min(0) ** POWER  # roundings make those that should be zero negative
        self._diagonal = vectors.square() @ values
        vectors = vectors[self._order.flip(0)]
        self._power = (vectors * values) @ vectors.T

    def solver(self, number_format: NumberFormat, damping: float) -> Solve:
        """Rounds rows by Hᵖ with this damping."""
        added = damping * self._diagonal.mean()
        damped = self._power.clone()
        damped.diagonal().add_(added)
        # Of the columns the other way round, a lower factor is the upper one.
        factor = torch.linalg.cholesky(damped).flip(0, 1)
        factor /= factor.diagonal().clone()
        return partial(_solve, number_format, factor, self._order, (self._diagonal + added).float())


def _solve(
    number_format: NumberFormat, factor: Tensor, order: Tensor, importance: Tensor, rows: Tensor
) -> QuantizedTensor:
    """Rows [n, K] by the factor R [K, K] of columns in this order, its diagonal 1; importance [K] is for the scales."""
    scales = mse_scales(number_format, rows, importance)
    count, columns = rows.shape
    size = number_format.padded_columns(columns) // scales.shape[1]
    # Columns lie along the first axis, where one is contiguous.
    exact = rows.double().T[order].contiguous()
    of_column = scales.double().T[order // size].contiguous()
    wanted, errors = exact.clone(), torch.empty_like(exact)
    codes = torch.zeros((number_format.padded_columns(columns), count), dtype=torch.int8)
    for first in range(0, columns, _COLUMNS):
        last = min(first + _COLUMNS, columns)
        wanted[first:last].addmm_(factor[:first, first:last].T, errors[:first])
        for j in range(first, last):
            code = (wanted[j] / of_column[j]).round_().clamp_(number_format.code_min, number_format.code_max)
            codes[order[j]] = code.to(torch.int8)
            torch.sub(exact[j], code.mul_(of_column[j]), out=errors[j])
            wanted[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j])
    return QuantizedTensor(number_format, codes.T.contiguous(), scales, count, columns)
