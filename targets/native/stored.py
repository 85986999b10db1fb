# SPDX-License-Identifier: Apache-2.0
"""How a tensor is stored in a .moss: packed as libmoss reads it, and padded with zeros to whole lines of 64 bytes.

Matrices of linears and tables are packed in the layout of the file, everything smaller in the layout `rows`; what is
kept lies there as its values. Of in_proj the rows of x and those of z are packed each by themselves: to libmoss they
are two matrices (docs/native.md).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.files.space import BLOCK_WEIGHTS
from mossquant.formats import FORMATS, NumberFormat, QuantizedTensor
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.kernels import _native
from mossquant.model.tensors import TensorSpec, Use
from mossquant.targets.native.metadata import Layout

ALIGNMENT = 64
"""Bytes at multiples of which tensors begin: a line of the cache, and the widest vector."""

_STRIP = 16
"""Rows that a block is a multiple of: every layout's strips divide it."""
_MULTIPLIED = {Use.LINEAR, Use.SUMMED, Use.TABLE}
_PACKED_BY_PART = "ssm.in_proj"


class Block(NamedTuple):
    """Rows of a matrix that are packed at once, and where their bytes lie in the stored tensor."""

    rows: slice
    bytes: slice


def layout_of(spec: TensorSpec, layout: Layout) -> Layout:
    """The layout that a quantized tensor is packed in, in a file of some layout."""
    return layout if spec.use & _MULTIPLIED else "rows"


def stored_bytes(spec: TensorSpec, storage: str, layout: Layout) -> int:
    """Bytes of a tensor in the file, with the padding behind it.

    Args:
        spec: the tensor.
        storage: its number format, or the type in which it is kept.
        layout: of the file.
    """
    if storage in FLOAT_DTYPES:
        return _padded(spec.count * FLOAT_DTYPES[storage].itemsize)
    return _padded(packed_size(spec, FORMATS[storage], layout))


def packed_size(spec: TensorSpec, number_format: NumberFormat, layout: Layout) -> int:
    """Bytes of a quantized tensor, without the padding behind it."""
    return sum(_packed_bytes(spec, number_format, layout, rows) for rows in _parts(spec))


def blocks(spec: TensorSpec, number_format: NumberFormat, layout: Layout) -> Iterator[Block]:
    """The blocks of rows of a quantized tensor, in the order of their bytes; no block is large."""
    begin = 0
    step = max(_STRIP, BLOCK_WEIGHTS // spec.matrix_shape[1] // _STRIP * _STRIP)
    for part in _parts(spec):
        for first in range(part.start, part.stop, step):
            rows = slice(first, min(first + step, part.stop))
            end = begin + _packed_bytes(spec, number_format, layout, rows)
            yield Block(rows, slice(begin, end))
            begin = end


def packed_blocks(tensor: QuantizedTensor, spec: TensorSpec, layout: Layout) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a quantized tensor, without the padding behind it, block by block."""
    codes = tensor.codes.numpy()[:, : tensor.columns]
    for rows, _ in blocks(spec, tensor.format, layout):
        yield pack(tensor.format, codes[rows], tensor.scales[rows], layout_of(spec, layout))


def pack(number_format: NumberFormat, codes: NDArray[np.int8], scales: Tensor, layout: Layout) -> NDArray[np.uint8]:
    """Codes [rows, columns] without padding and scales [rows, groups] as libmoss reads them."""
    packed = np.empty(_native.packed_bytes(layout, number_format.name, *codes.shape), np.uint8)
    _native.pack(layout, number_format.name, np.ascontiguousarray(codes), _bits(scales.contiguous()), packed)
    return packed


def unpack(
    number_format: NumberFormat, packed: NDArray[np.uint8], rows: int, columns: int, layout: Layout
) -> tuple[NDArray[np.int8], Tensor]:
    """The inverse of `pack`."""
    codes = np.empty((rows, columns), np.int8)
    scales = torch.empty((rows, number_format.groups(columns)), dtype=number_format.scale_dtype)
    _native.unpack(layout, number_format.name, np.ascontiguousarray(packed), codes, _bits(scales))
    return codes, scales


def kept_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The values of a kept tensor as bytes; nothing is copied."""
    values: NDArray[np.uint8] = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return values


def _bits(scales: Tensor) -> NDArray[np.generic]:
    """Scales as the kernels take them: bf16 as its bits."""
    array: NDArray[np.generic] = scales.view(torch.uint16).numpy() if scales.dtype == torch.bfloat16 else scales.numpy()
    return array


def _parts(spec: TensorSpec) -> list[slice]:
    """Ranges of rows that are packed each by themselves."""
    if spec.role != _PACKED_BY_PART:
        return [slice(0, spec.matrix_shape[0])]
    ends = np.cumsum([rows for _, rows in spec.parts]).tolist()
    return [slice(begin, end) for begin, end in pairwise([0, *ends])]


def _packed_bytes(spec: TensorSpec, number_format: NumberFormat, layout: Layout, rows: slice) -> int:
    count, columns = rows.stop - rows.start, spec.matrix_shape[1]
    return _native.packed_bytes(layout_of(spec, layout), number_format.name, count, columns)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
