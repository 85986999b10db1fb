# SPDX-License-Identifier: Apache-2.0
"""Packed weights: what C++ packs NumPy unpacks, and the reverse, by the layout that packed.h describes."""

import numpy as np
import pytest
import torch

from mossquant.formats import FORMATS, QuantizedTensor
from mossquant.kernels import _native

from .linears import COLUMNS, Bytes, make_weight, packed_weight, stored_codes, stored_scales


def padded_codes(weight: QuantizedTensor) -> Bytes:
    """Codes as bytes, with the padding of the kernels: whole blocks."""
    codes = stored_codes(weight)
    return np.pad(codes, ((0, 0), (0, -weight.columns % weight.format.activation_block))).view(np.uint8)


def numpy_pack(weight: QuantizedTensor) -> Bytes:
    codes = padded_codes(weight)
    if weight.format.bits == 4:
        halves = (codes + np.uint8(8)).reshape(weight.rows, -1, 2, 16)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(weight.rows, -1)
    scales = np.ascontiguousarray(stored_scales(weight)).view(np.uint8)
    return np.concatenate([codes, scales], axis=1)


def numpy_unpack_codes(packed: Bytes, weight: QuantizedTensor) -> Bytes:
    count = padded_codes(weight).shape[1]
    codes = packed[:, : count * weight.format.bits // 8]
    if weight.format.bits == 4:
        pairs = codes.reshape(weight.rows, -1, 1, 16)
        codes = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(weight.rows, -1) - np.uint8(8)
    return codes


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", FORMATS)
def test_packed_here_unpacked_there(name: str, columns: int) -> None:
    for outputs in (1, 2, 7, 70):
        weight = make_weight(name, outputs, columns, seed=columns)
        codes, scales = stored_codes(weight), stored_scales(weight)
        packed = packed_weight(weight)
        assert np.array_equal(packed, numpy_pack(weight))
        assert np.array_equal(numpy_unpack_codes(packed, weight), padded_codes(weight))
        found_codes, found_scales = np.full_like(codes, 99), np.zeros_like(scales)
        _native.unpack(name, numpy_pack(weight), found_codes, found_scales)
        assert np.array_equal(found_codes, codes)
        assert np.array_equal(found_scales, scales)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_one_expert_are_a_slice(name: str) -> None:
    experts = [make_weight(name, 7, 48, seed=seed) for seed in range(3)]
    codes = torch.cat([expert.codes for expert in experts])
    scales = torch.cat([expert.scales for expert in experts])
    stacked = packed_weight(QuantizedTensor(FORMATS[name], codes, scales, 21, 48))
    for e, expert in enumerate(experts):
        assert np.array_equal(stacked[7 * e : 7 * (e + 1)], packed_weight(expert))


def test_row_bytes() -> None:
    """Blocks of codes, then the scales: by hand."""
    expected = {"int8": 64 + 4, "int8_g32": 64 + 2 * 2, "int4_g32": 32 + 2 * 2, "int4_g128": 64 + 2}
    assert {name: _native.packed_row_bytes(name, 48) for name in FORMATS} == expected


@pytest.mark.parametrize("name", FORMATS)
def test_codes_that_a_format_lacks_are_refused(name: str) -> None:
    number_format = FORMATS[name]
    weight = make_weight(name, 3, 40)
    for code in (number_format.code_min - 1, number_format.code_max + 1):
        if code > 127:
            continue
        codes = stored_codes(weight).copy()
        codes[2, 39] = code
        packed = np.zeros((3, _native.packed_row_bytes(name, 40)), np.uint8)
        with pytest.raises(ValueError, match=rf"codes: must lie in {number_format.code_min} \.\. \d+ for {name}"):
            _native.pack(name, codes, stored_scales(weight), packed)


def test_wrong_arrays_are_refused() -> None:
    weight = make_weight("int4_g32", 3, 40)
    codes, scales = stored_codes(weight), stored_scales(weight)
    packed = packed_weight(weight)
    with pytest.raises(ValueError, match="weight_format: 'int5' is not one of int8, int8_g32, int4_g32, int4_g128"):
        _native.pack("int5", codes, scales, packed)
    with pytest.raises(ValueError, match="scales: dtype must be uint16"):
        _native.pack("int4_g32", codes, scales.astype(np.float32), packed)
    with pytest.raises(ValueError, match="scales: dtype must be float32"):
        _native.pack("int8", codes, scales, packed)
    with pytest.raises(ValueError, match=r"scales: shape is \[3, 2\], must be \[3, 1\]"):
        _native.pack("int8", codes, scales.astype(np.float32), packed)
    with pytest.raises(ValueError, match=r"packed: shape is \[3, 36\], must be \[3, 66\]"):
        _native.unpack("int4_g128", packed[:, :36].copy(), codes[:, :32].copy(), scales[:, :1].copy())
    with pytest.raises(ValueError, match=r"columns: must be 1 \.\. 2\^40, is 0"):
        _native.packed_row_bytes("int8", 0)
    with pytest.raises(ValueError, match=r"columns: must be 1 \.\. 2\^40, is 9223372036854775807"):
        _native.packed_row_bytes("int8", 2**63 - 1)
