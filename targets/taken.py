# SPDX-License-Identifier: Apache-2.0
"""Weights as a target takes them: the formats of the linears' inputs are the target's own."""

from collections.abc import Sequence

from mossquant.checkpoint.weights import View, Weights
from mossquant.formats.dtypes import dtype_name
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import Activations, Capabilities, Held, check_all


class Taken(View):
    """A view of weights in which every planned activation format is one that a target has.

    Args:
        weights: what is lowered.
        target: what it is lowered to.
        activations: of all quantized linears: "int8", as the target rounds them at run time, or "fp32"; None is as
            planned, or the target's own in place of a planned format that it does not have.

    Raises:
        InputError: the target does not have what is asked for.
    """

    def __init__(self, weights: Weights, target: Capabilities, activations: Activations | None = None) -> None:
        super().__init__(weights)
        self._target = target
        self._asked = None if activations is None else target.rounded_to(activations)

    def activation(self, site: str) -> str:
        """The activation format that the target rounds the inputs at a site to."""
        planned = self._weights.activation(site)
        return self._asked or self._target.taken(planned) or planned


def activation_of(weights: Weights, name: str) -> str:
    """The activation format of the input of a linear, by its weight's name; fp32 where the weight is kept."""
    site = weights.specs[name].site
    return "fp32" if site is None or weights.format(name) is None else weights.activation(site)


def changed_inputs(weights: Weights, taken: Weights) -> tuple[str, ...]:
    """A note for every planned activation format in place of which a target rounds in its own way."""
    names = [name for name, spec in weights.specs.items() if spec.site is not None]
    pairs = {(activation_of(weights, name), activation_of(taken, name)) for name in names}
    return tuple(f"inputs are {now} in place of the planned {was}" for was, now in sorted(pairs) if was != now)


def check_held(weights: Weights, targets: Sequence[Capabilities], *, planned_activations: bool) -> None:
    """Check weights against the targets that they are lowered to.

    Args:
        weights: what is lowered.
        targets: what these can hold.
        planned_activations: whether the inputs of linears are as planned; those that are overridden need not be any
            that a target can take.

    Raises:
        InputError: a target cannot hold them: all offenders at once.
    """
    tensors: list[tuple[TensorSpec, str | None, str | None]] = []
    sites: dict[str, str] = {}
    for name, spec in weights.specs.items():
        number_format = weights.format(name)
        if number_format is None:
            tensors.append((spec, None, dtype_name(weights.kept(name).dtype)))
            continue
        tensors.append((spec, number_format.name, None))
        if spec.site is not None and planned_activations:
            sites[spec.site] = weights.activation(spec.site)
    states = [(spec.name, spec.role, weights.state(spec.name)) for spec in state_specs(weights.config)]
    check_all(Held(f"recipe {weights.origin.name}", weights.config, tensors, list(sites.items()), states), targets)
