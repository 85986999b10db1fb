# SPDX-License-Identifier: Apache-2.0
"""MossNet in plain PyTorch: embedding → blocks → RMSNorm → LM head.

    x = x + mixer(norm(x));   x = x + mlp(norm2(x))        each layer; the MLP only where it has experts

Which blocks a layer has, `mossquant.model.blocks` says; nothing here knows a kind by name.

Source: "MossNet: Mixture of State-Space Experts is a Multi-Head Attention" (arXiv 2510.26182). Its abstract fixes the
idea, a mixture of experts in the MLPs and in the SSM kernels; these choices are this project's own: the head is tied
to the embedding, the residual stream is fp32 with RMSNorm before each mixer, a router is linear in the normed block
input with softmax over the chosen logits, the experts' parameters are mixed while one state, A and D are shared.

Letters as in `mossquant.model`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mossquant.model.block import Block, rms_norm
from mossquant.model.blocks import blocks_of, kinds_of
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.tensors import Experts, SiteSpec, StateSpec, TensorSpec, Use

_TABLE, _NORM, _HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"


def tensor_specs(config: MossNetConfig) -> list[TensorSpec]:
    """Every tensor that a checkpoint of this config holds, in the order in which they are stored and processed."""
    shape, tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
    site = "lm_head.input"
    uses = {Use.TABLE, Use.LINEAR} if tied else {Use.TABLE}
    specs = [TensorSpec(_TABLE, shape, "embedding", site=site if tied else None, use=frozenset(uses))]
    for layer, kind in blocks_of(config):
        specs += kind.specs(config, layer)
    specs.append(TensorSpec(_NORM, (config.hidden_size,), "norm_f", use=frozenset({Use.NORM})))
    if not tied:
        specs.append(TensorSpec(_HEAD, shape, "head", site=site, use=frozenset({Use.LINEAR})))
    return specs


def state_specs(config: MossNetConfig) -> list[StateSpec]:
    """Every state array of this config, block by block."""
    return [spec for layer, kind in blocks_of(config) for spec in kind.states(config, layer)]


def activation_sites(config: MossNetConfig) -> list[SiteSpec]:
    """Every vector that enters a linear layer, block by block, the LM head last."""
    sites = [site for layer, kind in blocks_of(config) for site in kind.sites(config, layer)]
    reader = _TABLE if config.tie_word_embeddings else _HEAD
    return [*sites, SiteSpec("lm_head.input", "head.input", config.hidden_size, (reader,))]


def experts_of(config: MossNetConfig) -> list[Experts]:
    """The experts of every block that has some, block by block."""
    of_blocks = [kind.experts(config, layer) for layer, kind in blocks_of(config)]
    return [experts for experts in of_blocks if experts is not None]


def parameter_count(config: MossNetConfig) -> int:
    """Number of parameters; a tied table counts once."""
    return sum(spec.count for spec in tensor_specs(config))


class Layer(nn.Module):
    """The blocks of one layer."""

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__()
        blocks = [kind(config, layer) for kind in kinds_of(config, layer)]
        # Norms first: training sums the squares of gradients in the order of the parameters, which decides roundings.
        self.norms = nn.ParameterList(block.norm for block in blocks)
        self.blocks = nn.ModuleList(blocks)

    def __iter__(self) -> Iterator[Block]:
        """In the order in which they are computed."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


class MossNet(nn.Module):
    """The language model. Parameters are uninitialised until loaded (`mossquant.checkpoint.checkpoint`) or reset.

    The state is a dict of arrays [B, …] named as in `state_specs`; it is not changed in place.
    """

    def __init__(self, config: MossNetConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = nn.Parameter(torch.empty(config.hidden_size))
        self.lm_head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embeddings))
        self.to(dtype)

    @property
    def blocks(self) -> Iterator[Block]:
        """Every block, in the order in which they are computed."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield from layer

    def parameter_of(self, spec: TensorSpec) -> Tensor:
        """The view of the parameters that holds a checkpoint tensor (writable, same storage)."""
        if spec.layer is None:
            return self._own()[spec.name].detach()
        layer = self.layers[spec.layer]
        assert isinstance(layer, Layer)
        return next(block.parameter_of(spec) for block in layer if block.holds(spec))

    def _own(self) -> dict[str, nn.Parameter]:
        """Parameters that belong to no block, by their names in a checkpoint."""
        own = {_TABLE: self.embeddings, _NORM: self.norm_f}
        return own if self.lm_head is None else own | {_HEAD: self.lm_head}

    def load(self, value: Callable[[str], Tensor]) -> "MossNet":
        """Take every tensor from `value`, by its name in a checkpoint; returns itself, for inference."""
        for name, parameter in self._own().items():
            parameter.detach().copy_(value(name).view(parameter.shape))
        for block in self.blocks:
            block.load(value)
        return self.requires_grad_(False).eval()

    def reset_parameters(self, seed: int) -> None:
        """Initial weights for training, the same on every machine for a seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embeddings.normal_(0, 0.02, generator=generator)
            self.norm_f.fill_(1)
            if self.lm_head is not None:
                self.lm_head.normal_(0, 0.02, generator=generator)
            for block in self.blocks:
                block.norm.fill_(1)
                block.reset_parameters(generator)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first token: zeros."""
        like = self.norm_f
        return {spec.name: spec.zeros(batch, dtype=like.dtype, device=like.device) for spec in state_specs(self.config)}

    def hidden(self, tokens: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T] int64 → final normed hidden [B, T, D], and the new state."""
        x = self._value(_TABLE, run)[tokens]
        after = dict(state)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for block in layer:
                x, own = block.added(x, state, run)
                after |= own
        return self.final_norm(x, run), after

    def final_norm(self, x: Tensor, run: Forward) -> Tensor:
        """The residual stream after the last block [B, T, D] → what the head reads."""
        return rms_norm(x, self._value(_NORM, run), self.config.rms_norm_eps)

    def head(self, hidden: Tensor, run: Forward) -> Tensor:
        """hidden [..., D] → logits [..., V]."""
        name = _TABLE if self.lm_head is None else _HEAD
        return run.linear(hidden, self._value(name, run), name)

    def _value(self, name: str, run: Forward) -> Tensor:
        """A parameter that belongs to no block, as this pass sees it."""
        parameter = self._own()[name]
        if run.parameter is not None:
            return run.parameter([name], parameter)
        return parameter if run.weight is None else run.weight(name, parameter)

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
                scan="step" if tokens.shape[1] == 1 else "kernel" if tokens.device.type == "cpu" else "chunked"
            )
        hidden, after = self.hidden(tokens, state, run)
        return self.head(hidden if logits == "all" else hidden[:, -1:], run), after
