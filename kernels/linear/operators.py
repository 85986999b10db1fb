# SPDX-License-Identifier: Apache-2.0
"""The linear layer on quantized weights as the operator `mossquant::int8_block_linear` of PyTorch, on the CPU.

    y = x̂ Wᵀ,   x̂ the input in symmetric int8 codes with a scale for each row and block of columns

No arithmetic here: the kernels are in C++ (`quantize/quantize.h`, `linear/linear.h`).
"""

import numpy as np
import torch
from torch import Tensor

from mossquant.kernels import _native
from mossquant.kernels.tensors import array

__all__ = ["int8_block_linear", "pack"]


def pack(codes: Tensor, scales: Tensor, weight_format: str) -> Tensor:
    """Pack a weight for the best kernel that this machine can run.

    Args:
        codes: int8 [N, K], without padding.
        scales: float32 [N, 1], or bfloat16 [N, blocks].
        weight_format: "int8", "int8_g32", "int4_g32" or "int4_g128".

    Returns:
        uint8 [bytes], for `int8_block_linear` on this machine; not a form to store.

    Raises:
        ValueError: a wrong shape or type, or codes that the format does not have.
    """
    layout = _native.linear_layout("int8_block", weight_format, None)
    packed = np.zeros(_native.packed_bytes(layout, weight_format, *codes.shape), np.uint8)
    bits = scales.contiguous().view(torch.int16) if scales.dtype == torch.bfloat16 else scales.contiguous()
    own = array(bits)
    _native.pack(
        layout, weight_format, array(codes.contiguous()), own.view(np.uint16) if own.dtype == np.int16 else own, packed
    )
    return torch.from_numpy(packed)


@torch.library.custom_op("mossquant::int8_block_linear", mutates_args=(), device_types="cpu")
def int8_block_linear(x: Tensor, packed: Tensor, weight_format: str, outputs: int) -> Tensor:
    """x float32 [..., K], quantized row by row, times a packed weight [N, K] → float32 [..., N].

    Args:
        x: the input.
        packed: as `pack` gives it.
        weight_format: that of the weight.
        outputs: N.

    Raises:
        ValueError: another type, or sizes that contradict one another.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(rows), outputs)
    _native.quantized_linear(weight_format, array(rows), array(packed), None, array(y), threads=torch.get_num_threads())
    return y.view(*x.shape[:-1], outputs)


@int8_block_linear.register_fake
def _(x: Tensor, packed: Tensor, weight_format: str, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
