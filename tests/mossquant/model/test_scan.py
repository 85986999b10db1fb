# SPDX-License-Identifier: Apache-2.0
"""The scan's forms against numbers worked out by hand and against one another, with gradients; and the convolution."""

import math

import bounds
import pytest
import torch
import torch.nn.functional as F
from small import difference
from torch import Tensor

from mossquant.model.scan import SCANS, ScanForm, causal_conv, conv_step

FORMS: tuple[ScanForm, ...] = ("sequential", "chunked", "kernel")


def inputs(batch: int, time: int, *, dtype: torch.dtype = torch.float64, E: int = 11, N: int = 5) -> list[Tensor]:
    """x, dt, A, Bm, Cm, D, h of plausible size: Δ from 1e-3 to 3."""
    generator = torch.Generator().manual_seed(100 * batch + time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt, bm, cm = (
        normal(batch, time, E),
        3 * normal(batch, time, E) - 2,
        normal(batch, time, N),
        normal(batch, time, N),
    )
    arguments = [x, dt, -torch.exp(normal(E, N)), bm, cm, normal(E), normal(batch, E, N)]
    return [argument.to(dtype) for argument in arguments]


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form: ScanForm) -> None:
    """Δ = ln 4 (softplus of ln 3) and A = −1/2 halve the state at each token; then y = C h + D x."""
    column = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64).view(1, 3, 1)
    one = torch.ones(1, 3, 1, dtype=torch.float64)
    state = torch.full((1, 1, 1), 8.0, dtype=torch.float64)
    D = torch.tensor([10.0], dtype=torch.float64)
    A = torch.tensor([[-0.5]], dtype=torch.float64)
    y, h = SCANS[form](column, math.log(3) * one, A, 2 * one, 5 * one, D, state)
    step = math.log(4)
    first = 4 + 2 * step
    second = first / 2 + 4 * step
    third = second / 2 - 6 * step
    assert y.flatten().tolist() == pytest.approx([5 * first + 10, 5 * second + 20, 5 * third - 30], rel=1e-14)
    assert h.flatten().tolist() == pytest.approx([third], rel=1e-14)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 100])
def test_the_forms_agree(batch: int, time: int) -> None:
    arguments = inputs(batch, time)
    expected, after = SCANS["sequential"](*arguments)
    for form in ("chunked", "kernel", *(("step",) if time == 1 else ())):
        y, h = SCANS[form](*arguments)
        assert difference(y, expected) < bounds.FORMS_FLOAT64, form
        assert difference(h, after) < bounds.FORMS_FLOAT64, form


def test_the_forms_agree_in_fp32() -> None:
    expected, after = SCANS["sequential"](*inputs(2, 100))
    for form in FORMS:
        y, h = SCANS[form](*inputs(2, 100, dtype=torch.float32))
        assert difference(y, expected) < bounds.FORMS_FLOAT32, form
        assert difference(h, after) < bounds.FORMS_FLOAT32, form


@pytest.mark.parametrize("form", ["chunked", "kernel"])
def test_the_gradients_agree(form: ScanForm) -> None:
    def gradients(form: ScanForm) -> list[Tensor]:
        arguments = [argument.requires_grad_() for argument in inputs(2, 45)]
        y, h = SCANS[form](*arguments)
        return list(torch.autograd.grad(y.square().sum() + h.sum(), arguments))

    for name, one, other in zip(
        ("x", "dt", "A", "B", "C", "D", "h"), gradients(form), gradients("sequential"), strict=True
    ):
        assert difference(one, other) < bounds.FORMS_FLOAT64 * max(1.0, float(other.abs().max())), name


@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_time_steps(form: ScanForm, dtype: torch.dtype) -> None:
    """Regression: softplus in float64 once went through exp(dt), which is infinite from dt = 710 on."""
    for value, delta in ((-800.0, 0.0), (-40.0, math.exp(-40)), (0.0, math.log(2)), (50.0, 50.0), (800.0, 800.0)):
        x, dt, A, bm, cm, D, h = inputs(1, 1, dtype=dtype)
        y, after = SCANS[form](x, torch.full_like(dt, value), A, bm, cm, torch.zeros_like(D), h)
        expected = torch.exp(delta * A.double()) * h.double() + (delta * x.double())[0, 0, :, None] * bm.double()[0, 0]
        assert torch.isfinite(y).all(), value
        relative = 1e-14 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(after.double(), expected, rtol=relative, atol=relative)


@pytest.mark.parametrize("form", FORMS)
def test_a_scan_in_two_pieces(form: ScanForm) -> None:
    x, dt, A, bm, cm, D, h = inputs(2, 70)
    expected, after = SCANS[form](x, dt, A, bm, cm, D, h)
    first, middle = SCANS[form](x[:, :37], dt[:, :37], A, bm[:, :37], cm[:, :37], D, h)
    second, last = SCANS[form](x[:, 37:], dt[:, 37:], A, bm[:, 37:], cm[:, 37:], D, middle)
    assert difference(torch.cat([first, second], 1), expected) < bounds.FORMS_FLOAT64
    assert difference(last, after) < bounds.FORMS_FLOAT64


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_convolution_is_pytorchs(taps: int) -> None:
    generator = torch.Generator().manual_seed(taps)
    shapes = ((2, 9, 6), (6, taps), (6,), (2, 6, taps - 1))
    x, weight, bias, window = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    full = torch.cat([window, x.transpose(1, 2)], 2)
    expected = F.silu(F.conv1d(full, weight.unsqueeze(1), bias, groups=6)).transpose(1, 2)
    y, after = causal_conv(x, weight, bias, window)
    assert difference(y, expected) < bounds.SAME_SUM_FLOAT64
    assert torch.equal(after, full[:, :, full.shape[2] - (taps - 1) :])
    assert after.untyped_storage().nbytes() == after.numel() * 8, "the state must not hold on to the text"
    for t in range(9):
        row, window = conv_step(x[:, t : t + 1], weight, bias, window)
        assert difference(row, expected[:, t : t + 1]) < bounds.SAME_SUM_FLOAT64
    assert torch.equal(window, after)
