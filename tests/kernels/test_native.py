# SPDX-License-Identifier: Apache-2.0
"""The checks that stand between NumPy arrays and the kernels' pointers."""

import numpy as np
import pytest

from mossquant.kernels import _native


def conv_arrays() -> dict[str, np.ndarray]:
    B, T, E, W = 2, 5, 3, 4
    shapes = {"x": (B, T, E), "weight": (E, W), "bias": (E,), "window": (B, E, W - 1)}
    shapes |= {"y": (B, T, E), "new_window": (B, E, W - 1)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_arrays_are_checked() -> None:
    def run(**changed: np.ndarray) -> None:
        _native.conv_forward(**(conv_arrays() | changed), threads=1, kernel=None)

    run()
    with pytest.raises(ValueError, match="window: must be contiguous, row-major"):
        run(window=np.zeros((2, 3, 3), np.float32).transpose(0, 2, 1))
    with pytest.raises(ValueError, match="y: must be contiguous, row-major"):
        run(y=np.zeros((2, 5, 6), np.float32)[..., ::2])
    with pytest.raises(ValueError, match="bias: dtype must be float32"):
        run(bias=np.zeros(3))
    with pytest.raises(ValueError, match="x: dtype must be float32 or float64"):
        run(x=np.zeros((2, 5, 3), np.int32))
    with pytest.raises(ValueError, match=r"y: shape is \[2, 5\], must be \[2, 5, 3\]"):
        run(y=np.zeros((2, 5), np.float32))


def test_outputs_must_be_writable() -> None:
    arrays = conv_arrays()
    arrays["y"].flags.writeable = False
    with pytest.raises((TypeError, ValueError)):
        _native.conv_forward(**arrays, threads=1, kernel=None)
