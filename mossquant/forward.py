# SPDX-License-Identifier: Apache-2.0
"""How one pass through the model is computed: which form of the scan, in which type, with which activations.

A pass is the same arithmetic whatever its `Forward`; only what is said here differs. `activation` models what a target
does to the input of a linear layer (int8 blocks, for example); `tap` shows intermediate values to whoever asks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.routing import Routing
from mossquant.scan import Form

__all__ = ["Activation", "Convolve", "Forward", "Reroute", "Tap"]

Activation = Callable[[str, Tensor], Tensor]
"""(weight tensor's name, input [..., K]) → the input as the target sees it."""
Convolve = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Reroute = Callable[[str, Routing], Routing]
Tap = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Forward:
    """One way to run the model.

    Attributes:
        form: scan form; "step" takes one token.
        activation: models quantized inputs of the linears; None leaves them as they are.
        matmul_dtype: type in which linears multiply (accumulated in fp32), None for the parameters' own.
        dense_ssm: all SSM experts in stacked matmuls instead of the chosen ones only (training).
        conv: convolution used instead of the plain one.
        reroute: replaces a router's decision (experiments on routing); gets the router's name.
        tap: is shown router logits ("layers.3.mlp.router") and block outputs ("layers.3").
    """

    form: Form = "kernel"
    activation: Activation | None = None
    matmul_dtype: torch.dtype | None = None
    dense_ssm: bool = False
    conv: Convolve | None = None
    reroute: Reroute | None = None
    tap: Tap | None = None

    def linear(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """x [..., K] · weight [N, K]ᵀ → [..., N], with the input as the target sees it."""
        if self.activation is not None:
            x = self.activation(name, x)
        if self.matmul_dtype is not None:
            return F.linear(x.to(self.matmul_dtype), weight.to(self.matmul_dtype))
        return F.linear(x, weight)

    def routed(self, name: str, routing: Routing) -> Routing:
        """Show a routing to the tap, and let it be replaced."""
        if self.tap is not None and routing.logits is not None:
            self.tap(name, routing.logits)
        return routing if self.reroute is None else self.reroute(name, routing)

    def step(self) -> "Forward":
        """The same pass for one token."""
        return replace(self, form="step")
