# SPDX-License-Identifier: Apache-2.0
"""Codes and scales in the layout of onnxruntime's MatMulNBits and GatherBlockQuantized; values are never changed.

    codes  int8 [N, K]    →  uint8 [N, blocks, block · bits / 8]: code + 2^(bits−1), first code in the low bits
    scales [N, groups]    →  as they are; one a row is spread over the blocks in the graph

K is padded to whole blocks with code 0. A block is the format's `activation_block`: the group, or 32 where a row has
one scale.
"""

from collections.abc import Iterable
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.files.space import row_blocks
from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.formats.nibbles import pack_nibbles

_ONNX_NAMES = {"float32": "FLOAT"}
DTYPES = {dtype: ir.DataType[_ONNX_NAMES.get(name, name.upper())] for name, dtype in FLOAT_DTYPES.items()}
"""ONNX's type for each float type of ours."""


def blocks_of(number_format: NumberFormat, columns: int) -> int:
    """Blocks of a row of `columns` columns."""
    return -(-columns // number_format.activation_block)


def padded_codes(tensor: QuantizedTensor, rows: slice = slice(None)) -> NDArray[np.int8]:
    """Codes [N, blocks · block] of these rows: what the checkpoint holds, padded with zeros to whole blocks."""
    codes: NDArray[np.int8] = tensor.codes[rows].numpy()
    block = tensor.format.activation_block
    width = blocks_of(tensor.format, tensor.columns) * block
    return np.pad(codes, ((0, 0), (0, width - codes.shape[1])))


def packed_codes(codes: NDArray[np.int8], number_format: NumberFormat) -> NDArray[np.uint8]:
    """Codes [N, blocks · block] → bytes [N, blocks, block · bits / 8]."""
    block, bits = number_format.activation_block, number_format.bits
    packed = pack_nibbles(codes) if bits == 4 else codes.view(np.uint8) + np.uint8(128)
    return packed.reshape(codes.shape[0], -1, block * bits // 8)


def packed_matrix(
    tensors: Iterable[QuantizedTensor], shape: tuple[int, int, int], *, axis: Literal[0, 1]
) -> NDArray[np.uint8]:
    """Tensors of one format and size, one after the other along an axis, as bytes [N, blocks, block · bits / 8].

    Each is taken when its turn comes and packed in blocks of rows, so that beside the result the codes of one are held.
    """
    packed = np.empty(shape, np.uint8)
    first = 0
    for tensor in tensors:
        blocks = blocks_of(tensor.format, tensor.columns)
        for rows in row_blocks(tensor.rows, tensor.columns):
            codes = packed_codes(padded_codes(tensor, rows), tensor.format)
            if axis == 0:
                packed[first + rows.start : first + rows.stop] = codes
            else:
                packed[rows, first : first + blocks] = codes
        first += tensor.rows if axis == 0 else blocks
    assert first == shape[axis], (first, shape)
    return packed


def to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """A tensor as an array of the same type, bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[np.generic] = tensor.numpy()
    return array
