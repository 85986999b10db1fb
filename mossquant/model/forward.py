# SPDX-License-Identifier: Apache-2.0
"""How one pass through the model is computed: which form of the scan, in which type, with which activations.

A pass is the same arithmetic whatever its `Forward`; only what is said here differs. `activation` models what a target
does to the input of a linear layer (int8 blocks, for example); `tap` shows intermediate values to whoever asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.model.routing import Routing
from mossquant.model.scan import Form

__all__ = ["GATED", "OWN", "Activation", "Convolve", "ExpertInput", "ExpertPart", "Forward", "Reroute", "Tap"]

Activation = Callable[[str, Tensor], Tensor]
"""(weight tensor's name, input [..., K]) → the input as the target sees it."""
Convolve = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Reroute = Callable[[str, Routing], Routing]
Tap = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class ExpertInput:
    """What a target rounds where experts are summed, Σ_e g_e · W_e x_e.

    Attributes:
        gated: g_e · x_e, and not x_e.
        joined: neighbouring experts that say the same here are rounded as one vector, all their g_e · x_e side by side
            (those of experts that were not chosen are zero); None: an expert is rounded alone.
    """

    gated: bool
    joined: str | None = None


OWN, GATED = ExpertInput(gated=False), ExpertInput(gated=True)


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
        return self._product(x if self.activation is None else self.activation(name, x), weight)

    def sum_experts(
        self, parts: Sequence[ExpertPart], *, count: int, names: Sequence[str], default: ExpertInput
    ) -> Tensor:
        """Σ_e g_e · W_e x_e → [count, N].

        Args:
            parts: of the experts that some rows chose, in their order.
            count: rows.
            names: weight tensors of all experts.
            default: what is rounded where nothing else is said.
        """
        ways = [default] * len(names)
        if self.expert_input is not None:
            ways = [self.expert_input(name) or default for name in names]
        inputs = {part.expert: part.x * part.gate if ways[part.expert].gated else part.x for part in parts}
        if self.activation is not None:
            inputs = self._rounded(self.activation, parts, inputs, ways, count)
        outputs = []
        for part in parts:
            out = self._product(inputs[part.expert], part.weight)
            outputs.append(out if ways[part.expert].gated else out * part.gate)
        first = parts[0]
        total = torch.zeros((count, first.weight.shape[0]), dtype=first.gate.dtype, device=first.x.device)
        return total.index_add(0, torch.cat([part.rows for part in parts]), torch.cat(outputs).to(total.dtype))

    def _rounded(
        self,
        activation: Activation,
        parts: Sequence[ExpertPart],
        inputs: dict[int, Tensor],
        ways: Sequence[ExpertInput],
        count: int,
    ) -> dict[int, Tensor]:
        """The inputs by expert, as the target sees them."""
        found = {part.expert: part for part in parts}
        rounded: dict[int, Tensor] = {}
        for _, group in groupby(range(len(ways)), key=lambda e: ways[e].joined or e):
            run = list(group)
            chosen = [found[e] for e in run if e in found]
            if len(run) == 1:
                rounded |= {part.expert: activation(part.name, inputs[part.expert]) for part in chosen}
            elif chosen:
                x = inputs[chosen[0].expert]
                joined = x.new_zeros((count, len(run), x.shape[1]))
                for part in chosen:
                    joined[part.rows, part.expert - run[0]] = inputs[part.expert]
                joined = activation(chosen[0].name, joined.flatten(1)).view_as(joined)
                rounded |= {part.expert: joined[part.rows, part.expert - run[0]] for part in chosen}
        return rounded

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
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
