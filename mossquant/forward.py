# SPDX-License-Identifier: Apache-2.0
"""How one pass through the model is computed: which form of the scan, in which type, with which activations.

A pass is the same arithmetic whatever its `Forward`; only what is said here differs. `activation` models what a target
does to the input of a linear layer (int8 blocks, for example); `tap` shows intermediate values to whoever asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.routing import Routing
from mossquant.scan import Form

__all__ = ["Activation", "Convolve", "ExpertInput", "ExpertPart", "Forward", "Reroute", "Tap"]

Activation = Callable[[str, Tensor], Tensor]
"""(weight tensor's name, input [..., K]) → the input as the target sees it."""
ExpertInput = Literal["own", "gated", "joined"]
"""What a target rounds where experts are summed, Σ_e g_e · W_e x_e: x_e, or g_e · x_e, or all g_e · x_e as one vector
(those of experts that were not chosen are zero)."""
Convolve = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Reroute = Callable[[str, Routing], Routing]
Tap = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class ExpertPart:
    """One expert's share of a sum over experts.

    Attributes:
        expert: its number.
        rows: [n], the rows that chose it.
        gate: [n, 1].
        x: [n, K], its inputs.
        weight: [N, K].
        name: the weight tensor's name.
    """

    expert: int
    rows: Tensor
    gate: Tensor
    x: Tensor
    weight: Tensor
    name: str


@dataclass(frozen=True)
class Forward:
    """One way to run the model.

    Attributes:
        form: scan form; "step" takes one token.
        activation: models quantized inputs of the linears; None leaves them as they are.
        expert_input: weight tensor's name → what is rounded where experts are summed; None leaves it to the model.
        matmul_dtype: type in which linears multiply (accumulated in fp32), None for the parameters' own.
        dense_ssm: all SSM experts in stacked matmuls instead of the chosen ones only (training).
        conv: convolution used instead of the plain one.
        reroute: replaces a router's decision (experiments on routing); gets the router's name.
        tap: is shown router logits ("layers.3.mlp.router") and block outputs ("layers.3").
    """

    form: Form = "kernel"
    activation: Activation | None = None
    expert_input: Callable[[str], ExpertInput | None] | None = None
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

    def sum_experts(self, parts: Sequence[ExpertPart], *, count: int, experts: int, default: ExpertInput) -> Tensor:
        """Σ_e g_e · W_e x_e → [count, N], of rows that some experts chose."""
        first = parts[0]
        way = (self.expert_input(first.name) if self.expert_input is not None else None) or default
        inputs = [part.x if way == "own" else part.x * part.gate for part in parts]
        if way == "joined" and self.activation is not None:
            width = first.x.shape[1]
            joined = torch.zeros((count, experts, width), dtype=first.x.dtype, device=first.x.device)
            for part, x in zip(parts, inputs, strict=True):
                joined[part.rows, part.expert] = x
            joined = self.activation(first.name, joined.flatten(1)).view(count, experts, width)
            outputs = [F.linear(joined[part.rows, part.expert], part.weight) for part in parts]
        else:
            outputs = [self.linear(x, part.weight, part.name) for part, x in zip(parts, inputs, strict=True)]
        if way == "own":
            outputs = [out * part.gate for part, out in zip(parts, outputs, strict=True)]
        total = torch.zeros((count, first.weight.shape[0]), dtype=first.gate.dtype, device=first.x.device)
        return total.index_add(0, torch.cat([part.rows for part in parts]), torch.cat(outputs).to(total.dtype))

    def routed(self, name: str, routing: Routing) -> Routing:
        """Show a routing to the tap, and let it be replaced."""
        if self.tap is not None and routing.logits is not None:
            self.tap(name, routing.logits)
        return routing if self.reroute is None else self.reroute(name, routing)

    def step(self) -> "Forward":
        """The same pass for one token."""
        return replace(self, form="step")
