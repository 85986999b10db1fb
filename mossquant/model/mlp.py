# SPDX-License-Identifier: Apache-2.0
"""The channel mixer: SwiGLU experts behind a top-k router (MLP-MoE, in Mixtral's style): its tensors and its form.

    out = Σ_e g_e · w2[e](silu(w1[e](u)) ⊙ w3[e](u))     over the chosen experts e

It carries no state. Letters as in `mossquant.model`. Roles: mlp.norm, mlp.router, mlp.expert.w1 (gate),
mlp.expert.w3 (up), mlp.expert.w2 (down).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.model.config import MossNetConfig
from mossquant.model.forward import OWN, ExpertPart, Forward
from mossquant.model.routing import route
from mossquant.model.tensors import SiteSpec, TensorSpec

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """The channel mixer of one block. Expert parameters are stacked along a leading axis X."""

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__()
        D, F_, X = config.hidden_size, config.mlp_intermediate_size, config.mlp_experts(layer)
        self.config, self.layer, self.experts = config, layer, X
        self.router = nn.Parameter(torch.empty(X, D)) if X > 1 else None
        self.w1 = nn.Parameter(torch.empty(X, F_, D))
        self.w3 = nn.Parameter(torch.empty(X, F_, D))
        self.w2 = nn.Parameter(torch.empty(X, D, F_))

    @staticmethod
    def specs(config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """The tensors of this kind in a checkpoint, without the block's norm."""
        D, F_, X = config.hidden_size, config.mlp_intermediate_size, config.mlp_experts(layer)
        at, site = f"backbone.layers.{layer}.mlp", f"layers.{layer}.mlp"
        specs = [TensorSpec(f"{at}.router.weight", (X, D), "mlp.router", layer=layer)] if X > 1 else []
        for e in range(X):
            for name, shape, source in (("w1", (F_, D), "w1"), ("w3", (F_, D), "w1"), ("w2", (D, F_), "w2")):
                specs.append(
                    TensorSpec(
                        f"{at}.experts.{e}.{name}.weight",
                        shape,
                        f"mlp.expert.{name}",
                        layer=layer,
                        expert=e,
                        site=f"{site}.{source}.input",
                    )
                )
        return specs

    @staticmethod
    def sites(config: MossNetConfig, layer: int) -> list[SiteSpec]:
        """The vectors that enter its linears: w1 and w3 read one, w2 reads each expert's own."""
        specs = Mlp.specs(config, layer)
        sites = []
        for linear, width in (("w1", config.hidden_size), ("w2", config.mlp_intermediate_size)):
            name = f"layers.{layer}.mlp.{linear}.input"
            readers = tuple(spec.name for spec in specs if spec.site == name)
            sites.append(SiteSpec(name, f"mlp.expert.{linear}.input", width, readers))
        return sites

    def parameter_of(self, spec: TensorSpec) -> Tensor:
        """The view of this module's parameters that holds a checkpoint tensor (writable, same storage)."""
        found: Tensor = getattr(self, spec.role.rpartition(".")[2])
        return found.detach() if spec.expert is None else found.detach()[spec.expert]

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

    def forward(self, u: Tensor, run: Forward) -> Tensor:
        """u [B, T, D] normed → [B, T, D]. Rows are gathered by expert; an expert that nobody chose is never read."""
        at = f"backbone.layers.{self.layer}.mlp.experts"
        rows_u = u.reshape(-1, u.shape[-1])
        routing = route(rows_u, self.router, experts=self.experts, chosen=self.config.mlp_chosen(self.layer))
        routing = run.routed(f"layers.{self.layer}.mlp.router", routing)
        parts, names = [], [f"{at}.{e}.w2.weight" for e in range(self.experts)]
        # unbind, not indexing: the gradient of an index is a whole stack of zeros for every expert
        w1, w3, w2 = self.w1.unbind(), self.w3.unbind(), self.w2.unbind()
        for e in range(self.experts):
            rows, gate = routing.rows_of(e)
            if rows.numel() == 0:
                continue
            own = rows_u[rows]
            hidden = F.silu(run.linear(own, w1[e], f"{at}.{e}.w1.weight"))
            hidden = hidden * run.linear(own, w3[e], f"{at}.{e}.w3.weight")
            parts.append(ExpertPart(e, rows, gate, hidden, w2[e], names[e]))
        return run.sum_experts(parts, count=len(rows_u), names=names, default=OWN).view_as(u)
