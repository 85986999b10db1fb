# SPDX-License-Identifier: Apache-2.0
"""Linears of quantized weights with `int8_block` inputs, computed by our kernels from the codes of both."""

from torch import Tensor

from mossquant.checkpoint.weights import Weights
from mossquant.kernels import selected
from mossquant.kernels.linear import int8_block_linear, pack
from mossquant.model.forward import Product

_FORMAT = "int8_block"


def product_of(weights: Weights, activations: str) -> Product | None:
    """Pack what is quantized and sees `int8_block` inputs.

    Args:
        weights: says formats and codes.
        activations: "planned", or the activation format that is used at every site.

    Returns:
        For `Forward.product`; None where this machine has no fast kernels: scalar ones are slower than a matmul.
    """
    if selected("linear", numbers=f"f32_{_FORMAT}_int4_g32").endswith("_scalar"):
        return None
    packed: dict[str, tuple[Tensor, str, int]] = {}
    for name, spec in weights.specs.items():
        number_format = weights.format(name)
        if number_format is None or spec.site is None:
            continue
        if (weights.activation(spec.site) if activations == "planned" else activations) != _FORMAT:
            continue
        weight = weights.quantized(name)
        own = pack(weight.codes[:, : weight.columns], weight.scales, number_format.name)
        packed[name] = (own, number_format.name, weight.rows)

    def product(name: str, x: Tensor) -> Tensor | None:
        return int8_block_linear(x, *packed[name]) if name in packed else None

    return product
