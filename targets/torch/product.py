# SPDX-License-Identifier: Apache-2.0
"""Linears of quantized weights with `int8_block` inputs, computed by our kernels from the codes of both."""

from functools import cache

from torch import Tensor

from mossquant.checkpoint.weights import Weights
from mossquant.formats import NumberFormat
from mossquant.kernels.linear import int8_block_linear, pack
from mossquant.model.forward import Product
from mossquant.targets.torch.blocks import FORMAT, fast_kernels


def product_of(weights: Weights, activations: str) -> Product | None:
    """What computes linears that are quantized and see `int8_block` inputs; each is packed when it is first asked for.

    Args:
        weights: says formats and codes.
        activations: "planned", or the activation format that is used at every site.

    Returns:
        For `Forward.product`; None where this machine has no fast kernels: scalar ones are slower than a matmul.
    """
    if not fast_kernels():
        return None
    own: dict[str, NumberFormat] = {}
    for name, spec in weights.specs.items():
        number_format = weights.format(name)
        if number_format is None or spec.site is None:
            continue
        if (weights.activation(spec.site) if activations == "planned" else activations) != FORMAT:
            continue
        own[name] = number_format

    @cache
    def packed(name: str) -> tuple[Tensor, str, int]:
        weight = weights.quantized(name)
        codes = weight.codes[:, : weight.columns]
        return pack(codes, weight.scales, own[name].name), own[name].name, weight.rows

    def product(name: str, x: Tensor) -> Tensor | None:
        return int8_block_linear(x, *packed(name)) if name in own else None

    return product
