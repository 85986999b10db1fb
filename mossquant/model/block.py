# SPDX-License-Identifier: Apache-2.0
"""What a kind of block must say about itself, and what follows from that for every kind.

A kind is one file: a subclass of `Block`, listed in `mossquant.model.blocks`. A block stands behind its norm and adds
to the residual stream: x + block(norm(x)). Its parameters carry the last part of a tensor's role as their name, and
those of experts are stacked along a leading axis X; a checkpoint holds them apart. Letters as in `mossquant.model`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.tensors import Experts, SiteSpec, StateSpec, TensorSpec, Use


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Block(nn.Module, ABC):
    """One block of a layer. Parameters are uninitialised until loaded or reset.

    Attributes:
        kind: first part of the roles of its tensors.
        norm_name: its norm in a checkpoint is ``backbone.layers.LAYER.NORM_NAME.weight``.
        norm: weight of the norm before it, [D].
    """

    kind: ClassVar[str]
    norm_name: ClassVar[str]

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self._specs: dict[str, list[TensorSpec]] = {}
        for spec in self.specs(config, layer):
            self._specs.setdefault(_parameter_name(spec), []).append(spec)

    @staticmethod
    @abstractmethod
    def present(config: MossNetConfig, layer: int) -> bool:
        """Whether a layer has a block of this kind."""

    @classmethod
    @abstractmethod
    def own_specs(cls, config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """Its tensors in a checkpoint, without the norm, in the order in which they are stored and processed."""

    @classmethod
    def specs(cls, config: MossNetConfig, layer: int) -> list[TensorSpec]:
        """Its tensors in a checkpoint, the norm first."""
        name, shape, use = f"backbone.layers.{layer}.{cls.norm_name}.weight", (config.hidden_size,), Use.NORM
        norm = TensorSpec(name, shape, f"{cls.kind}.norm", layer, use=frozenset({use}))
        return [norm, *cls.own_specs(config, layer)]

    @classmethod
    def states(cls, config: MossNetConfig, layer: int) -> list[StateSpec]:
        """The arrays that it carries from token to token."""
        return []

    @classmethod
    def sites(cls, config: MossNetConfig, layer: int) -> list[SiteSpec]:
        """The vectors that enter its linears, in the order in which they are first read."""
        readers: dict[str, list[TensorSpec]] = {}
        for spec in cls.own_specs(config, layer):
            if spec.site is not None:
                readers.setdefault(spec.site, []).append(spec)
        return [
            SiteSpec(site, f"{specs[0].role}.input", specs[0].shape[1], tuple(spec.name for spec in specs))
            for site, specs in readers.items()
        ]

    @classmethod
    def experts(cls, config: MossNetConfig, layer: int) -> Experts | None:
        """Its experts; None for a kind that has none."""
        return None

    @classmethod
    def renamed(cls, spec: TensorSpec, keep: Sequence[int]) -> str | None:
        """A tensor's name where only some experts are left; None where it is gone with them.

        Args:
            spec: one of its tensors.
            keep: numbers of the experts that are left; the first of them becomes expert 0.
        """
        return spec.name

    @abstractmethod
    def forward(self, u: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass.

        Args:
            u: [B, T, D] normed.
            state: arrays [B, …] by the names of `states`; others may be there.
            run: how to compute; `run.rounding` says for each of its states what it is rounded with after each token.

        Returns:
            [B, T, D], and its own states after the last token.
        """

    def added(self, x: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        """The residual stream x [B, T, D] with what the block adds to it, and its own states."""
        out, after = self(rms_norm(x, self.value("norm", run), self.config.rms_norm_eps), state, run)
        return x + out, after

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initial weights for training."""

    def holds(self, spec: TensorSpec) -> bool:
        """Whether a tensor is one of this block."""
        return spec in self._specs.get(_parameter_name(spec), ())

    def load(self, value: Callable[[str], Tensor]) -> None:
        """Take every tensor of this block from `value`, by its name in a checkpoint."""
        with torch.no_grad():
            for specs in self._specs.values():
                for spec in specs:
                    self.parameter_of(spec).copy_(value(spec.name).view(spec.shape))

    def parameter_of(self, spec: TensorSpec) -> Tensor:
        """The view of the parameters that holds a checkpoint tensor (writable, same storage)."""
        parameter: Tensor = getattr(self, _parameter_name(spec))
        return (parameter if spec.expert is None else parameter[spec.expert]).view(spec.shape).detach()

    def value(self, name: str, run: Forward) -> Tensor:
        """A parameter as this pass sees it: `run.weight` is shown each tensor before experts are stacked."""
        parameter: Tensor = getattr(self, name)
        if run.parameter is None and run.weight is None:
            return parameter
        specs = self._specs[name]
        if run.parameter is not None:
            return run.parameter([spec.name for spec in specs], parameter)
        assert run.weight is not None
        # unbind, not indexing: the gradient of an index is a whole stack of zeros for every expert
        stored = parameter.unbind() if specs[0].expert is not None else (parameter,)
        seen = [run.weight(spec.name, part.view(spec.shape)) for spec, part in zip(specs, stored, strict=True)]
        return torch.stack(seen).view(parameter.shape)


def _parameter_name(spec: TensorSpec) -> str:
    return spec.role.rpartition(".")[2]
