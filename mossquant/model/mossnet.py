# SPDX-License-Identifier: Apache-2.0
"""MossNet in plain PyTorch: embedding → blocks → RMSNorm → LM head.

    x = x + mixer(norm(x));   x = x + mlp(norm2(x))        each block; the MLP only where it has experts

Source: "MossNet: Mixture of State-Space Experts is a Multi-Head Attention" (arXiv 2510.26182). Its abstract fixes the
idea, a mixture of experts in the MLPs and in the SSM kernels; these choices are this project's own: the head is tied
to the embedding, the residual stream is fp32 with RMSNorm before each mixer, a router is linear in the normed block
input with softmax over the chosen logits, the experts' parameters are mixed while one state, A and D are shared.

Letters as in `mossquant.model`.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp
from mossquant.model.tensors import SiteSpec, StateSpec, TensorSpec, View

__all__ = ["MossNet", "activation_sites", "parameter_count", "rms_norm", "state_specs", "tensor_specs"]


def tensor_specs(config: MossNetConfig) -> list[TensorSpec]:
    """Every tensor that a checkpoint of this config holds, in the order in which they are stored and processed."""
    V, D = config.vocab_size, config.hidden_size
    tied = config.tie_word_embeddings
    site = "lm_head.input"
    specs = [TensorSpec("backbone.embeddings.weight", (V, D), "embedding", site=site if tied else None)]
    for i in range(config.num_hidden_layers):
        at = f"backbone.layers.{i}"
        specs.append(TensorSpec(f"{at}.norm.weight", (D,), "ssm.norm", View.VECTOR, i))
        specs += Mixer.specs(config, i)
        if config.mlp_experts(i):
            specs.append(TensorSpec(f"{at}.norm2.weight", (D,), "mlp.norm", View.VECTOR, i))
            specs += Mlp.specs(config, i)
    specs.append(TensorSpec("backbone.norm_f.weight", (D,), "norm_f", View.VECTOR))
    if not tied:
        specs.append(TensorSpec("lm_head.weight", (V, D), "head", site=site))
    return specs


def state_specs(config: MossNetConfig) -> list[StateSpec]:
    """Every state array of this config, block by block."""
    return [spec for i in range(config.num_hidden_layers) for spec in Mixer.states(config, i)]


def activation_sites(config: MossNetConfig) -> list[SiteSpec]:
    """Every vector that enters a linear layer, block by block, the LM head last."""
    sites = []
    for i in range(config.num_hidden_layers):
        sites += Mixer.sites(config, i)
        if config.mlp_experts(i):
            sites += Mlp.sites(config, i)
    reader = "backbone.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"
    return [*sites, SiteSpec("lm_head.input", "head.input", config.hidden_size, (reader,))]


def parameter_count(config: MossNetConfig) -> int:
    """Number of parameters; a tied table counts once."""
    return sum(spec.count for spec in tensor_specs(config))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Block(nn.Module):
    """One mixer and, where the layer has experts for it, one channel mixer, each behind its norm."""

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mixer = Mixer(config, layer)
        has_mlp = config.mlp_experts(layer) > 0
        self.norm2 = nn.Parameter(torch.empty(config.hidden_size)) if has_mlp else None
        self.mlp = Mlp(config, layer) if has_mlp else None

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor, run: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] and the mixer's states → the same."""
        out, conv, ssm = self.mixer(rms_norm(x, self.norm, self.eps), conv, ssm, run)
        x = x + out
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(rms_norm(x, self.norm2, self.eps), run)
        if run.tap is not None:
            run.tap(f"layers.{self.layer}", x)
        return x, conv, ssm


class MossNet(nn.Module):
    """The language model. Parameters are uninitialised until loaded (`mossquant.checkpoint.checkpoint`) or reset.

    The state is a dict of arrays [B, …] named as in `state_specs`; it is not changed in place.
    """

    def __init__(self, config: MossNetConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embeddings))
        self.to(dtype)

    def parameter_of(self, spec: TensorSpec) -> Tensor:
        """The view of the parameters that holds a checkpoint tensor (writable, same storage)."""
        if spec.layer is None:
            named = {"embedding": self.embeddings, "norm_f": self.norm_f, "head": self.lm_head}
            found = named[spec.role]
            assert found is not None
            return found.detach()
        block = self.layers[spec.layer]
        assert isinstance(block, Block)
        if spec.role == "ssm.norm":
            return block.norm.detach()
        if spec.role == "mlp.norm":
            assert block.norm2 is not None
            return block.norm2.detach()
        if spec.role.startswith("mlp."):
            assert block.mlp is not None
            return block.mlp.parameter_of(spec)
        return block.mixer.parameter_of(spec)

    def reset_parameters(self, seed: int) -> None:
        """Initial weights for training, the same on every machine for a seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embeddings.normal_(0, 0.02, generator=generator)
            self.norm_f.fill_(1)
            if self.lm_head is not None:
                self.lm_head.normal_(0, 0.02, generator=generator)
            for block in self.layers:
                assert isinstance(block, Block)
                block.norm.fill_(1)
                block.mixer.reset_parameters(generator)
                if block.norm2 is not None and block.mlp is not None:
                    block.norm2.fill_(1)
                    block.mlp.reset_parameters(generator)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first token: zeros."""
        like = self.norm_f
        return {spec.name: spec.zeros(batch, dtype=like.dtype, device=like.device) for spec in state_specs(self.config)}

    def hidden(self, tokens: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T] int64 → final normed hidden [B, T, D], and the new state."""
        x = self.embeddings[tokens]
        after = dict(state)
        for i, block in enumerate(self.layers):
            conv, ssm = f"layers.{i}.mixer.conv", f"layers.{i}.mixer.ssm"
            x, after[conv], after[ssm] = block(x, state[conv], state[ssm], run)
        return rms_norm(x, self.norm_f, self.config.rms_norm_eps), after

    def head(self, hidden: Tensor, run: Forward) -> Tensor:
        """hidden [..., D] → logits [..., V]."""
        if self.lm_head is None:
            return run.linear(hidden, self.embeddings, "backbone.embeddings.weight")
        return run.linear(hidden, self.lm_head, "lm_head.weight")

    def forward(
        self,
        tokens: Tensor,
        state: Mapping[str, Tensor] | None = None,
        *,
        logits: Literal["last", "all"] = "all",
        run: Forward | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T] int64, T ≥ 1 → logits [B, T, V] ("all") or [B, 1, V] ("last"), and the state after the last.

        Without `state` the text begins here; without `run` the scan is the fused kernel, or the decode step if T = 1.
        """
        if state is None:
            state = self.initial_state(tokens.shape[0])
        if run is None:
            run = Forward(
                form="step" if tokens.shape[1] == 1 else "kernel" if tokens.device.type == "cpu" else "chunked"
            )
        hidden, after = self.hidden(tokens, state, run)
        return self.head(hidden if logits == "all" else hidden[:, -1:], run), after
