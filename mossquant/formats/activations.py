# SPDX-License-Identifier: Apache-2.0
"""What targets do to the input of a linear layer, modelled in fp32: x [..., K] → the values that its codes mean.

    fp32            x
    int8_block      per row and block of G along K:  s = max|x| / 127,  q = round(x · (127 / max|x|)),  value = q · s
    int8_row_asym   per row, with a zero point z:   u = 255 / (max − min),  q = round(x · u) + z,  value = (q − z) / u

`int8_block` is what onnxruntime's MatMulNBits does at accuracy_level 4: every operation in fp32, the reciprocal
multiplied (dividing by s moves a few codes in a million), ties to even, the last block padded with zeros.
`int8_row_asym` follows XNNPACK's qd8 inputs (`xnn_qd8_asymmetric_quantization_params`), min and max widened to hold 0,
z in −128…127. All are dynamic: nothing is measured beforehand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.errors import InputError
from mossquant.formats import NumberFormat
from mossquant.model.forward import GATED, Activation, ExpertInput
from mossquant.model.tensors import TensorSpec

__all__ = [
    "ACTIVATION_FORMATS",
    "STATE_FORMATS",
    "ActivationFormat",
    "InputFormats",
    "activation_model",
    "expert_input_model",
    "get_activation_format",
    "int8_block",
    "int8_row_asym",
]

STATE_FORMATS = ("fp32",)
"""Formats in which a recurrent state is carried."""


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
        apply: (x [..., K], block) → the values that the codes mean; unblocked formats ignore the block.
    """

    name: str
    blocked: bool
    joins: bool
    apply: Callable[[Tensor, int], Tensor]


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
        raise InputError(f"unknown activation format {name[:40]!r}; known formats: {', '.join(ACTIVATION_FORMATS)}")
    return ACTIVATION_FORMATS[name]


class InputFormats(Protocol):
    """Says in which formats weights and the inputs of linear layers are: `mossquant.checkpoint.weights.Weights`."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Tensor name → what it is."""
        ...

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor; None where it is kept."""
        ...

    def activation(self, site: str) -> str:
        """The activation format of a site."""
        ...


def activation_model(source: InputFormats, name: str = "planned") -> Activation:
    """What a target does to the inputs of the linear layers, for `mossquant.model.forward.Forward`.

    Args:
        source: a quantized checkpoint or a plan.
        name: "planned", or the activation format to use at every site in place of the planned ones. Inputs of weights
            that are kept stay in fp32 either way.

    Returns:
        (weight tensor's name, x [..., K]) → x as the target sees it.

    Raises:
        InputError: no such activation format.
    """
    override = None if name == "planned" else get_activation_format(name)

    def seen(tensor: str, x: Tensor) -> Tensor:
        number_format, site = source.format(tensor), source.specs[tensor].site
        if number_format is None or site is None:
            return x
        return (override or ACTIVATION_FORMATS[source.activation(site)]).apply(x, number_format.activation_block)

    return seen


def expert_input_model(source: InputFormats, name: str = "planned") -> Callable[[str], ExpertInput | None]:
    """What a target rounds where experts are summed, for `Forward`; arguments as `activation_model`.

    XNNPACK sums neighbouring experts of one format with groups in one matmul, over their gated inputs side by side, and
    gives that vector one range. Weights with one scale a row cannot be laid side by side: each expert is a matmul of
    its own, of its own gated input. A block of int8_block belongs to one expert either way, and a positive gate in
    front changes none of its codes.

    Returns:
        Weight tensor's name → what is rounded; None where its format leaves that to the model.

    Raises:
        InputError: no such activation format.
    """
    override = None if name == "planned" else get_activation_format(name)

    def way(tensor: str) -> ExpertInput | None:
        number_format, site = source.format(tensor), source.specs[tensor].site
        if number_format is None or site is None or not (override or ACTIVATION_FORMATS[source.activation(site)]).joins:
            return None
        return GATED if number_format.group_size is None else ExpertInput(gated=True, joined=number_format.name)

    return way
