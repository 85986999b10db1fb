# SPDX-License-Identifier: Apache-2.0
"""Inference over time: the scan's forward at every length, and single steps of scan and convolution in place."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mossquant.kernels import _native, available

from .bounds import f32_accumulated

Array = NDArray[np.floating]

LONGEST = 1000
SCANS = available("scan")
CONVS = available("conv")


def scan_inputs(time: int, channels: int, states: int, *, batch: int = 1) -> list[Array]:
    """x, dt, A, Bm, Cm, D, h0 in float64, of numbers that fp32 holds exactly."""
    random = np.random.default_rng(time)

    def normal(*size: int) -> Array:
        return random.standard_normal(size, np.float32).astype(np.float64)

    def held(array: Array) -> Array:
        return array.astype(np.float32).astype(np.float64)

    A = held(-np.exp(normal(channels, states)))
    x, dt, Bm, Cm = (normal(batch, time, size) for size in (channels, channels, states, states))
    return [x, held(2 * dt - 2), A, Bm, Cm, normal(channels), normal(batch, channels, states)]


def typed(kernel: str, arrays: list[Array]) -> list[Array]:
    return [np.ascontiguousarray(array, np.float64 if "_f64_" in kernel else np.float32) for array in arrays]


def run_scan(kernel: str, x: Array, dt: Array, A: Array, Bm: Array, Cm: Array, D: Array, state: Array) -> Array:
    """y; the state is brought up to date in place."""
    y = np.full_like(x, np.nan)
    _native.scan_forward(x, dt, A, Bm, Cm, D, state, y, state, None, threads=1, kernel=kernel)
    return y


@pytest.mark.parametrize("kernel", SCANS)
def test_scan_of_every_length(kernel: str) -> None:
    """T = 1 ... 1000 steps: y and the state behind them, near the definition in float64."""
    x, dt, A, Bm, Cm, D, h = scan_inputs(LONGEST, 9, 3)
    x32, dt32, A32, Bm32, Cm32, D32, h32 = typed(kernel, [x, dt, A, Bm, Cm, D, h])
    delta, size = np.logaddexp(dt, 0), np.abs(h)
    y, y_size, h_size = np.zeros_like(x), 0.0, 0.0
    for t in range(LONGEST):
        decay, written = np.exp(delta[:, t, :, None] * A), (delta * x)[:, t, :, None] * Bm[:, t, None, :]
        h, size = decay * h + written, decay * size + np.abs(written)
        y[:, t] = (h * Cm[:, t, None, :]).sum(-1) + D * x[:, t]
        # The largest values so far where every term enters with its absolute value.
        y_size = max(y_size, ((size * np.abs(Cm[:, t, None, :])).sum(-1) + np.abs(D * x[:, t])).max())
        h_size = max(h_size, size.max())
        T, state = t + 1, h32.copy()
        found = run_scan(kernel, x32[:, :T], dt32[:, :T], A32, Bm32[:, :T], Cm32[:, :T], D32, state)
        assert np.abs(found - y[:, :T]).max() <= f32_accumulated(T + 3) * y_size, T
        assert np.abs(state - h).max() <= f32_accumulated(T + 3) * h_size, T


@pytest.mark.parametrize("kernel", [*SCANS, "moss_scan_f64_scalar"])
def test_scan_steps_equal_the_sequence(kernel: str) -> None:
    """A step is the forward with T = 1: the same bits as one call, whether the state is in place or not."""
    x, dt, A, Bm, Cm, D, h0 = typed(kernel, scan_inputs(LONGEST, 70, 5, batch=2))
    apart, last = np.full_like(x, np.nan), np.full_like(h0, np.nan)
    _native.scan_forward(x, dt, A, Bm, Cm, D, h0, apart, last, None, threads=1, kernel=kernel)
    whole, stepped = h0.copy(), h0.copy()
    assert np.array_equal(run_scan(kernel, x, dt, A, Bm, Cm, D, whole), apart)
    assert np.array_equal(whole, last)
    for t in range(LONGEST):
        step_x, step_dt, step_B, step_C = typed(kernel, [array[:, t : t + 1] for array in (x, dt, Bm, Cm)])
        y = run_scan(kernel, step_x, step_dt, A, step_B, step_C, D, stepped)
        assert np.array_equal(y, apart[:, t : t + 1]), t
    assert np.array_equal(stepped, last)


@pytest.mark.parametrize("width", [1, 2, 4, 40])
@pytest.mark.parametrize("kernel", [*CONVS, "moss_conv_f64_scalar"])
def test_conv_steps_equal_the_sequence(kernel: str, width: int) -> None:
    """The same of the convolution and its window."""
    random = np.random.default_rng(width)
    sizes = [(2, 100, 70), (70, width), (70,), (2, 70, width - 1)]
    x, weight, bias, first = typed(kernel, [random.standard_normal(size) for size in sizes])
    apart, last = np.full_like(x, np.nan), np.full_like(first, np.nan)
    _native.conv_forward(x, weight, bias, first, apart, last, threads=1, kernel=kernel)
    y, whole, stepped = np.full_like(x, np.nan), first.copy(), first.copy()
    _native.conv_forward(x, weight, bias, whole, y, whole, threads=1, kernel=kernel)
    assert np.array_equal(y, apart)
    assert np.array_equal(whole, last)
    for t in range(x.shape[1]):
        step = np.ascontiguousarray(x[:, t : t + 1])
        y = np.full_like(step, np.nan)
        _native.conv_forward(step, weight, bias, stepped, y, stepped, threads=1, kernel=kernel)
        assert np.array_equal(y, apart[:, t : t + 1]), t
    assert np.array_equal(stepped, last)
