# SPDX-License-Identifier: Apache-2.0
"""The layout of codes in an .onnx, against bytes worked out by hand and against an unpacking of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mossquant.formats import FORMATS
from mossquant.targets.onnx.packing import blocks_of, packed_codes, padded_codes, to_numpy


def test_four_bits_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, :4] = [-8, 7, 0, -1]
    packed = packed_codes(codes, FORMATS["int4_g32"])
    assert packed.shape == (1, 1, 16)
    # Stored codes are 0, 15, 8, 7 and 8 for the zeros that follow; the first of a pair has the low bits.
    assert packed[0, 0].tolist() == [0xF0, 0x78] + [0x88] * 14


def test_eight_bits_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, :3] = [-127, 127, -1]
    assert packed_codes(codes, FORMATS["int8"])[0, 0].tolist() == [1, 255, 127] + [128] * 29


@pytest.mark.parametrize("name", FORMATS)
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 100))
def test_unpacked_codes_are_the_codes(name: str, rows: int, columns: int, seed: int) -> None:
    form = FORMATS[name]
    matrix = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    tensor = form.quantize(matrix, form.absmax_scales(matrix))
    packed = packed_codes(padded_codes(tensor), form)
    block, blocks = form.activation_block, blocks_of(form, columns)
    assert packed.shape == (rows, blocks, block * form.bits // 8)
    flat = packed.reshape(rows, -1).astype(int)
    if form.bits == 4:
        flat = np.stack((flat % 16, flat // 16), -1).reshape(rows, -1)
    codes = flat - 2 ** (form.bits - 1)
    np.testing.assert_array_equal(codes[:, :columns], tensor.codes[:, :columns].numpy())
    assert not codes[:, columns:].any()


def test_bfloat16_keeps_its_type_and_bits() -> None:
    tensor = torch.tensor([[1.0, -2.5], [3e38, 1e-30]]).to(torch.bfloat16).T
    array = to_numpy(tensor)
    assert array.dtype.name == "bfloat16"
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
