# SPDX-License-Identifier: Apache-2.0
"""The kinds of blocks, and which of them a layer has, in the order in which they are computed."""

from mossquant.model.block import Block
from mossquant.model.config import MossNetConfig
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp

KINDS: tuple[type[Block], ...] = (Mixer, Mlp)
"""Every kind, in the order in which a layer computes them."""


def kinds_of(config: MossNetConfig, layer: int) -> list[type[Block]]:
    """The kinds of blocks of a layer, in the order in which they are computed."""
    return [kind for kind in KINDS if kind.present(config, layer)]


def blocks_of(config: MossNetConfig) -> list[tuple[int, type[Block]]]:
    """(layer, kind) of every block, in the order in which they are computed."""
    return [(layer, kind) for layer in range(config.num_hidden_layers) for kind in kinds_of(config, layer)]
