# SPDX-License-Identifier: Apache-2.0
"""The quantized input of a linear layer: codes and scales equal to NumPy's and to those that PyTorch models."""

import numpy as np
import pytest
import torch

from mossquant.formats.activations import int8_block
from mossquant.kernels import _native, available

from .linears import COLUMNS, Codes, Floats, make_input, quantized_input

KERNELS = available("quantize", numbers="int8_block_f32")
BLOCKS = (1, 16, 32, 128)


def numpy_quantize(x: Floats, block: int) -> tuple[Codes, Floats]:
    """The definition in quantize.h, in NumPy's float32."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    largest = np.abs(padded).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        reciprocal = np.float32(127) / largest
    reciprocal[np.isinf(reciprocal)] = 0
    codes = np.rint(padded * reciprocal[..., None])
    return codes.astype(np.int8).reshape(len(x), -1), largest / np.float32(127)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_codes_and_scales_are_numpys(columns: int, block: int, kernel: str) -> None:
    x = make_input(70, columns, seed=columns)
    for rows in range(1, 71):
        codes, scales = quantized_input(x[:rows], block, kernel=kernel)
        expected_codes, expected_scales = numpy_quantize(x[:rows], block)
        assert np.array_equal(codes, expected_codes)
        assert np.array_equal(scales, expected_scales)
    assert not codes[:, columns:].any(), "the padding holds codes"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_values_are_those_of_the_model_in_pytorch(columns: int, block: int, kernel: str) -> None:
    x = make_input(200, columns, seed=columns)
    codes, scales = quantized_input(x, block, kernel=kernel)
    values = (codes.reshape(len(x), -1, block) * scales[..., None]).reshape(len(x), -1)[:, :columns]
    assert np.array_equal(values, int8_block(torch.from_numpy(x), block).numpy())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_any_bits_give_those_of_the_scalar_form(block: int, kernel: str) -> None:
    """Numbers of every exponent, infinities and NaN among them, and neighbours of 1/2 between two codes."""
    random = np.random.default_rng(block)
    x = random.integers(0, 2**32, (400, 150), np.uint32).view(np.float32)
    x[100:200] = np.ldexp(random.standard_normal((100, 150), np.float32), random.integers(-149, 128, (100, 1)))
    ties = (random.integers(-127, 127, (100, 150)) + 0.5).astype(np.float32)
    x[200:300], x[300:] = np.nextafter(ties, np.float32(-128)), np.nextafter(ties, np.float32(128))
    x[200:, ::block] = 127
    expected_codes, expected_scales = quantized_input(x, block, kernel="moss_quantize_int8_block_f32_scalar")
    codes, scales = quantized_input(x, block, kernel=kernel)
    assert np.array_equal(codes, expected_codes)
    assert np.array_equal(scales, expected_scales, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_go_to_the_even_code(kernel: str) -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    codes, scales = quantized_input(x, 8, kernel=kernel)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_block_alone(bad: float, kernel: str) -> None:
    x = make_input(1, 96)
    clean_codes, clean_scales = quantized_input(x, 32, kernel=kernel)
    x[0, 40] = bad
    codes, scales = quantized_input(x, 32, kernel=kernel)
    assert not codes[0, 32:64].any()
    assert np.isfinite(scales).tolist() == [[True, False, True]]
    codes[0, 32:64], scales[0, 1] = clean_codes[0, 32:64], clean_scales[0, 1]
    assert np.array_equal(codes, clean_codes)
    assert np.array_equal(scales, clean_scales)


def test_wrong_arrays_are_refused() -> None:
    x, codes, scales = np.zeros((2, 33), np.float32), np.zeros((2, 64), np.int8), np.zeros((2, 2), np.float32)
    sums = np.zeros((2, 2), np.int32)
    _native.quantize_int8_block(x, codes, scales, sums, block=32, kernel=None)
    with pytest.raises(ValueError, match=r"codes: shape is \[2, 64\], must be \[2, 40\]"):
        _native.quantize_int8_block(x, codes, scales, sums, block=20, kernel=None)
    with pytest.raises(ValueError, match=r"scales: shape is \[2, 1\], must be \[2, 2\]"):
        _native.quantize_int8_block(x, codes, scales[:, :1], sums, block=32, kernel=None)
    with pytest.raises(ValueError, match="codes: dtype must be int8"):
        _native.quantize_int8_block(x, codes.astype(np.uint8), scales, sums, block=32, kernel=None)
    with pytest.raises(ValueError, match="x: dtype must be float32"):
        _native.quantize_int8_block(x.astype(np.float64), codes, scales, sums, block=32, kernel=None)
    with pytest.raises(ValueError, match="x: must be contiguous, row-major"):
        _native.quantize_int8_block(np.zeros((33, 2), np.float32).T, codes, scales, sums, block=32, kernel=None)
    with pytest.raises(ValueError, match="x: has no columns, must have at least 1"):
        _native.quantize_int8_block(x[:, :0], codes, scales, sums, block=32, kernel=None)
    with pytest.raises(ValueError, match=r"block: must be 1 \.\. 2\^40, is 0"):
        _native.quantize_int8_block(x, codes, scales, sums, block=0, kernel=None)
    with pytest.raises(ValueError, match=r"block: must be 1 \.\. 2\^40, is 9223372036854775807"):
        _native.quantize_int8_block(x, codes, scales, sums, block=2**63 - 1, kernel=None)
    with pytest.raises(ValueError, match=r"'moss_quantize_avx9' is not one of those .* moss_quantize_int8_block_f32_"):
        _native.quantize_int8_block(x, codes, scales, sums, block=32, kernel="moss_quantize_avx9")
