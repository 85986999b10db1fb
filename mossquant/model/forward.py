# SPDX-License-Identifier: Apache-2.0
"""How one pass through the model is computed: which form of the scan, in which type, with which activations.

A pass is the same arithmetic whatever its `Forward`; only what is said here differs. `activation` models what a target
does to the input of a linear layer (int8 blocks, for example), `weight` what quantization does to a tensor, `state`
what a state loses from token to token; `observe` shows intermediate values to whoever asks. All of them speak in the
names of a checkpoint's tensors, also where experts are computed in one matmul, or in those of state arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.model.routing import Routing
from mossquant.model.scan import RoundState, ScanForm

Activation = Callable[[str, Tensor], Tensor]
"""(weight tensor's name, input [..., K]) → the input as the target sees it."""
Convolve = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Multiply = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[str, Tensor], Tensor | None]
"""(weight tensor's name, input [..., K] as it is) → the linear's output [..., N]; None: it is not computed so."""
Reroute = Callable[[str, Routing], Routing]
WeightModel = Callable[[str, Tensor], Tensor]
"""(tensor's name, its parameter in the shape of a checkpoint) → what is computed with in its place, same shape."""
ParameterModel = Callable[[Sequence[str], Tensor], Tensor]
"""(names of the tensors that a parameter holds, the parameter) → what is computed with in its place, same shape."""
Observe = Callable[[Sequence[str], Tensor, Tensor | None, Tensor | None, Tensor], None]
"""(names, x, rows, gates, out), called after every linear.

    names   the weights that were multiplied: one, or those of all experts where they are stacked
    x       [n, K] what they were multiplied with, as the target sees it; where experts are summed in one matmul
            [n, X · K], their gated inputs side by side
    rows    int64 [n], which of the B · T rows these are, of an expert that sees only those that chose it; else None
    gates   [n, len(names)], with which what follows from `out` is still multiplied, 0 for experts that a row did not
            choose; None where there are no experts, or where x holds the gates already
    out     [n, N], or [n, X · N] of stacked experts; part of the graph, so that a gradient can be taken at it
"""


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
        scan: form of the scan; "step" takes one token.
        activation: models quantized inputs of the linears; None leaves them as they are.
        expert_input: weight tensor's name → what is rounded where experts are summed; None leaves it to the model.
        matmul_dtype: type in which linears multiply (accumulated in fp32), None for the parameters' own.
        dense_ssm: all SSM experts in stacked matmuls instead of the chosen ones only (training).
        multiply: (x [..., K], weight [N, K]) → x · weightᵀ, used in linears instead of the plain one.
        product: computes linears from the codes of inputs and weights, where it does; there `activation` and `multiply`
            are not asked, and `observe` is shown nothing.
        conv: convolution used instead of the plain one.
        reroute: is shown a router's decision, with its name ("layers.3.mlp.router"), and may replace it.
        weight: what is computed with in place of each tensor: linears, routers, norms, the table and small tensors, of
            every expert before they are stacked. A tied table is given twice, for the look-up and for the head.
        parameter: the same for whole parameters, experts stacked as the model holds them; `weight` is then not asked.
        observe: is shown what enters and leaves every linear that is not a router.
        observe_steps: is shown the time steps Δ [B, T, E] of every scan, with the name of the tensor of its decays.
        state: state array's name → what its values are rounded with after each token; None where they are carried as
            they are. A rounded state is advanced token by token, whatever the form of the scan.
        position: index of the first token since the state began.
    """

    scan: ScanForm = "kernel"
    activation: Activation | None = None
    expert_input: Callable[[str], ExpertInput | None] | None = None
    matmul_dtype: torch.dtype | None = None
    dense_ssm: bool = False
    multiply: Multiply | None = None
    product: Product | None = None
    conv: Convolve | None = None
    reroute: Reroute | None = None
    weight: WeightModel | None = None
    parameter: ParameterModel | None = None
    observe: Observe | None = None
    observe_steps: Callable[[str, Tensor], None] | None = None
    state: Callable[[str], RoundState | None] | None = None
    position: int = 0

    def linear(
        self, x: Tensor, weight: Tensor, name: str, *, rows: Tensor | None = None, gates: Tensor | None = None
    ) -> Tensor:
        """x [..., K] · weight [N, K]ᵀ → [..., N], the input as the target sees it; rows and gates for `observe`."""
        if self.product is not None and (out := self.product(name, x)) is not None:
            return out
        return self._product(x if self.activation is None else self.activation(name, x), weight, [name], rows, gates)

    def stacked(self, x: Tensor, weights: Tensor, names: Sequence[str], gates: Tensor) -> Tensor:
        """x [n, K] · weights [X, N, K] of all experts → [n, X · N], x rounded once; gates [n, X] for `observe`."""
        if self.activation is None:
            return self._product(x, weights.flatten(0, 1), names, None, gates)
        parts, first = [], 0
        # A weight that is kept leaves its input as it is, and that can be told without rows.
        nothing, activation = x[:0], self.activation
        for kept, run in groupby(names, key=lambda name: activation(name, nothing) is nothing):
            own = list(run)
            seen, experts = x if kept else activation(own[0], x), slice(first, first + len(own))
            parts.append(self._product(seen, weights[experts].flatten(0, 1), own, None, gates[:, experts]))
            first += len(own)
        return torch.cat(parts, -1)

    def summed(self, x: Tensor, weights: Tensor, names: Sequence[str], *, default: ExpertInput) -> Tensor:
        """Σ_e W_e x_e of all experts in one matmul: x [n, X, K] with gates in it, weights [X, N, K] → [n, N]."""
        if self.activation is not None:
            runs = _joined(self._ways(names, default))
            parts = [self.activation(names[run[0]], x[:, run[0] : run[-1] + 1].flatten(1)) for run in runs]
            x = torch.cat(parts, 1)
        return self._product(x.reshape(len(x), -1), weights.transpose(0, 1).flatten(1), names, None, None)

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
        ways = self._ways(names, default)
        inputs = {part.expert: part.x * part.gate if ways[part.expert].gated else part.x for part in parts}
        computed = {} if self.product is None else {p.expert: self.product(p.name, inputs[p.expert]) for p in parts}
        others = [part for part in parts if computed.get(part.expert) is None]
        if self.activation is not None:
            inputs = self._rounded(self.activation, others, inputs, ways, count)
        outputs = []
        for part in parts:
            gate = None if ways[part.expert].gated else part.gate
            out = computed.get(part.expert)
            if out is None:
                out = self._product(inputs[part.expert], part.weight, [part.name], part.rows, gate)
            outputs.append(out if gate is None else out * gate)
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
        by_expert = {part.expert: part for part in parts}
        rounded: dict[int, Tensor] = {}
        for run in _joined(ways):
            chosen = [by_expert[e] for e in run if e in by_expert]
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

    def _ways(self, names: Sequence[str], default: ExpertInput) -> list[ExpertInput]:
        if self.expert_input is None:
            return [default] * len(names)
        return [self.expert_input(name) or default for name in names]

    def _product(
        self, x: Tensor, weight: Tensor, names: Sequence[str], rows: Tensor | None, gates: Tensor | None
    ) -> Tensor:
        if self.matmul_dtype is not None:
            x, weight = x.to(self.matmul_dtype), weight.to(self.matmul_dtype)
        out = (self.multiply or F.linear)(x, weight)
        if self.observe is not None:
            self.observe(names, x.reshape(-1, x.shape[-1]), rows, gates, out)
        return out

    def routed(self, name: str, routing: Routing) -> Routing:
        """Let a routing be replaced."""
        return routing if self.reroute is None else self.reroute(name, routing)

    def rounding(self, name: str) -> RoundState | None:
        """What a state array is rounded with after each token; None where it is carried as it is."""
        return None if self.state is None else self.state(name)

    def step(self) -> "Forward":
        """The same pass for one token."""
        return replace(self, scan="step")


def _joined(ways: Sequence[ExpertInput]) -> list[list[int]]:
    """Experts in runs that are rounded as one vector."""
    return [list(run) for _, run in groupby(range(len(ways)), key=lambda e: ways[e].joined or e)]
