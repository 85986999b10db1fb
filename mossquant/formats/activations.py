# SPDX-License-Identifier: Apache-2.0
"""What targets do to the input of a linear layer, modelled in fp32: x [..., K] → the values that its codes mean.

    fp32            x
    int8_block      per row and block of G along K:  s = max|x| / 127,  q = round(x · (127 / max|x|)),  value = q · s
    int8_row_asym   per row, with a zero point z:   u = 255 / (max − min),  q = round(x · u) + z,  value = (q − z) / u

`int8_block` is what onnxruntime's MatMulNBits does at accuracy_level 4: every operation in fp32, the reciprocal
multiplied (dividing by s moves a few codes in a million), ties to even, the last block padded with zeros.
`int8_row_asym` follows XNNPACK's qd8 inputs (`xnn_qd8_asymmetric_quantization_params`), min and max widened to hold 0,
z in −128…127. All are dynamic: nothing is measured beforehand. Gradients pass straight through (Bengio, Léonard &
Courville 2013): that of x is that of the value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.errors import InputError


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x), with the gradient of x itself. x + (rounding(x) − x) would move the values by a rounding more."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounding(x)
    exact = x.detach()
    rounded = rounding(exact)
    if rounded is exact:
        return x
    passed: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return passed


def int8_block(x: Tensor, block: int) -> Tensor:
    """x [..., K] as symmetric int8 codes mean it, one scale per row and `block` values; same shape and type."""
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % block)).reshape(*x.shape[:-1], -(-columns // block), block)
    largest = padded.abs().amax(-1, keepdim=True)
    reciprocal = torch.where(largest > 0, 127 / largest, 0.0)
    # Near the smallest floats 127 / largest overflows; such a block counts as zero, as its products do.
    reciprocal = torch.where(torch.isinf(reciprocal), 0.0, reciprocal)
    values = torch.round(padded * reciprocal) * (largest / 127)
    return values.flatten(-2)[..., :columns].to(x.dtype)


def int8_row_asym(x: Tensor) -> Tensor:
    """x [..., K] as int8 codes mean it, one scale and zero point per row; same shape and type."""
    exact = x.float()
    low = exact.amin(-1, keepdim=True).clamp(max=0)
    high = exact.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(high == low, 1.0, 255 / (high - low))
    # Near the smallest floats 255 / (high − low) overflows; such a row counts as zero, as its products do.
    tiny = torch.isinf(scale)
    exact, scale = torch.where(tiny, 0.0, exact), torch.where(tiny, 1.0, scale)
    low, high = torch.where(tiny, 0.0, low), torch.where(tiny, 0.0, high)
    from_low, from_high = -128 - low * scale, 127 - high * scale
    # Of the two ends, the one where the zero point is represented with the smaller error decides.
    nearer_low = (-128 + low * scale) + (127 + high * scale) > 0
    zero = torch.where(nearer_low, from_low, from_high).clamp(-128, 127).round()
    codes = (torch.round(exact * scale) + zero).clamp(-128, 127)
    return ((codes - zero) * (1 / scale)).to(x.dtype)


@dataclass(frozen=True)
class ActivationFormat:
    """A format of the inputs of linear layers.

    Attributes:
        name: the name used in recipes, plans and reports.
        blocked: whether a scale covers a block of values (the weight's group, 32 where weights have one scale a row).
        joins: whether a target of this format rounds the inputs of experts that it sums behind their gates, and, where
            weights have groups, those of all experts as one vector.
        rounding: (x [..., K], block) → the values that the codes mean; unblocked formats ignore the block.
    """

    name: str
    blocked: bool
    joins: bool
    rounding: Callable[[Tensor, int], Tensor]

    def apply(self, x: Tensor, block: int) -> Tensor:
        """x [..., K] as its codes mean it, gradients straight through."""
        return straight_through(x, lambda values: self.rounding(values, block))


ACTIVATION_FORMATS: dict[str, ActivationFormat] = {
    known.name: known
    for known in (
        ActivationFormat("fp32", False, False, lambda x, block: x),
        ActivationFormat("int8_block", True, False, int8_block),
        ActivationFormat("int8_row_asym", False, True, lambda x, block: int8_row_asym(x)),
    )
}
"""Every activation format, by the name that recipes use."""


def get_activation_format(name: str) -> ActivationFormat:
    """The activation format of that name.

    Raises:
        InputError: no such format; the known names are listed.
    """
    if name not in ACTIVATION_FORMATS:
        raise InputError.unknown("activation format", name, ACTIVATION_FORMATS)
    return ACTIVATION_FORMATS[name]
