# SPDX-License-Identifier: Apache-2.0
"""Random Mambas of `transformers`, and the two layouts in which a Mamba is stored. Nothing is downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM

# name: (sizes, deviation of the initial weights). dt_rank is ⌈hidden/16⌉: 3, 6, 9, 48, 5, 7.
SIZES: dict[str, tuple[dict[str, Any], float]] = {
    "48 tied": ({"hidden_size": 48, "num_hidden_layers": 2}, 0.1),
    "96 untied": ({"hidden_size": 96, "num_hidden_layers": 3, "tie_word_embeddings": False}, 0.1),
    "144 tied": ({"hidden_size": 144, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-6}, 0.1),
    "768 as published": ({"hidden_size": 768, "num_hidden_layers": 2}, 0.02),
    "odd sizes": (
        {
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "expand": 3,
            "state_size": 7,
            "conv_kernel": 3,
            "time_step_rank": 5,
        },
        0.1,
    ),
    "no conv bias": ({"hidden_size": 40, "num_hidden_layers": 2, "use_conv_bias": False, "time_step_rank": 7}, 0.1),
}


def hugging_face(sizes: dict[str, Any], deviation: float = 0.1, *, vocab_size: int = 104) -> MambaForCausalLM:
    """A random Mamba in which norms, D and biases are not their initial values either, and no token has a meaning."""
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=vocab_size, initializer_range=deviation, **no_tokens, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "mixer.D", "conv1d.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model


def save_hugging_face(model: MambaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_original(model: MambaForCausalLM, folder: Path) -> Path:
    """The same weights as `state-spaces` stores them."""
    config = model.config
    folder.mkdir()
    ssm = {
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
        "dt_rank": config.time_step_rank,
    }
    values = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,  # padded to a multiple of 8
        "ssm_cfg": {**ssm, "conv_bias": config.use_conv_bias},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": config.tie_word_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {
        name.replace("backbone.embeddings.", "backbone.embedding."): value for name, value in model.state_dict().items()
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def follow(model: MambaForCausalLM, following: Mapping[int, int]) -> None:
    """Make the greedy text of a Mamba with an untied head follow a table, token → the next, whatever stands before."""
    with torch.no_grad():
        table = torch.nn.functional.normalize(torch.randn_like(model.lm_head.weight), dim=1)
        model.backbone.embeddings.weight.copy_(table)
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, then in following.items():
            model.lm_head.weight[then] += 4 * table[token]
