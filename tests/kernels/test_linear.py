# SPDX-License-Identifier: Apache-2.0
"""The linear layer with int8 and int4 weights: integers equal to NumPy's, the rest within fp32's roundings."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mossquant.formats import FORMATS, QuantizedTensor
from mossquant.formats.activations import int8_block
from mossquant.kernels import _native, available

from .bounds import F32_TINY, F32_UNIT, f32_roundings
from .linears import (
    COLUMNS,
    Bytes,
    Codes,
    Floats,
    block_sums,
    linear,
    make_input,
    make_weight,
    packed_weight,
    quantized_input,
    stored_codes,
)

Doubles = NDArray[np.float64]

INPUTS = ("f32", "int8_block")
PAIRS = [(given, name) for given in INPUTS for name in FORMATS]
KERNELS = [
    (given, name, kernel) for given, name in PAIRS for kernel in available("linear", numbers=f"f32_{given}_{name}")
]
CODE_KERNELS = [(name, kernel) for given, name, kernel in KERNELS if given == "int8_block"]


def blocked(codes: Codes, block: int) -> NDArray[np.int32]:
    """[rows, blocks, block], padded with zeros."""
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)))
    return padded.reshape(len(codes), -1, block).astype(np.int32)


def block_scales(weight: QuantizedTensor) -> Floats:
    """[N, blocks]: the scale of each block that the kernels go by, also where a row has one."""
    blocks = -(-weight.columns // weight.format.activation_block)
    scales: Floats = np.broadcast_to(weight.scales.float().numpy(), (weight.rows, blocks))
    return scales


def dots(x_codes: Codes, weight: QuantizedTensor) -> NDArray[np.int32]:
    """[M, N, blocks]: NumPy's integer sums."""
    block = weight.format.activation_block
    return np.einsum("mbk,nbk->mnb", blocked(x_codes, block), blocked(stored_codes(weight), block))


def given_input(given: str, x: Floats, weight: QuantizedTensor) -> Floats | tuple[Codes, Floats]:
    return x if given == "f32" else quantized_input(x, weight.format.activation_block)


def exact(x: Floats | tuple[Codes, Floats], weight: QuantizedTensor, bias: Floats) -> tuple[Doubles, Doubles]:
    """y [M, N] in float64, and by how much fp32 rounding may move it.

    A term is rounded as a product (fp32 inputs) and in the sum of its block, times its scale or two, and in the sums of
    blocks and bias. Below the normal numbers each product may be off by F32_TINY, before the weight's scale or after.
    """
    block, scales = weight.format.activation_block, block_scales(weight).astype(np.float64)
    if isinstance(x, np.ndarray):
        padded = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block).astype(np.float64)
        own = blocked(stored_codes(weight), block).astype(np.float64)
        sums = np.einsum("mbk,nbk->mnb", padded, own)
        sizes = np.einsum("mbk,nbk->mnb", np.abs(padded), np.abs(own))
        in_block = min(block, weight.columns)
    else:
        codes, x_scales = x
        sums = dots(codes, weight) * x_scales[:, None].astype(np.float64)
        sizes, in_block = np.abs(sums), 1
    y, size = (sums * scales).sum(-1) + bias, (sizes * scales).sum(-1) + np.abs(bias)
    roundings = in_block + scales.shape[1] + 3
    return y, f32_roundings(roundings) * size + F32_TINY * (in_block * scales + 1).sum(-1)


def assert_within(found: Floats, expected: Doubles, bound: Doubles) -> None:
    error = np.abs(found - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"{worst}: {found[worst]} for {expected[worst]}, may be off by {bound[worst]:.3e}"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("name", "kernel"), CODE_KERNELS)
def test_integers_are_numpys(name: str, kernel: str, columns: int) -> None:
    """With scales of 1 the output is the integer itself: of one block where the others are scaled by 0, and of all."""
    weight = make_weight(name, 70, columns, seed=columns)
    weight = QuantizedTensor(weight.format, weight.codes, torch.ones_like(weight.scales), 70, columns)
    weight.codes[0], weight.codes[1] = weight.format.code_min, weight.format.code_max
    block = weight.format.activation_block
    codes = np.random.default_rng(columns).integers(-127, 128, (70, columns)).astype(np.int8)
    codes[0], codes[1] = -127, 127
    expected = dots(codes, weight)
    assert np.abs(expected.sum(-1)).max() < 2**24, "fp32 does not hold these integers"
    padded = blocked(codes, block).astype(np.int8).reshape(70, -1)
    scales = np.ones((70, expected.shape[2]), np.float32)
    assert np.array_equal(linear((padded, scales), weight, kernel=kernel), expected.sum(-1))
    for b in range(expected.shape[2]):
        scales[:] = 0
        scales[:, b] = 1
        assert np.array_equal(linear((padded, scales), weight, kernel=kernel), expected[..., b])


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("given", "name", "kernel"), KERNELS)
def test_near_float64(given: str, name: str, kernel: str, columns: int) -> None:
    weight = make_weight(name, 70, columns, seed=columns)
    x = given_input(given, make_input(70, columns, seed=1), weight)
    bias = make_input(1, 70, seed=2)[0]
    assert_within(linear(x, weight, bias, kernel=kernel), *exact(x, weight, bias))
    assert_within(linear(x, weight, kernel=kernel), *exact(x, weight, np.zeros_like(bias)))


@pytest.mark.parametrize("columns", [1, 24, 33, 200, 1536])
@pytest.mark.parametrize(("given", "name", "kernel"), KERNELS)
def test_near_the_dequantized_weight(given: str, name: str, kernel: str, columns: int) -> None:
    """What PyTorch computes: the weight that the codes mean, and the input as `int8_block` models it."""
    weight = make_weight(name, 33, columns, seed=columns)
    x = make_input(9, columns, seed=1)
    seen = torch.from_numpy(x) if given == "f32" else int8_block(torch.from_numpy(x), weight.format.activation_block)
    meant, values = seen.double().numpy(), weight.dequantize().double().numpy()
    blocks = block_scales(weight).shape[1]
    # As in `exact`, and one rounding more of each of the two values that are multiplied.
    roundings = min(weight.format.activation_block, columns) + blocks + 5
    tiny = F32_TINY * (columns * (np.abs(values).max() + weight.scales.max().item()) + 2 * blocks)
    bound = f32_roundings(roundings) * (np.abs(meant) @ np.abs(values).T) + tiny
    assert_within(linear(given_input(given, x, weight), weight, kernel=kernel), meant @ values.T, bound)


@pytest.mark.parametrize("columns", [1, 33, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_scalar_form_adds_in_the_order_that_is_written(name: str, columns: int) -> None:
    """The same roundings in NumPy's float32, to the bit."""
    weight = make_weight(name, 17, columns, seed=columns)
    x, bias, block = make_input(9, columns, seed=1), make_input(1, 17, seed=2)[0], weight.format.activation_block
    codes, x_scales = quantized_input(x, block)
    of_codes = dots(codes, weight).astype(np.float32) * x_scales[:, None]
    of_values = np.zeros_like(of_codes)
    for k in range(columns):
        of_values[..., k // block] += x[:, None, k] * stored_codes(weight)[:, k].astype(np.float32)
    for given, sums in (("int8_block", of_codes), ("f32", of_values)):
        y = np.zeros((9, 17), np.float32)
        scales = block_scales(weight)
        for b in range(scales.shape[1]):
            y += sums[..., b] if weight.format.group_size is None else sums[..., b] * scales[:, b]
        if weight.format.group_size is None:
            y *= scales[:, 0]
        kernel = f"moss_linear_f32_{given}_{name}_scalar"
        assert np.array_equal(linear(given_input(given, x, weight), weight, bias, kernel=kernel), y + bias)


@pytest.mark.parametrize(("given", "name", "kernel"), KERNELS)
def test_rows_outputs_and_threads_change_nothing(given: str, name: str, kernel: str) -> None:
    """Any 1 to 70 rows, any outputs, any number of threads: the same bits."""
    weight = make_weight(name, 140, 48)
    x, bias = make_input(70, 48, seed=1), make_input(1, 140, seed=2)[0]
    whole = linear(given_input(given, x, weight), weight, bias, kernel=kernel)
    for rows in range(1, 71):
        some = given_input(given, x[70 - rows :], weight)
        assert np.array_equal(linear(some, weight, bias, kernel=kernel), whole[70 - rows :])
        fewer = QuantizedTensor(weight.format, weight.codes[rows:], weight.scales[rows:], 140 - rows, 48)
        own = linear(given_input(given, x[:3], weight), fewer, bias[rows:], kernel=kernel)
        assert np.array_equal(own, whole[:3, rows:])
    for threads in (2, 7):
        found = linear(given_input(given, x, weight), weight, bias, threads=threads, kernel=kernel)
        assert np.array_equal(found, whole)


@pytest.mark.parametrize(("name", "kernel"), CODE_KERNELS)
def test_rows_beyond_the_cache_change_nothing(name: str, kernel: str) -> None:
    """Inputs of a megabyte, which fast forms take in several pieces."""
    weight, x = make_weight(name, 20, 16000), make_input(70, 16000, seed=1)
    whole = linear(given_input("int8_block", x, weight), weight, kernel=kernel)
    for rows in (slice(0, 1), slice(20, 30), slice(47, 70)):
        assert np.array_equal(linear(given_input("int8_block", x[rows], weight), weight, kernel=kernel), whole[rows])


@pytest.mark.parametrize(("given", "name", "kernel"), KERNELS)
def test_zeros_leave_the_bias(given: str, name: str, kernel: str) -> None:
    weight, bias = make_weight(name, 20, 48), make_input(1, 20, seed=2)
    x = np.zeros((3, 48), np.float32)
    assert np.array_equal(linear(given_input(given, x, weight), weight, bias[0], kernel=kernel), bias.repeat(3, axis=0))
    empty = linear(given_input(given, x[:0], weight), weight, bias[0], kernel=kernel)
    assert empty.shape == (0, 20)


@pytest.mark.parametrize(("given", "name", "kernel"), KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_swallowed(given: str, name: str, kernel: str, bad: float) -> None:
    weight, x = make_weight(name, 20, 48), make_input(3, 48)
    weight.codes[:, 40] = 1
    x[1, 40] = bad
    y = linear(given_input(given, x, weight), weight, kernel=kernel)
    assert (~np.isfinite(y)).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(y[[0, 2]]).all()


def test_default_kernel_is_the_selected_one() -> None:
    weight, x = make_weight("int4_g32", 20, 48), make_input(3, 48)
    kernel = available("linear", numbers="f32_f32_int4_g32")[0]
    assert np.array_equal(linear(x, weight), linear(x, weight, kernel=kernel))


def test_a_planted_fault_would_show() -> None:
    """One code off by one, in a row of 300: the bounds are far below that."""
    weight, x, bias = make_weight("int4_g32", 5, 300), make_input(1, 300, seed=1), np.zeros(5, np.float32)
    expected, bound = exact(x, weight, bias)
    weight.codes[2, 150] -= 1 if weight.codes[2, 150] > -8 else -1
    moved = np.abs(linear(x, weight, bias) - expected)
    assert moved[0, 2] > 100 * bound[0, 2]
    assert bound[0, 2] < 1000 * F32_UNIT * np.abs(expected).max()


def test_wrong_arrays_are_refused() -> None:
    weight, x = make_weight("int4_g128", 20, 140), make_input(3, 140)
    codes, scales = quantized_input(x, 128)
    sums, y = block_sums(codes, 128), np.zeros((3, 20), np.float32)
    kernel = "moss_linear_f32_int8_block_int4_g128_scalar"
    packed = packed_weight(weight, "rows")

    def of_codes(codes: Codes = codes, scales: Floats = scales, y: Floats = y, packed: Bytes = packed) -> None:
        _native.linear_int8_block("int4_g128", codes, scales, sums, packed, None, y, threads=1, kernel=kernel)

    of_codes()
    with pytest.raises(ValueError, match="x_codes: has 140 columns, must have whole blocks of 128 for int4_g128"):
        of_codes(codes=np.ascontiguousarray(codes[:, :140]))
    with pytest.raises(ValueError, match=r"x_scales: shape is \[3, 1\], must be \[3, 2\]"):
        of_codes(scales=np.ascontiguousarray(scales[:, :1]))
    with pytest.raises(ValueError, match=r"packed: shape is \[2640\], must be \[2508\]"):
        of_codes(y=np.zeros((3, 19), np.float32))
    with pytest.raises(ValueError, match=r"packed: shape is \[2639\], must be \[2640\]"):
        of_codes(packed=packed[1:])
    with pytest.raises(ValueError, match=r"bias: shape is \[3\], must be \[20\]"):
        linear(x, weight, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"'moss_linear_f32_f32_int8_scalar' is not one of those .*_g128_scalar"):
        linear(x, weight, kernel="moss_linear_f32_f32_int8_scalar")
