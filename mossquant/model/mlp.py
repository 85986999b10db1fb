# SPDX-License-Identifier: Apache-2.0
"""The channel mixer: SwiGLU experts behind a top-k router (MLP-MoE, in Mixtral's style): its tensors and its form.

    out = Σ_e g_e · w2[e](silu(w1[e](u)) ⊙ w3[e](u))     over the chosen experts e

It carries no state. Letters as in `mossquant.model`. Roles: mlp.norm, mlp.router, mlp.expert.w1 (gate),
mlp.expert.w3 (up), mlp.expert.w2 (down).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.model.block import Block
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import OWN, ExpertPart, Forward
from mossquant.model.routing import route
from mossquant.model.tensors import Experts, TensorSpec, Use


class Mlp(Block):
    """The channel mixer of one layer."""

    kind, norm_name = "mlp", "norm2"

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        D, F_, X = config.hidden_size, config.mlp_intermediate_size, config.mlp_experts(layer)
        self.count = X
        self.router = nn.Parameter(torch.empty(X, D)) if X > 1 else None
        self.w1 = nn.Parameter(torch.empty(X, F_, D))
        self.w3 = nn.Parameter(torch.empty(X, F_, D))
        self.w2 = nn.Parameter(torch.empty(X, D, F_))

    @staticmethod
    def present(config: MossNetConfig, layer: int) -> bool:
        """Only where there are experts."""
        return config.mlp_experts(layer) > 0

    @classmethod
    def own_specs(cls, config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """The tensors of this kind in a checkpoint, without the norm."""
        D, F_, X = config.hidden_size, config.mlp_intermediate_size, config.mlp_experts(layer)
        at, site = f"backbone.layers.{layer}.mlp", f"layers.{layer}.mlp"
        router = TensorSpec(f"{at}.router.weight", (X, D), "mlp.router", layer=layer, use=frozenset({Use.ROUTER}))
        specs = [router] if X > 1 else []
        for e in range(X):
            for name, shape, source in (("w1", (F_, D), "w1"), ("w3", (F_, D), "w1"), ("w2", (D, F_), "w2")):
                weight, entering = f"{at}.experts.{e}.{name}.weight", f"{site}.{source}.input"
                use = frozenset({Use.SUMMED if name == "w2" else Use.LINEAR})
                specs.append(TensorSpec(weight, shape, f"mlp.expert.{name}", layer, e, entering, use))
        return specs

    @classmethod
    def experts(cls, config: MossNetConfig, layer: int) -> Experts:
        """w1, w3 and w2 of each expert."""
        specs, chosen, giving = cls.own_specs(config, layer), config.mlp_chosen(layer), "mlp.expert.w2"
        return Experts.of(specs, kind=cls.kind, counted_by="num_mlp_experts", chosen=chosen, giving=giving)

    @classmethod
    def renamed(cls, spec: TensorSpec, keep: Sequence[int]) -> str | None:
        """One expert that is left is expert 0, without a router; with the last one the block goes, and its norm."""
        if spec.expert is None:
            return None if len(keep) == 0 or (Use.ROUTER in spec.use and len(keep) == 1) else spec.name
        if spec.expert not in keep:
            return None
        before, after = spec.name.split(f".experts.{spec.expert}.")
        return f"{before}.experts.{list(keep).index(spec.expert)}.{after}"

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Uniform in ±1/√inputs, w2 scaled by 1/√(2·layers)."""
        D, F_ = self.config.hidden_size, self.config.mlp_intermediate_size
        with torch.no_grad():
            if self.router is not None:
                self.router.normal_(0, 0.02, generator=generator)
            self.w1.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            self.w3.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            scale = (F_ * 2 * self.config.num_hidden_layers) ** -0.5
            self.w2.uniform_(-scale, scale, generator=generator)

    def forward(self, u: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """u [B, T, D] normed → [B, T, D]. Rows are gathered by expert; an expert that nobody chose is never read."""
        at = f"backbone.layers.{self.layer}.mlp.experts"
        rows_u = u.reshape(-1, u.shape[-1])
        router = None if self.router is None else self.value("router", run)
        routing = route(rows_u, router, experts=self.count, chosen=self.config.mlp_chosen(self.layer))
        routing = run.routed(f"layers.{self.layer}.mlp.router", routing)
        parts, names = [], [f"{at}.{e}.w2.weight" for e in range(self.count)]
        # unbind, not indexing: the gradient of an index is a whole stack of zeros for every expert
        w1, w3, w2 = (self.value(name, run).unbind() for name in ("w1", "w3", "w2"))
        for e in range(self.count):
            rows, gate = routing.rows_of(e)
            if rows.numel() == 0:
                continue
            own = rows_u[rows]
            hidden = F.silu(run.linear(own, w1[e], f"{at}.{e}.w1.weight", rows=rows, gates=gate))
            hidden = hidden * run.linear(own, w3[e], f"{at}.{e}.w3.weight", rows=rows, gates=gate)
            parts.append(ExpertPart(e, rows, gate, hidden, w2[e], names[e]))
        return run.sum_experts(parts, count=len(rows_u), names=names, default=OWN).view_as(u), {}
