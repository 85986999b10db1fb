# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 mixer with SSM experts (SSM-MoE): its tensors, its state, its forms.

    x, z = in_proj(u);  x = silu(conv1d(x))
    (δ_e, B_e, C_e) = x_proj[e](x)                     for each chosen expert e, with gate g_e
    Δ = softplus(Σ_e dt_proj[e](g_e δ_e) + g_e bias_e);  B = Σ_e g_e B_e;  C = Σ_e g_e C_e
    y = scan(x, Δ, A, B, C, D);  out = out_proj(y ⊙ silu(z))

Parameters are mixed and one state is kept, so that neither state size nor scan cost depends on the number of experts.
With one expert this is Mamba-1 exactly. Letters as in `mossquant.model`.

Roles: ssm.norm, ssm.in_proj, ssm.conv, ssm.conv_bias, ssm.router, ssm.expert.x_proj, ssm.expert.dt_proj,
ssm.expert.dt_bias, ssm.A_log, ssm.D, ssm.out_proj. States: ssm.conv_state, ssm.ssm_state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.model.config import MossNetConfig
from mossquant.model.forward import GATED, ExpertPart, Forward
from mossquant.model.routing import Routing, route
from mossquant.model.scan import causal_conv, conv_step, scans
from mossquant.model.tensors import SiteSpec, StateSpec, TensorSpec, View

__all__ = ["Mixer"]


class Mixer(nn.Module):
    """The mixer of one block. Expert parameters are stacked along a leading axis X; a checkpoint holds them apart."""

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__()
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        X = config.ssm_experts(layer)
        self.config, self.layer, self.experts = config, layer, X
        self.in_proj = nn.Parameter(torch.empty(2 * E, D))
        self.conv_weight = nn.Parameter(torch.empty(E, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.router = nn.Parameter(torch.empty(X, D)) if X > 1 else None
        self.x_proj = nn.Parameter(torch.empty(X, R + 2 * N, E))
        self.dt_proj = nn.Parameter(torch.empty(X, E, R))
        self.dt_bias = nn.Parameter(torch.empty(X, E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Parameter(torch.empty(D, E))

    @staticmethod
    def specs(config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """The tensors of this kind in a checkpoint, without the block's norm."""
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        X, W = config.ssm_experts(layer), config.conv_kernel
        at, site = f"backbone.layers.{layer}.mixer", f"layers.{layer}.mixer"
        specs = [
            TensorSpec(f"{at}.in_proj.weight", (2 * E, D), "ssm.in_proj", layer=layer, site=f"{site}.in_proj.input"),
            TensorSpec(f"{at}.conv1d.weight", (E, 1, W), "ssm.conv", View.CONV, layer),
            TensorSpec(f"{at}.conv1d.bias", (E,), "ssm.conv_bias", View.VECTOR, layer),
        ]
        if X > 1:
            specs.append(TensorSpec(f"{at}.router.weight", (X, D), "ssm.router", layer=layer))
        for e in range(X):
            # A layer with one expert is written with Mamba's own names.
            own = f"{at}.experts.{e}" if X > 1 else at
            x_site, dt_site = f"{site}.x_proj.input", f"{site}.dt_proj.input"
            specs += [
                TensorSpec(f"{own}.x_proj.weight", (R + 2 * N, E), "ssm.expert.x_proj", View.MATRIX, layer, e, x_site),
                TensorSpec(f"{own}.dt_proj.weight", (E, R), "ssm.expert.dt_proj", View.MATRIX, layer, e, dt_site),
                TensorSpec(f"{own}.dt_proj.bias", (E,), "ssm.expert.dt_bias", View.VECTOR, layer, e),
            ]
        return specs + [
            TensorSpec(f"{at}.A_log", (E, N), "ssm.A_log", layer=layer),
            TensorSpec(f"{at}.D", (E,), "ssm.D", View.VECTOR, layer),
            TensorSpec(f"{at}.out_proj.weight", (D, E), "ssm.out_proj", layer=layer, site=f"{site}.out_proj.input"),
        ]

    @staticmethod
    def states(config: MossNetConfig, layer: int) -> list[StateSpec]:
        """The last W−1 inputs of the convolution, oldest first, and the SSM state."""
        E = config.d_inner
        return [
            StateSpec(f"layers.{layer}.mixer.conv", (E, config.conv_kernel - 1), "ssm.conv_state"),
            StateSpec(f"layers.{layer}.mixer.ssm", (E, config.state_size), "ssm.ssm_state"),
        ]

    @staticmethod
    def sites(config: MossNetConfig, layer: int) -> list[SiteSpec]:
        """The vectors that enter its linears. dt_proj's is the gated δ of all experts side by side."""
        E, X = config.d_inner, config.ssm_experts(layer)
        widths = {
            "in_proj": config.hidden_size,
            "x_proj": E,
            "dt_proj": X * config.time_step_rank,
            "out_proj": E,
        }
        specs = Mixer.specs(config, layer)
        sites = []
        for linear, width in widths.items():
            name = f"layers.{layer}.mixer.{linear}.input"
            readers = [spec for spec in specs if spec.site == name]
            sites.append(SiteSpec(name, f"{readers[0].role}.input", width, tuple(spec.name for spec in readers)))
        return sites

    def parameter_of(self, spec: TensorSpec) -> Tensor:
        """The view of this module's parameters that holds a checkpoint tensor (writable, same storage)."""
        kind = spec.role.removeprefix("ssm.")
        if kind == "conv":
            return self.conv_weight.detach().unsqueeze(1)
        if kind.startswith("expert."):
            stacked: Tensor = getattr(self, kind.removeprefix("expert."))
            return stacked.detach()[spec.expert if spec.expert is not None else 0]
        found: Tensor = getattr(self, kind)
        return found.detach()

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Mamba's initialisation: Δ log-uniform in 1e-3…0.1, A = −1…−N, out_proj scaled by 1/√(2·layers)."""
        config = self.config
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        with torch.no_grad():
            self.in_proj.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            self.conv_weight.uniform_(-(config.conv_kernel**-0.5), config.conv_kernel**-0.5, generator=generator)
            self.conv_bias.zero_()
            if self.router is not None:
                self.router.normal_(0, 0.02, generator=generator)
            self.x_proj.uniform_(-(E**-0.5), E**-0.5, generator=generator)
            self.dt_proj.uniform_(-(R**-0.5), R**-0.5, generator=generator)
            low, high = math.log(1e-3), math.log(0.1)
            delta = torch.exp(low + (high - low) * torch.rand(self.dt_bias.shape, generator=generator))
            self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # softplus of this is delta
            self.A_log.copy_(torch.log(torch.arange(1, N + 1, dtype=self.A_log.dtype)).expand(E, N))
            self.D.fill_(1)
            scale = (E * 2 * config.num_hidden_layers) ** -0.5
            self.out_proj.uniform_(-scale, scale, generator=generator)

    def forward(self, u: Tensor, conv: Tensor, ssm: Tensor, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, T, D] normed, states [B, E, W−1] and [B, E, N] → out [B, T, D], states."""
        at = f"backbone.layers.{self.layer}.mixer"
        batch, time, width = u.shape
        x, z = run.linear(u, self.in_proj, f"{at}.in_proj.weight").chunk(2, -1)
        convolve = conv_step if run.form == "step" else run.conv or causal_conv
        x, conv = convolve(x, self.conv_weight, self.conv_bias, conv)
        rows = u.reshape(-1, width)
        routing = route(rows, self.router, experts=self.experts, chosen=self.config.ssm_chosen(self.layer))
        routing = run.routed(f"layers.{self.layer}.mixer.router", routing)
        mix = self._mix_dense if run.dense_ssm else self._mix_chosen
        dt, Bm, Cm = mix(x.reshape(-1, x.shape[-1]), routing, run)
        shape = (batch, time, -1)
        A = -torch.exp(self.A_log.to(ssm.dtype))
        y, ssm = scans(run.form)(
            x.to(ssm.dtype),
            dt.reshape(shape).to(ssm.dtype),
            A,
            Bm.reshape(shape).to(ssm.dtype),
            Cm.reshape(shape).to(ssm.dtype),
            self.D,
            ssm,
        )
        return run.linear(y * F.silu(z), self.out_proj, f"{at}.out_proj.weight"), conv, ssm

    def _mix_chosen(self, x: Tensor, routing: Routing, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """Each expert sees the rows that chose it and no other: an expert that nobody chose is never read."""
        at = f"backbone.layers.{self.layer}.mixer"
        N, R = self.config.state_size, self.config.time_step_rank
        bias = torch.zeros_like(x)
        own = [f"{at}.experts.{e}" for e in range(self.experts)] if self.experts > 1 else [at]
        parts, names = [], [f"{name}.dt_proj.weight" for name in own]
        bc = torch.zeros((x.shape[0], 2 * N), dtype=x.dtype, device=x.device)
        for e in range(self.experts):
            rows, gate = routing.rows_of(e)
            if rows.numel() == 0:
                continue
            out = run.linear(x[rows], self.x_proj[e], f"{own[e]}.x_proj.weight")
            parts.append(ExpertPart(e, rows, gate, out[:, :R], self.dt_proj[e], names[e]))
            bias = bias.index_add(0, rows, gate * self.dt_bias[e])
            bc = bc.index_add(0, rows, out[:, R:] * gate)
        dt = run.sum_experts(parts, count=len(x), names=names, default=GATED) + bias
        return dt, bc[:, :N], bc[:, N:]

    def _mix_dense(self, x: Tensor, routing: Routing, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """All experts stacked in one matmul each way, gates applied between: faster where all rows train together."""
        N, R, X = self.config.state_size, self.config.time_step_rank, self.experts
        gates = routing.dense()
        at = f"backbone.layers.{self.layer}.mixer"
        out = run.linear(x, self.x_proj.flatten(0, 1), f"{at}.x_proj").view(-1, X, R + 2 * N)
        ranks, bcs = torch.split(out * gates.unsqueeze(-1).to(out.dtype), [R, 2 * N], -1)
        delta = ranks.reshape(-1, X * R)
        bc = bcs.sum(1, dtype=torch.float32 if out.dtype == torch.bfloat16 else None)
        weight = self.dt_proj.transpose(0, 1).flatten(1)
        dt = run.linear(delta, weight, f"{at}.dt_proj") + gates @ self.dt_bias
        Bm, Cm = bc.chunk(2, -1)
        return dt, Bm, Cm
