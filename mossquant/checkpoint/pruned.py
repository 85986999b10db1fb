# SPDX-License-Identifier: Apache-2.0
"""A model without some of its experts: which are kept, and the view of its weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from torch import Tensor

from mossquant.checkpoint.weights import Origin, View, Weights
from mossquant.errors import InputError
from mossquant.files.json import read_json, validated
from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.model.blocks import blocks_of
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import experts_of, parameter_count, tensor_specs
from mossquant.model.tensors import Experts, TensorSpec, Use

_LARGEST = 1 << 20
"""Bytes of a file that says which experts are kept."""

Numbers = tuple[Annotated[int, Field(ge=0)], ...]


@dataclass(frozen=True)
class Keep:
    """Which experts of each layer are kept, by their numbers, ascending; None: of this kind all.

    Attributes:
        ssm: of each layer.
        mlp: of each layer; nothing where a layer has none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    ssm: tuple[Numbers, ...] | None = None
    mlp: tuple[Numbers, ...] | None = None

    @classmethod
    def read(cls, path: Path) -> "Keep":
        """Read a JSON file, {"ssm": [[0, 2, 5], …], "mlp": …}. Raises `InputError`: not readable, or another file."""
        advice = 'give a JSON file with a list of expert numbers for each layer: {"ssm": [[0, 1], [0, 3]]}'
        values = read_json(path, largest=_LARGEST, advice=advice)
        noun = "a list of the experts that are kept, by kind"
        return validated(values, cls, where=str(path), noun=noun, advice=f"{advice.capitalize()}.")

    def of(self, experts: Experts) -> tuple[int, ...]:
        """Those of one block."""
        layers: tuple[Numbers, ...] | None = getattr(self, experts.kind)
        return tuple(range(experts.count)) if layers is None else layers[experts.layer]

    def gone(self, config: MossNetConfig) -> dict[str, tuple[int, ...]]:
        """Router's name in a pass → experts behind it that are not kept; only where there are some."""
        gone = {
            experts.routing: tuple(sorted({*range(experts.count)} - {*self.of(experts)}))
            for experts in experts_of(config)
            if experts.routing is not None
        }
        return {router: numbers for router, numbers in gone.items() if numbers}

    def check(self, config: MossNetConfig) -> None:
        """Check it against a model.

        Raises:
            InputError: a list for another number of layers, an unknown expert or one that is listed twice or out of
                order, a block without a router that would lose its expert, MLP experts fewer than a token is to choose,
                or no SSM expert at all: all offenders at once.
        """
        offenders = []
        for kind in ("ssm", "mlp"):
            layers = getattr(self, kind)
            if layers is not None and len(layers) != config.num_hidden_layers:
                offenders.append(f"{kind} lists {len(layers)} layers, the model has {config.num_hidden_layers}")
        if not offenders:
            blocks = {(experts.kind, experts.layer): experts for experts in experts_of(config)}
            for kind in ("ssm", "mlp"):
                for layer, numbers in enumerate(getattr(self, kind) or ()):
                    problem = _problem(blocks.get((kind, layer)), numbers)
                    if problem is not None:
                        offenders.append(f"layer {layer}, {kind}: {problem}")
        if offenders:
            advice = "Name the experts that stay in each layer by their numbers, from 0 on."
            raise InputError.listing("what is to be kept does not fit the model", offenders, advice)

    def config(self, config: MossNetConfig) -> MossNetConfig:
        """The shape of what is left."""
        counts: dict[str, list[int]] = {}
        for experts in experts_of(config):
            layers = counts.setdefault(experts.counted_by, [0] * config.num_hidden_layers)
            layers[experts.layer] = len(self.of(experts))
        one: dict[str, Any] = {field: of[0] if len(set(of)) == 1 else tuple(of) for field, of in counts.items()}
        return replace(config, **one)

    def to_json(self, config: MossNetConfig) -> dict[str, list[list[int]]]:
        """As `read` takes it, every kind written out that the model has."""
        layers: dict[str, list[list[int]]] = {}
        for experts in experts_of(config):
            own = layers.setdefault(experts.kind, [[] for _ in range(config.num_hidden_layers)])
            own[experts.layer] = list(self.of(experts))
        return layers


def _problem(experts: Experts | None, numbers: tuple[int, ...]) -> str | None:
    """What is wrong with keeping these of a block's experts; None: nothing."""
    if experts is None:
        return None if not numbers else "it has no experts"
    unknown = [number for number in numbers if number >= experts.count]
    if unknown:
        return f"expert {unknown[0]} is unknown, it has {experts.count}"
    if list(numbers) != sorted(set(numbers)):
        return f"{list(numbers)} is not in ascending order, each expert once"
    if len(numbers) == experts.count:
        return None
    if experts.routing is None:
        return "its one expert has no router, and cannot go"
    # One SSM expert is Mamba itself; an MLP would give the token less than the router was trained to.
    least = 1 if experts.kind == "ssm" else experts.chosen
    return None if len(numbers) >= least else f"{len(numbers)} left, fewer than the {least} that a token needs"


class Pruned(View):
    """Full-precision weights without some of their experts: routers cut, those that are left numbered anew.

    Where one expert is left of several it has the names of a model with one, and there is no router.

    Args:
        weights: the full-precision model.
        keep: which experts are left; checked against the model.

    Raises:
        InputError: they do not fit the model.
    """

    def __init__(self, weights: Weights, keep: Keep) -> None:
        super().__init__(weights)
        keep.check(weights.config)
        self._keep = keep
        self._config = keep.config(weights.config)
        own = {spec.name: spec for spec in weights.specs.values() if spec.layer is None}
        self._numbers: dict[str, tuple[int, ...]] = {}
        for layer, kind in blocks_of(weights.config):
            experts = kind.experts(weights.config, layer)
            numbers = () if experts is None else keep.of(experts)
            for spec in kind.specs(weights.config, layer):
                name = kind.renamed(spec, numbers)
                if name is not None:
                    own[name] = spec
                    if Use.ROUTER in spec.use:
                        self._numbers[name] = numbers
        self._whole = own

    @property
    def config(self) -> MossNetConfig:
        """The shape of what is left."""
        return self._config

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Tensor name → what it is, in processing order."""
        return {spec.name: spec for spec in tensor_specs(self._config)}

    @cached_property
    def origin(self) -> Origin:
        """That of the whole model, with what is kept hashed in the place of its files."""
        whole = self._weights.origin
        said = json.dumps([dict(whole.files), self._keep.to_json(self._weights.config)])
        size = sum(
            spec.count * self._weights.kept(self._whole[name].name).itemsize for name, spec in self.specs.items()
        )
        return replace(
            whole,
            files={"model-pruned": hashlib.sha256(said.encode()).hexdigest()},
            parameters=parameter_count(self._config),
            payload_bytes=size,
            file_bytes=size,
        )

    def format(self, name: str) -> NumberFormat | None:
        """None: a quantized model is not pruned."""
        return None

    def quantized(self, name: str) -> QuantizedTensor:
        """Nothing is."""
        raise ValueError(f"{name} is not quantized; use kept(name)")

    def kept(self, name: str) -> Tensor:
        """A tensor of what is left, in its own type."""
        whole = self._weights.kept(self._whole[name].name)
        return whole[list(self._numbers[name])] if name in self._numbers else whole

    def activation(self, site: str) -> str:
        """fp32."""
        return "fp32"

    def state(self, name: str) -> str:
        """fp32."""
        return "fp32"
