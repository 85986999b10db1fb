# SPDX-License-Identifier: Apache-2.0
"""What a .moss says about itself: two texts in the `__metadata__` of its header, one for people and one for libmoss."""

from collections.abc import Mapping
from typing import Any, Literal

from mossquant.model.config import MossNetConfig
from mossquant.targets.metadata import Count, ProgramMetadata

METADATA_KEY, RUNTIME_KEY = "mossquant", "moss"
RUNTIME_MINIMUM = "0.1.0"
"""Oldest release whose libmoss runs these files."""
FILE_VERSIONS = (1, 2)
"""The second is of files whose states are rounded, which a libmoss that knows no such thing must not run."""

Layout = Literal["x86", "arm", "rows"]
"""How matrices are packed (`kernels/linear/layout.h`)."""


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        layout: how its matrices are packed.
        weight_bytes: bytes of codes, scales, padding and kept tensors in this program.
    """

    target: Literal["native"] = "native"
    runtime_minimum: str = RUNTIME_MINIMUM
    activations: Literal["fp32", "int8_block"]
    layout: Layout
    weight_bytes: Count


def runtime_metadata(
    config: MossNetConfig, layout: Layout, formats: Mapping[str, str], states: Mapping[str, str]
) -> dict[str, Any]:
    """All that libmoss needs to know of a model.

    Args:
        config: its shape.
        layout: how its matrices are packed.
        formats: tensor name → format, or type that it is kept in.
        states: state array's name → format, of those that are rounded.
    """
    layers = range(config.num_hidden_layers)
    return {
        "version": FILE_VERSIONS[1] if states else FILE_VERSIONS[0],
        "layout": layout,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "d_inner": config.d_inner,
            "state_size": config.state_size,
            "conv_kernel": config.conv_kernel,
            "time_step_rank": config.time_step_rank,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            "mlp_intermediate_size": config.mlp_intermediate_size,
            "ssm_experts": [config.ssm_experts(layer) for layer in layers],
            "ssm_chosen": [config.ssm_chosen(layer) for layer in layers],
            "mlp_experts": [config.mlp_experts(layer) for layer in layers],
            "mlp_chosen": [config.mlp_chosen(layer) for layer in layers],
        },
        "formats": dict(formats),
        **({"states": dict(states)} if states else {}),
    }
