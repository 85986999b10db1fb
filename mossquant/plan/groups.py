# SPDX-License-Identifier: Apache-2.0
"""Which tensors get one format: those that read the same vector, and else those of one role in one layer.

A vector that enters several linears is rounded once, in blocks as long as the weights' groups, so its readers must
agree. Norms and routers are not among them: they are small and stay as they are.
"""

import re
from dataclasses import dataclass

from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import tensor_specs
from mossquant.model.tensors import TensorSpec, Use


@dataclass(frozen=True)
class Group:
    """Tensors that get one format.

    Attributes:
        name: its roles and its layer, e.g. ``layers.3 mlp.expert.w1+w3`` or ``embedding``.
        specs: the tensors, in processing order.
    """

    name: str
    specs: tuple[TensorSpec, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its tensors, each once."""
        return tuple(dict.fromkeys(spec.role for spec in self.specs))

    @property
    def role(self) -> str:
        """Its roles as one word: ``mlp.expert.w1+w3``."""
        first, *others = self.roles
        return "+".join([first, *(role.rpartition(".")[2] for role in others)])

    @property
    def layer(self) -> int | None:
        """Its layer; None outside the blocks."""
        return self.specs[0].layer

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return tuple(spec.name for spec in self.specs)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of names that match its tensors and no others, an expert's number as ``*``."""
        return tuple(dict.fromkeys(re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in self.tensors))

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(spec.count for spec in self.specs)


def groups_of(config: MossNetConfig) -> list[Group]:
    """Every group of a model, in processing order."""
    members: dict[tuple[object, ...], list[TensorSpec]] = {}
    for spec in tensor_specs(config):
        if spec.use & {Use.NORM, Use.ROUTER}:
            continue
        key: tuple[object, ...] = ("role", spec.layer, spec.role) if spec.site is None else ("site", spec.site)
        members.setdefault(key, []).append(spec)
    groups = [Group("", tuple(specs)) for specs in members.values()]
    named = (group.role if group.layer is None else f"layers.{group.layer} {group.role}" for group in groups)
    return [Group(name, group.specs) for name, group in zip(named, groups, strict=True)]
