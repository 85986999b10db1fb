# SPDX-License-Identifier: Apache-2.0
"""Packed weights: what C++ packs NumPy unpacks, and the reverse, by the table of layout.h."""

import numpy as np
import pytest
import torch

from mossquant.formats import FORMATS, QuantizedTensor
from mossquant.kernels import _native

from .linears import COLUMNS, Bytes, make_weight, packed_weight, stored_codes, stored_scales

LAYOUTS = {"rows": (1, 1), "x86": (16, 4), "arm": (8, 8)}
"""Outputs in a strip, and neighbouring columns of one output in it (layout.h)."""


def numpy_pack(weight: QuantizedTensor, layout: str) -> Bytes:
    """By the table of layout.h, with reshapes of the whole matrix."""
    strip, width = LAYOUTS[layout]
    codes, block = stored_codes(weight), weight.format.activation_block
    codes = np.pad(codes, ((0, -weight.rows % strip), (0, -weight.columns % block))).view(np.uint8)
    if weight.format.bits == 8:
        codes = codes + np.uint8(128 if layout == "x86" else 0)
        steps = codes.reshape(-1, strip, codes.shape[1] // width, width)
        codes = steps.transpose(0, 2, 1, 3)
    else:
        codes = codes + np.uint8(0 if layout == "arm" else 8) & np.uint8(15)
        width = min(width, 16)
        halves = codes.reshape(-1, strip, codes.shape[1] // 32, 2, 16 // width, width)
        codes = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(0, 2, 3, 1, 4)
    scales = np.pad(stored_scales(weight), ((0, -weight.rows % strip), (0, 0)))
    scales = np.ascontiguousarray(scales.reshape(-1, strip, scales.shape[1]).transpose(0, 2, 1))
    strips = len(scales)
    packed = np.concatenate([codes.reshape(strips, -1), scales.view(np.uint8).reshape(strips, -1)], axis=1)
    return np.pad(packed, ((0, 0), (0, 0 if layout == "rows" else -packed.shape[1] % 64))).reshape(-1)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_here_unpacked_there(layout: str, name: str, columns: int) -> None:
    for outputs in (1, 2, 7, 70):
        weight = make_weight(name, outputs, columns, seed=columns)
        codes, scales = stored_codes(weight), stored_scales(weight)
        packed = packed_weight(weight, layout)
        assert np.array_equal(packed, numpy_pack(weight, layout))
        found_codes, found_scales = np.full_like(codes, 99), np.zeros_like(scales)
        _native.unpack(layout, name, packed, found_codes, found_scales)
        assert np.array_equal(found_codes, codes)
        assert np.array_equal(found_scales, scales)
        row, values = outputs - 1, np.zeros(columns, np.float32)
        _native.packed_row(layout, name, packed, outputs, row, values)
        assert np.array_equal(values, weight.dequantize()[row].numpy())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("layout", "strip"), [(name, strip) for name, (strip, _) in LAYOUTS.items()])
def test_outputs_from_a_strip_on_are_a_slice(layout: str, strip: int, name: str) -> None:
    parts = [make_weight(name, rows, 48, seed=seed) for seed, rows in enumerate((strip, 2 * strip, 7))]
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts])
    whole = packed_weight(QuantizedTensor(FORMATS[name], codes, scales, 3 * strip + 7, 48), layout)
    assert np.array_equal(whole, np.concatenate([packed_weight(part, layout) for part in parts]))


def test_bytes() -> None:
    """Blocks of codes, then the scales: by hand."""
    expected = {"int8": 64 + 4, "int8_g32": 64 + 2 * 2, "int4_g32": 32 + 2 * 2, "int4_g128": 64 + 2}
    assert {name: _native.packed_bytes("rows", name, 1, 48) for name in FORMATS} == expected
    strips = {name: -(-16 * size // 64) * 64 for name, size in expected.items()}
    assert {name: _native.packed_bytes("x86", name, 17, 48) for name in FORMATS} == {
        name: 2 * size for name, size in strips.items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_codes_that_a_format_lacks_are_refused(name: str) -> None:
    number_format = FORMATS[name]
    weight = make_weight(name, 3, 40)
    for code in (number_format.code_min - 1, number_format.code_max + 1):
        if code > 127:
            continue
        codes = stored_codes(weight).copy()
        codes[2, 39] = code
        packed = np.zeros(_native.packed_bytes("rows", name, 3, 40), np.uint8)
        with pytest.raises(ValueError, match=rf"codes: must lie in {number_format.code_min} \.\. \d+ for {name}"):
            _native.pack("rows", name, codes, stored_scales(weight), packed)


def test_wrong_arrays_are_refused() -> None:
    weight = make_weight("int4_g32", 3, 40)
    codes, scales = stored_codes(weight), stored_scales(weight)
    packed = packed_weight(weight, "rows")
    with pytest.raises(ValueError, match="weight_format: 'int5' is not one of int8, int8_g32, int4_g32, int4_g128"):
        _native.pack("rows", "int5", codes, scales, packed)
    with pytest.raises(ValueError, match="layout: 'columns' is not one of rows, x86, arm"):
        _native.pack("columns", "int4_g32", codes, scales, packed)
    with pytest.raises(ValueError, match="scales: dtype must be uint16"):
        _native.pack("rows", "int4_g32", codes, scales.astype(np.float32), packed)
    with pytest.raises(ValueError, match="scales: dtype must be float32"):
        _native.pack("rows", "int8", codes, scales, packed)
    with pytest.raises(ValueError, match=r"scales: shape is \[3, 2\], must be \[3, 1\]"):
        _native.pack("rows", "int8", codes, scales.astype(np.float32), packed)
    with pytest.raises(ValueError, match=r"packed: shape is \[108\], must be \[198\]"):
        _native.unpack("rows", "int4_g128", packed, codes[:, :32].copy(), scales[:, :1].copy())
    with pytest.raises(ValueError, match=r"columns: must be 1 \.\. 2\^40, is 0"):
        _native.packed_bytes("rows", "int8", 1, 0)
    with pytest.raises(ValueError, match=r"columns: must be 1 \.\. 2\^40, is 9223372036854775807"):
        _native.packed_bytes("rows", "int8", 1, 2**63 - 1)
