# SPDX-License-Identifier: Apache-2.0
"""x · Wᵀ in fp32 on the CPU by oneDNN, with gradients: where PyTorch's own product takes MKL, which uses half the width
of some machines' vectors.

oneDNN makes code for each shape that it meets, and experts meet another number of rows every time: rows are padded with
zeros to a multiple of `ROWS`, so that there are few shapes.

Gradients are half of the work. Where the machine multiplies bf16 they are products of values rounded to bf16, summed in
fp32 and rounded once more, at twice the speed: noise of at most 2⁻⁸ of each value is little beside that of a few
windows of text. What is computed forward, and so the loss, stays in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32
"""Numbers of rows are multiples of this."""
_HAVE_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
MULTIPLIES_BF16: bool = _HAVE_ONEDNN and torch.cpu._is_avx512_bf16_supported()
"""Whether gradients are multiplied in bf16: decides their last bits."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, K] · weight [N, K]ᵀ → [n, N]; by PyTorch itself for other types and devices. No gradients."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _HAVE_ONEDNN:
        return F.linear(x, weight)
    return _by_onednn(x, weight)


def gradient(x: Tensor, weight: Tensor) -> Tensor:
    """`product` that makes a gradient: bf16 in and out, with sums in fp32, where that is faster. The type of x."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not MULTIPLIES_BF16:
        return product(x, weight)
    return _by_onednn(x.bfloat16(), weight.bfloat16()).float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ → [..., N], with gradients."""
    made: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], -1)


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x), weight, None, "none", [], "")
    return made[: len(x)]


def _padded(x: Tensor) -> Tensor:
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = gradient(grads[0], weight.T) if ctx.needs_input_grad[0] else None
        d_weight = gradient(_padded(grads[0]).T, _padded(x).T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight
