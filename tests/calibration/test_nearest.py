# SPDX-License-Identifier: Apache-2.0
"""Solvers against one another, against an exhaustive search, and their promise of the same bytes everywhere."""

import bounds
import pytest
import torch

from mossquant.calibration.nearest import fixed_sum, nearest, nearest_mse
from mossquant.calibration.registry import SOLVERS
from mossquant.calibration.solver import Solver, Statistics
from mossquant.calibration.statistics import Hessian
from mossquant.formats import FORMATS, NumberFormat, QuantizedTensor

EVERY = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
MATRIX = {name: solver for name, solver in SOLVERS.items() if isinstance(solver, Solver)}
SHAPES = [(1, 1), (5, 48), (64, 256)]


def matrix(rows: int, columns: int, *, tails: bool, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 0.02 * torch.randn(rows, columns, generator=generator)
    return values / torch.rand(rows, columns, generator=generator).clamp_min(0.05) if tails else values


def measured(values: torch.Tensor) -> Statistics:
    """What a solver may ask for of a matrix: inputs that depend on one another, some of them held out."""
    inputs = torch.randn(300, values.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = inputs.cumsum(1)
    return {"hessian": Hessian(inputs[:250].T @ inputs[:250] / 250, 250.0, 200.0, inputs[250:]), "rows": values[:2]}


def group_errors(found: QuantizedTensor, values: torch.Tensor) -> torch.Tensor:
    """Squared error of each group [rows, groups], float64."""
    return found.format.grouped((found.dequantize().double() - values.double()).square()).sum(-1)


@EVERY
@pytest.mark.parametrize("shape", [(1, 33), (7, 48)])
@pytest.mark.parametrize("name", MATRIX)
def test_rows_in_pieces_equal_the_whole(form: NumberFormat, shape: tuple[int, int], name: str) -> None:
    """Bit for bit, however the rows are cut: quantizing works on a few at a time."""
    values = matrix(*shape, tails=True)
    solve = MATRIX[name].prepare(form, measured(values))
    whole = solve(values)
    for rows in (1, 3):
        parts = [solve(part) for part in values.split(rows)]
        assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
        assert torch.equal(torch.cat([part.scales for part in parts]), whole.scales)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tails", [False, True])
def test_mse_is_never_worse_in_any_group(form: NumberFormat, shape: tuple[int, int], tails: bool) -> None:
    values = matrix(*shape, tails=tails)
    plain, clipped = (group_errors(solver(form, values), values) for solver in (nearest, nearest_mse))
    assert bool((clipped <= plain * (1 + bounds.SUM_ROUNDING)).all())
    if values.numel() > 1000:
        # A whole row of heavy tails has little to clip at 8 bits: its largest value is worth more than finer steps.
        assert clipped.sum() < (0.99 if form.name == "int8" else 0.98) * plain.sum()


@EVERY
def test_mse_is_near_the_best_scale(form: NumberFormat) -> None:
    """Of a thousand scales a group, the best is better by little: 1 % of the error at 4 bits, 20 % at 8 (jitter)."""
    values = matrix(32, 128, tails=False)
    found = group_errors(nearest_mse(form, values), values)
    widest = form.grouped(values).abs().amax(-1) / form.code_max
    ratios = torch.linspace(0.3, 1.2, 1000)
    best = torch.stack([group_errors(form.quantize(values, widest * ratio), values) for ratio in ratios]).amin(0)
    assert found.sum() <= best.sum() * (1.01 if form.bits == 4 else 1.20)


def test_nearest_by_hand() -> None:
    values = torch.tensor([[0.7, -0.35, 0.1, 0.04]])
    found = nearest(FORMATS["int4_g32"], values)
    assert found.scales.item() == torch.tensor(0.1).bfloat16().item()
    assert found.codes[0, :4].tolist() == [7, -3, 1, 0]  # 0.35 / 0.10009765625 = 3.4966
    assert not found.codes[0, 4:].any()


def test_mse_uses_the_eighth_code_below_zero() -> None:
    """−0.8 alone decides the range: with s = 0.1 it is −8, and everything else fits; ±7 would need s = 0.114."""
    values = torch.tensor([[-0.8, 0.1, 0.2, 0.3, -0.5, 0.6, 0.7, -0.4]])
    found = nearest_mse(FORMATS["int4_g32"], values)
    assert found.codes[0, :8].tolist() == [-8, 1, 2, 3, -5, 6, 7, -4]
    assert nearest(FORMATS["int4_g32"], values).codes.min() == -7


@EVERY
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_values(form: NumberFormat, size: float) -> None:
    values = torch.tensor([[size, -size / 2, 0.0], [0.0, 0.0, 0.0]])
    for solver in MATRIX.values():
        found = solver.prepare(form, measured(values))(values)
        assert bool((torch.isfinite(found.scales.float()) & (found.scales > 0)).all())
        assert bool(torch.isfinite(found.dequantize()).all())
        assert not found.codes[1].any()


@pytest.mark.parametrize("shape", [(1, 1 << 16), (1 << 10, 64)])
def test_threads_change_nothing(shape: tuple[int, int]) -> None:
    """One long row and many short ones: the two ways in which PyTorch shares out a sum."""
    values = matrix(*shape, tails=True)
    one = nearest_mse(FORMATS["int8"], values)
    torch.set_num_threads(2)
    try:
        two = nearest_mse(FORMATS["int8"], values)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 100])
def test_fixed_sum_adds_halves(count: int) -> None:
    values = matrix(count, 5, tails=False)

    def halves(rows: list[torch.Tensor]) -> torch.Tensor:
        if len(rows) == 1:
            return rows[0]
        half = (len(rows) + 1) // 2
        return halves([row + rows[half + i] if half + i < len(rows) else row for i, row in enumerate(rows[:half])])

    assert torch.equal(fixed_sum(values.clone()), halves(list(values)))
