# SPDX-License-Identifier: Apache-2.0
"""What a plan makes of the inputs of linear layers and of states, as a pass of the model takes it
(`mossquant.model.forward`).
"""

from collections.abc import Callable

from torch import Tensor

from mossquant.checkpoint.weights import Weights
from mossquant.formats.activations import ACTIVATION_FORMATS, get_activation_format
from mossquant.formats.states import STATE_FORMATS
from mossquant.model.forward import GATED, Activation, ExpertInput
from mossquant.model.mossnet import state_specs
from mossquant.model.scan import RoundState


def activation_model(source: Weights, name: str = "planned") -> Activation:
    """What a target does to the inputs of the linear layers, for `mossquant.model.forward.Forward`.

    Args:
        source: says the formats of weights and sites.
        name: "planned", or the activation format to use at every site in place of the planned ones. Inputs of weights
            that are kept stay in fp32 either way.

    Returns:
        (weight tensor's name, x [..., K]) → x as the target sees it.

    Raises:
        InputError: no such activation format.
    """
    override = None if name == "planned" else get_activation_format(name)

    def seen(tensor: str, x: Tensor) -> Tensor:
        number_format, site = source.format(tensor), source.specs[tensor].site
        if number_format is None or site is None:
            return x
        return (override or ACTIVATION_FORMATS[source.activation(site)]).apply(x, number_format.activation_block)

    return seen


def expert_input_model(source: Weights, name: str = "planned") -> Callable[[str], ExpertInput | None]:
    """What a target rounds where experts are summed, for `Forward`; arguments as `activation_model`.

    XNNPACK sums neighbouring experts of one format with groups in one matmul, over their gated inputs side by side, and
    gives that vector one range. Weights with one scale a row cannot be laid side by side: each expert is a matmul of
    its own, of its own gated input. A block of int8_block belongs to one expert either way, and a positive gate in
    front changes none of its codes.

    Returns:
        Weight tensor's name → what is rounded; None where its format leaves that to the model.

    Raises:
        InputError: no such activation format.
    """
    override = None if name == "planned" else get_activation_format(name)

    def way(tensor: str) -> ExpertInput | None:
        number_format, site = source.format(tensor), source.specs[tensor].site
        if number_format is None or site is None or not (override or ACTIVATION_FORMATS[source.activation(site)]).joins:
            return None
        return GATED if number_format.group_size is None else ExpertInput(gated=True, joined=number_format.name)

    return way


def state_model(source: Weights) -> Callable[[str], RoundState | None] | None:
    """What states are rounded with after each token, for `Forward`; None where all are carried as they are."""
    formats = {spec.name: STATE_FORMATS[source.state(spec.name)] for spec in state_specs(source.config)}
    rounded = {name: known.apply for name, known in formats.items() if known.rounding is not None}
    return rounded.get if rounded else None
