# SPDX-License-Identifier: Apache-2.0
"""The good folders that cases damage: a small model in every form in which one is stored."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small import random_model, write_model

import mossquant
from mossquant.calibration.calibrate import calibrate  # here: it takes constants over that are set otherwise below
from mossquant.checkpoint import tensorfiles
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.files.outputs import write_json
from mossquant.model.config import MossNetConfig
from mossquant.plan.recipe import Recipe
from mossquant.targets.onnx import save as onnx_save
from mossquant.text.declared import DeclaredText
from mossquant.text.text import train_tokenizer

TEXT = "def add(first, second):\n    return first + second  # größer\n\n\nclass Box:\n    pass\n" * 40

CONFIG = MossNetConfig(
    vocab_size=288,
    hidden_size=32,
    num_hidden_layers=2,
    time_step_rank=5,
    num_ssm_experts=(3, 1),
    num_ssm_experts_per_tok=2,
    num_mlp_experts=(2, 3),
    num_mlp_experts_per_tok=2,
    mlp_intermediate_size=40,
)
MAMBA = replace(CONFIG, num_ssm_experts=1, num_mlp_experts=0, mlp_intermediate_size=0)


@contextmanager
def _set(module: Any, **values: int) -> Iterator[None]:
    """Other values of a module's constants, so that a small model takes the ways of a large one."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def make_samples(folder: Path) -> None:
    """checkpoint, sharded, quantized, quantized-shards, artifact, artifact-pte, artifact-pte-own, artifact-native,
    external, mamba, original, recipe, statistics.
    """
    checkpoint = write_model(
        folder / "checkpoint", random_model(CONFIG, seed=7, dtype=torch.float32), dtype=torch.bfloat16
    )
    tokenizer = train_tokenizer([TEXT], CONFIG.vocab_size, checkpoint / "tokenizer.json")
    declared = DeclaredText(
        end_of_text=(0, 5),
        beginning_of_text=0,
        add_beginning_of_text=True,
        special_tokens={"<|endoftext|>": 0},
        token_names={"eos_token": "<|endoftext|>"},
        chat_template="{% for turn in messages %}{{ turn.content }}{% endfor %}",
    )
    (checkpoint / "text.json").write_text(declared.to_json())
    seen = [{"name": "seen.txt", "bytes": 9, "sha256": "0" * 64}]
    write_json(checkpoint / "training.json", {"version": 1, "tokenizer_sha256": tokenizer.sha256, "text": seen})
    with _set(tensorfiles, ONE_FILE_BYTES=0, SHARD_BYTES=20_000):
        mossquant.import_mamba(checkpoint, folder / "sharded")
        mossquant.quantize(checkpoint, folder / "quantized-shards", recipe="int8-uniform")
    mossquant.quantize(checkpoint, folder / "quantized", recipe="int4-uniform")
    mossquant.export(folder / "quantized", folder / "artifact")
    mossquant.export(folder / "quantized", folder / "artifact-pte", target="executorch")
    mossquant.export(folder / "quantized", folder / "artifact-pte-own", target="executorch", kernels="mossquant")
    mossquant.export(folder / "quantized", folder / "artifact-native", target="native")
    with _set(onnx_save, EXTERNAL_ABOVE=0):
        mossquant.export(checkpoint, folder / "external")
    _mambas(folder)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(Recipe.named("int4-uniform").text)
    (folder / "text.txt").write_text(TEXT)
    (folder / "gptq.yaml").write_text(Recipe.named("int4").text.replace("solver: nearest-mse", "solver: gptq"))
    calibrate(checkpoint, folder / "statistics", text=[folder / "text.txt"], tokens=1024)


def _mambas(folder: Path) -> None:
    """The same Mamba as Hugging Face and as the original code store it."""
    source = write_model(folder / "plain-mamba", random_model(MAMBA, seed=8, dtype=torch.float32))
    opened = Checkpoint.open(source)
    tensors = {name: opened.kept(name).clone() for name in opened.specs}
    shutil.rmtree(source)
    hugging_face, original = folder / "mamba", folder / "original"
    hugging_face.mkdir()
    original.mkdir()
    sizes = {"expand": MAMBA.expand, "state_size": MAMBA.state_size, "conv_kernel": MAMBA.conv_kernel}
    values = {
        "model_type": "mamba",
        "vocab_size": MAMBA.vocab_size,
        "hidden_size": MAMBA.hidden_size,
        "intermediate_size": MAMBA.d_inner,
        "num_hidden_layers": MAMBA.num_hidden_layers,
        "time_step_rank": MAMBA.time_step_rank,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        **sizes,
    }
    (hugging_face / "config.json").write_text(json.dumps(values))
    save_file(tensors, hugging_face / "model.safetensors")
    values = {
        "d_model": MAMBA.hidden_size,
        "n_layer": MAMBA.num_hidden_layers,
        "vocab_size": MAMBA.vocab_size,
        "ssm_cfg": {"d_state": MAMBA.state_size, "d_conv": MAMBA.conv_kernel, "dt_rank": MAMBA.time_step_rank},
        "rms_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (original / "config.json").write_text(json.dumps(values))
    singular = {name.replace("backbone.embeddings.", "backbone.embedding."): value for name, value in tensors.items()}
    torch.save(singular, original / "pytorch_model.bin")
