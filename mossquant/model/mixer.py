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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.model.block import Block
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import GATED, ExpertPart, Forward
from mossquant.model.routing import Routing, route
from mossquant.model.scan import SCANS, causal_conv, conv_rounded, conv_step, scan_sequential, softplus
from mossquant.model.tensors import Experts, SiteSpec, StateSpec, Stored, TensorSpec, Use


class Mixer(Block):
    """The mixer of one layer."""

    kind, norm_name = "ssm", "norm"

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        X = config.ssm_experts(layer)
        self.count = X
        self.in_proj = nn.Parameter(torch.empty(2 * E, D))
        self.conv = nn.Parameter(torch.empty(E, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.router = nn.Parameter(torch.empty(X, D)) if X > 1 else None
        self.x_proj = nn.Parameter(torch.empty(X, R + 2 * N, E))
        self.dt_proj = nn.Parameter(torch.empty(X, E, R))
        self.dt_bias = nn.Parameter(torch.empty(X, E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Parameter(torch.empty(D, E))

    @staticmethod
    def present(config: MossNetConfig, layer: int) -> bool:
        """Every layer has one."""
        return True

    @classmethod
    def own_specs(cls, config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """The tensors of this kind in a checkpoint, without the norm."""
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        X, W = config.ssm_experts(layer), config.conv_kernel
        at, site = f"backbone.layers.{layer}.mixer", f"layers.{layer}.mixer"

        def linear(own: str, name: str, shape: tuple[int, int], use: Use = Use.LINEAR, **more: Any) -> TensorSpec:
            role = f"ssm.expert.{name}" if "expert" in more else f"ssm.{name}"
            entering, uses = f"{site}.{name}.input", frozenset({use})
            return TensorSpec(f"{own}.{name}.weight", shape, role, layer, site=entering, use=uses, **more)

        specs = [
            linear(at, "in_proj", (2 * E, D), parts=(("x", E), ("z", E))),
            TensorSpec(f"{at}.conv1d.weight", (E, 1, W), "ssm.conv", layer),
            TensorSpec(f"{at}.conv1d.bias", (E,), "ssm.conv_bias", layer),
        ]
        if X > 1:
            router = TensorSpec(f"{at}.router.weight", (X, D), "ssm.router", layer, use=frozenset({Use.ROUTER}))
            specs.append(router)
        for e, own in enumerate(_own_names(layer, X)):
            specs += [
                linear(own, "x_proj", (R + 2 * N, E), expert=e, parts=(("delta", R), ("B", N), ("C", N))),
                linear(own, "dt_proj", (E, R), Use.SUMMED, expert=e),
                TensorSpec(f"{own}.dt_proj.bias", (E,), "ssm.expert.dt_bias", layer, e),
            ]
        return specs + [
            TensorSpec(f"{at}.A_log", (E, N), "ssm.A_log", layer=layer, stored=Stored.LOG_OF_DECAY),
            TensorSpec(f"{at}.D", (E,), "ssm.D", layer),
            linear(at, "out_proj", (D, E)),
        ]

    @classmethod
    def states(cls, config: MossNetConfig, layer: int) -> list[StateSpec]:
        """The last W−1 inputs of the convolution, oldest first, and the SSM state."""
        E = config.d_inner
        return [
            StateSpec(f"layers.{layer}.mixer.conv", (E, config.conv_kernel - 1), "ssm.conv_state"),
            StateSpec(f"layers.{layer}.mixer.ssm", (E, config.state_size), "ssm.ssm_state"),
        ]

    @classmethod
    def sites(cls, config: MossNetConfig, layer: int) -> list[SiteSpec]:
        """The vectors that enter its linears. dt_proj's is the gated δ of all experts side by side."""
        width = config.ssm_experts(layer) * config.time_step_rank
        sites = super().sites(config, layer)
        return [replace(site, width=width) if site.role == "ssm.expert.dt_proj.input" else site for site in sites]

    @classmethod
    def experts(cls, config: MossNetConfig, layer: int) -> Experts:
        """x_proj, dt_proj and its bias of each expert."""
        specs, chosen, giving = cls.own_specs(config, layer), config.ssm_chosen(layer), "ssm.expert.x_proj"
        return Experts.of(specs, kind=cls.kind, counted_by="num_ssm_experts", chosen=chosen, giving=giving)

    @classmethod
    def renamed(cls, spec: TensorSpec, keep: Sequence[int]) -> str | None:
        """One expert that is left has Mamba's own names, and no router."""
        if spec.expert is None:
            return None if Use.ROUTER in spec.use and len(keep) == 1 else spec.name
        if spec.expert not in keep:
            return None
        assert spec.layer is not None
        own = _own_names(spec.layer, len(keep))[list(keep).index(spec.expert)]
        return ".".join([own, *spec.name.split(".")[-2:]])

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Mamba's initialisation: Δ log-uniform in 1e-3…0.1, A = −1…−N, out_proj scaled by 1/√(2·layers)."""
        config = self.config
        D, E, N, R = config.hidden_size, config.d_inner, config.state_size, config.time_step_rank
        with torch.no_grad():
            self.in_proj.uniform_(-(D**-0.5), D**-0.5, generator=generator)
            self.conv.uniform_(-(config.conv_kernel**-0.5), config.conv_kernel**-0.5, generator=generator)
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

    def forward(self, u: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """u [B, T, D] normed, states [B, E, W−1] and [B, E, N] → [B, T, D], states."""
        at = f"backbone.layers.{self.layer}.mixer"
        window, ssm_state = (spec.name for spec in self.states(self.config, self.layer))
        ssm = state[ssm_state]
        batch, time, width = u.shape
        x, z = run.linear(u, self.value("in_proj", run), f"{at}.in_proj.weight").chunk(2, -1)
        convolve = conv_step if run.scan == "step" else run.conv or causal_conv
        if (rounding := run.rounding(window)) is not None:
            convolve = partial(conv_rounded, rounding=rounding, position=run.position)
        x, conv = convolve(x, self.value("conv", run), self.value("conv_bias", run), state[window])
        rows = u.reshape(-1, width)
        router = None if self.router is None else self.value("router", run)
        routing = route(rows, router, experts=self.count, chosen=self.config.ssm_chosen(self.layer))
        routing = run.routed(f"layers.{self.layer}.mixer.router", routing)
        mix = self._mix_dense if run.dense_ssm else self._mix_chosen
        dt, Bm, Cm = mix(x.reshape(-1, x.shape[-1]), routing, run)
        shape = (batch, time, -1)
        if run.observe_steps is not None:
            run.observe_steps(f"{at}.A_log", softplus(dt.reshape(shape).to(ssm.dtype)))
        A = -torch.exp(self.value("A_log", run).to(ssm.dtype))
        scan = SCANS[run.scan]
        if (rounding := run.rounding(ssm_state)) is not None:
            scan = partial(scan_sequential, rounding=rounding, position=run.position)
        y, ssm = scan(
            x.to(ssm.dtype),
            dt.reshape(shape).to(ssm.dtype),
            A,
            Bm.reshape(shape).to(ssm.dtype),
            Cm.reshape(shape).to(ssm.dtype),
            self.value("D", run),
            ssm,
        )
        out = run.linear(y * F.silu(z), self.value("out_proj", run), f"{at}.out_proj.weight")
        return out, {window: conv, ssm_state: ssm}

    def _mix_chosen(self, x: Tensor, routing: Routing, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """Each expert sees the rows that chose it and no other: an expert that nobody chose is never read."""
        N, R = self.config.state_size, self.config.time_step_rank
        x_proj, dt_proj, dt_bias = (self.value(name, run) for name in ("x_proj", "dt_proj", "dt_bias"))
        bias = torch.zeros_like(x)
        own = _own_names(self.layer, self.count)
        parts, names = [], [f"{name}.dt_proj.weight" for name in own]
        bc = torch.zeros((x.shape[0], 2 * N), dtype=x.dtype, device=x.device)
        for e in range(self.count):
            rows, gate = routing.rows_of(e)
            if rows.numel() == 0:
                continue
            out = run.linear(x[rows], x_proj[e], f"{own[e]}.x_proj.weight", rows=rows, gates=gate)
            parts.append(ExpertPart(e, rows, gate, out[:, :R], dt_proj[e], names[e]))
            bias = bias.index_add(0, rows, gate * dt_bias[e])
            bc = bc.index_add(0, rows, out[:, R:] * gate)
        dt = run.sum_experts(parts, count=len(x), names=names, default=GATED) + bias
        return dt, bc[:, :N], bc[:, N:]

    def _mix_dense(self, x: Tensor, routing: Routing, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """All experts stacked in one matmul each way, gates applied between: faster where all rows train together."""
        N, R, X = self.config.state_size, self.config.time_step_rank, self.count
        gates = routing.dense()
        own = _own_names(self.layer, X)
        stacked = run.stacked(x, self.value("x_proj", run), [f"{name}.x_proj.weight" for name in own], gates)
        out = stacked.view(-1, X, R + 2 * N)
        ranks, bcs = torch.split(out * gates.unsqueeze(-1).to(out.dtype), [R, 2 * N], -1)
        bc = bcs.sum(1, dtype=torch.float32 if out.dtype == torch.bfloat16 else None)
        dt = run.summed(ranks, self.value("dt_proj", run), [f"{name}.dt_proj.weight" for name in own], default=GATED)
        dt = dt + gates @ self.value("dt_bias", run)
        Bm, Cm = bc.chunk(2, -1)
        return dt, Bm, Cm


def _own_names(layer: int, experts: int) -> list[str]:
    """What the names of each expert's tensors begin with: those of one alone are Mamba's own."""
    at = f"backbone.layers.{layer}.mixer"
    return [at] if experts == 1 else [f"{at}.experts.{e}" for e in range(experts)]
