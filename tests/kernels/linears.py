# SPDX-License-Identifier: Apache-2.0
"""What the tests of the linear kernels share: weights, inputs, and the kernels with outputs of their own."""

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.formats import FORMATS, QuantizedTensor
from mossquant.kernels import _native

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]

COLUMNS = (1, 16, 31, 32, 33, 48, 100, 128, 129, 200, 300)
"""Around the blocks (32, 128), narrower than one, and lengths of a dt_rank."""

SIZES = (1.0, 1e-12, 1e-30, 1e-36, 1e-41, 1e30)
"""Of the inputs of hostile rows: ordinary, small, around where 127 / x overflows, denormal, large."""


def make_weight(name: str, outputs: int, columns: int, *, seed: int = 0) -> QuantizedTensor:
    """Every code of the format, and scales over a few powers of two."""
    number_format = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(outputs, number_format.padded_columns(columns), dtype=torch.int8)
    low, high = number_format.code_min, number_format.code_max + 1
    codes[:, :columns] = torch.randint(low, high, (outputs, columns), generator=generator, dtype=torch.int8)
    scales = torch.exp(torch.randn(outputs, number_format.groups(columns), generator=generator) - 4)
    return QuantizedTensor(number_format, codes, number_format.round_scales(scales), outputs, columns)


def make_input(rows: int, columns: int, *, seed: int = 0) -> Floats:
    """Rows of very different sizes, one of zeros, one of negative numbers only, where there are so many."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, columns)) * np.resize(SIZES, (rows, 1))
    x[6:7] = 0
    x[7:8] = -np.abs(x[7:8])
    return x.astype(np.float32)


def stored_codes(weight: QuantizedTensor) -> Codes:
    """[N, K], without the padding of the checkpoint."""
    return np.ascontiguousarray(weight.codes[:, : weight.columns].numpy())


def stored_scales(weight: QuantizedTensor) -> NDArray[np.generic]:
    """As `pack` takes them: fp32, or the bits of bf16."""
    if weight.scales.dtype == torch.bfloat16:
        return weight.scales.view(torch.int16).numpy().view(np.uint16)
    return weight.scales.numpy()


def packed_weight(weight: QuantizedTensor, layout: str) -> Bytes:
    name = weight.format.name
    packed = np.zeros(_native.packed_bytes(layout, name, weight.rows, weight.columns), np.uint8)
    _native.pack(layout, name, stored_codes(weight), stored_scales(weight), packed)
    return packed


def quantized_input(x: Floats, block: int, *, kernel: str | None = None) -> tuple[Codes, Floats]:
    """Codes [M, C] and scales [M, blocks] as the kernel makes them, and their sums as they should be."""
    blocks = -(-x.shape[1] // block)
    codes = np.full((len(x), blocks * block), 99, np.int8)
    scales = np.full((len(x), blocks), np.nan, np.float32)
    sums = np.full((len(x), blocks), 99, np.int32)
    _native.quantize_int8_block(x, codes, scales, sums, block=block, kernel=kernel)
    assert np.array_equal(sums, block_sums(codes, block))
    return codes, scales


def block_sums(codes: Codes, block: int) -> NDArray[np.int32]:
    """[M, blocks]"""
    return codes.reshape(len(codes), codes.shape[1] // block, block).sum(2, dtype=np.int32)


def linear(
    x: Floats | tuple[Codes, Floats],
    weight: QuantizedTensor,
    bias: Floats | None = None,
    *,
    threads: int = 1,
    kernel: str | None = None,
) -> Floats:
    """y [M, N] of an input in fp32, or of codes and scales; the weight packed as the kernel wants it."""
    name, block = weight.format.name, weight.format.activation_block
    given = "f32" if isinstance(x, np.ndarray) else "int8_block"
    packed = packed_weight(weight, _native.linear_layout(given, name, kernel))
    rows = len(x) if isinstance(x, np.ndarray) else len(x[0])
    y = np.full((rows, weight.rows), np.nan, np.float32)
    if isinstance(x, np.ndarray):
        _native.linear_f32(name, x, packed, bias, y, threads=threads, kernel=kernel)
    else:
        _native.linear_int8_block(name, *x, block_sums(x[0], block), packed, bias, y, threads=threads, kernel=kernel)
    return y
