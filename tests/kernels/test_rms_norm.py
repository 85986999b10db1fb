# SPDX-License-Identifier: Apache-2.0
"""RMSNorm against float64 NumPy."""

import numpy as np
import pytest
import torch

from mossquant.kernels import _native, available
from mossquant.model.block import rms_norm

from .bounds import F32_TINY, F64_RELATIVE, f32_roundings
from .linears import make_input

EPS = 1e-5
COLUMNS = (1, 7, 16, 31, 33, 100, 768, 2048)
F32_KERNELS = available("rms_norm", numbers="f32")
F64_KERNELS = available("rms_norm", numbers="f64")


def exact(x: np.ndarray, weight: np.ndarray, eps: float = EPS) -> np.ndarray:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def normed(x: np.ndarray, weight: np.ndarray, *, eps: float = EPS, kernel: str | None = None) -> np.ndarray:
    y = np.full_like(x, np.nan)
    _native.rms_norm(x, weight, eps, y, kernel=kernel)
    return y


def make_rows(rows: int, columns: int) -> np.ndarray:
    """Rows of every size whose squares fp32 holds, or counts as nothing beside eps."""
    x = make_input(rows, columns, seed=columns)
    return np.where(np.abs(x) > 1e20, x * np.float32(1e-15), x)


@pytest.mark.parametrize("kernel", F32_KERNELS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_float32_near_float64(columns: int, kernel: str) -> None:
    """The sum of squares is of positive terms: off by a relative D + 1 roundings; mean and eps add two, the root
    halves them, and the root, its reciprocal, two products and eps as fp32 (at most one, halved) are five."""
    x, weight = make_rows(70, columns), make_input(1, columns, seed=9)[0]
    expected = exact(x, weight)
    tiny = F32_TINY * (np.abs(weight.astype(np.float64)) + 1)
    bound = f32_roundings((columns + 3) // 2 + 6) * np.abs(expected) + tiny
    for rows in range(1, 71):
        error = np.abs(normed(x[:rows], weight, kernel=kernel) - expected[:rows])
        assert (error <= bound[:rows]).all()


@pytest.mark.parametrize("kernel", F64_KERNELS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_float64_equals_numpy_and_the_model(columns: int, kernel: str) -> None:
    x, weight = (array.astype(np.float64) for array in (make_rows(70, columns), make_input(1, columns, seed=9)[0]))
    model = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), EPS).numpy()
    found = normed(x, weight, kernel=kernel)
    for expected in (exact(x, weight), model):
        assert (np.abs(found - expected) <= F64_RELATIVE * np.abs(expected)).all()


@pytest.mark.parametrize("kernel", [*F32_KERNELS, *F64_KERNELS])
def test_in_place(kernel: str) -> None:
    x, weight = make_rows(5, 100), make_input(1, 100, seed=9)[0]
    if "f64" in kernel:
        x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected = normed(x, weight, kernel=kernel)
    _native.rms_norm(x, weight, EPS, x, kernel=kernel)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("kernel", F32_KERNELS)
def test_rows_by_hand(kernel: str) -> None:
    x = np.array([[3, -4, 0, 0], [0, 0, 0, 0]], np.float32)
    weight = np.array([1, 2, 3, 4], np.float32)
    y = normed(x, weight, eps=2**-100, kernel=kernel)
    assert np.allclose(y, [[1.2, -3.2, 0, 0], [0, 0, 0, 0]], rtol=f32_roundings(10), atol=0)


@pytest.mark.parametrize("kernel", F32_KERNELS)
def test_nan_is_not_swallowed(kernel: str) -> None:
    x = make_rows(3, 33)
    x[1, 20] = np.nan
    assert np.isnan(normed(x, np.ones(33, np.float32), kernel=kernel)).any(axis=1).tolist() == [False, True, False]


def test_wrong_arrays_are_refused() -> None:
    x, weight = make_rows(3, 33), np.ones(33, np.float32)
    with pytest.raises(ValueError, match=r"weight: shape is \[32\], must be \[33\]"):
        normed(x, weight[:32])
    with pytest.raises(ValueError, match="weight: dtype must be float64"):
        normed(x.astype(np.float64), weight)
    with pytest.raises(ValueError, match=r"x: shape is \[33\], must be \[M, D\]"):
        normed(x[0], weight)
    with pytest.raises(ValueError, match="x: has no columns"):
        normed(x[:, :0], weight[:0])
    with pytest.raises(ValueError, match="eps: must be positive"):
        normed(x, weight, eps=0.0)
