# SPDX-License-Identifier: Apache-2.0
"""Small models for tests: every kind of block, sizes that no group and no vector width divides, weights that matter."""

from dataclasses import replace
from pathlib import Path

import torch

from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.weights import Weights
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import MossNet, tensor_specs
from mossquant.plan.plan import Plan

SMALL = MossNetConfig(
    vocab_size=53,
    hidden_size=20,
    num_hidden_layers=2,
    time_step_rank=3,
    state_size=5,
    num_ssm_experts=4,
    num_ssm_experts_per_tok=2,
    num_mlp_experts=4,
    num_mlp_experts_per_tok=2,
    mlp_intermediate_size=13,
)

CONFIGS: dict[str, MossNetConfig] = {
    "experts": SMALL,
    "mamba": replace(SMALL, num_ssm_experts=1, num_mlp_experts=0, mlp_intermediate_size=0),
    "pruned": replace(SMALL, num_ssm_experts=(3, 1), num_mlp_experts=(0, 1)),
    "untied": replace(SMALL, tie_word_embeddings=False, expand=3, conv_kernel=2, num_ssm_experts_per_tok=1),
    "all chosen": replace(SMALL, num_ssm_experts=3, num_ssm_experts_per_tok=5, num_mlp_experts_per_tok=3),
}


class Planned:
    """The formats of a plan, as a pass through a model that is not quantized yet asks for them."""

    def __init__(self, config: MossNetConfig, plan: Plan) -> None:
        self.specs = {spec.name: spec for spec in tensor_specs(config)}
        self.format = plan.weight_format
        self._plan = plan

    def activation(self, site: str) -> str:
        return self._plan.site(site).format


def random_model(config: MossNetConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> MossNet:
    """A model in which everything matters: routers that decide, norms, biases and D that are not their first values.

    The weights are fp32 values, so that a checkpoint in fp32 holds them exactly.
    """
    model = MossNet(config)
    model.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.8 if name.endswith("router") else 0.2
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).requires_grad_(False)


def random_tokens(config: MossNetConfig, batch: int, time: int, *, seed: int = 0) -> torch.Tensor:
    """Tokens [B, T]."""
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randint(config.vocab_size, (batch, time), generator=generator)


def write_model(folder: Path, model: MossNet, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of the model in `folder`, which is made."""
    folder.mkdir()
    specs = {spec.name: model.parameter_of(spec) for spec in tensor_specs(model.config)}
    write_checkpoint(folder, model.config, lambda spec: specs[spec.name], dtype=dtype)
    return folder


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; NaN where either has one."""
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max())


def input_format(weights: Weights, name: str) -> tuple[str, int] | None:
    """(activation format, block) of the input of a linear, by its weight's name; None where the weight is kept.

    The block is the weight's own, also where the activation format has none (another may be tried in its place).
    """
    number_format, site = weights.format(name), weights.specs[name].site
    if number_format is None or site is None:
        return None
    return weights.activation(site), number_format.activation_block
