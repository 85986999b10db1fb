# SPDX-License-Identifier: Apache-2.0
"""Small models, quantized and lowered: one folder a model, recipe and target, made once a session."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from shared import once
from small import CONFIGS, random_model, random_tokens, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.eval.open import open_runner
from mossquant.model.config import MossNetConfig
from mossquant.plan.capabilities import Activations
from mossquant.runner import LogitsWanted, Runner, Tokens
from mossquant.targets.export import export
from mossquant.targets.target import target_of
from mossquant.targets.torch.runner import TorchRunner
from mossquant.targets.weights_report import WeightsReport

WIDE = MossNetConfig(
    vocab_size=80,
    hidden_size=48,
    num_hidden_layers=2,
    time_step_rank=12,
    num_ssm_experts=4,
    num_ssm_experts_per_tok=2,
    num_mlp_experts=(4, 3),
    num_mlp_experts_per_tok=2,
    mlp_intermediate_size=70,
)
MODELS: dict[str, MossNetConfig] = {
    **CONFIGS,
    "wide": WIDE,
    "mamba48": replace(WIDE, time_step_rank=48, num_ssm_experts=1, num_mlp_experts=0, mlp_intermediate_size=0),
    "no window": replace(WIDE, conv_kernel=1, num_mlp_experts=(0, 4)),
}
"""Beside the small ones: rows of several blocks, a dt_rank of one block and a half, a convolution of width 1."""

_REST = """
  - {role: "*norm*", keep: fp32, why: "few bytes"}
  - {role: "*.router", keep: fp32, why: "few bytes", optional: true}
  - {role: ssm.A_log, format: int8}
  - {role: "ssm.conv*", format: int8_g32}
  - {role: ssm.expert.dt_bias, format: int8_g32}
  - {role: ssm.D, format: int8_g32}
"""
_G128 = f"""version: 1
name: int4-g128
targets: [torch, onnx]
weights: {_REST}
  - {{role: "*", format: int4_g128}}
activations:
  - {{role: "*", format: int8_block}}
state:
  - {{role: "*", format: fp32}}
"""
_MIXED = f"""version: 1
name: mixed
targets: [torch, onnx]
weights:
  - {{match: "*.experts.1.x_proj.weight", keep: stored, why: "a test"}}
  - {{match: "*.experts.2.x_proj.weight", format: int8}}
  - {{match: "*.experts.0.dt_proj.weight", keep: fp32, why: "a test"}}
  - {{match: "*.experts.2.dt_proj.weight", format: int8_g32}}
  - {{match: "*.experts.3.dt_proj.weight", format: int8}}
  - {{match: "*.experts.1.dt_proj.bias", keep: stored, why: "a test"}}
  - {{match: "*.layers.1.mixer.D", keep: stored, why: "a test"}}
  - {{match: "*.layers.1.mixer.in_proj.weight", keep: stored, why: "a test"}}
  - {{match: "*.mlp.experts.2.w2.weight", format: int8}}
  - {{match: "*.mlp.experts.1.w3.weight", format: int8_g32}} {_REST}
  - {{role: "*", format: int4_g32}}
activations:
  - {{match: layers.1.mixer.out_proj.input, format: fp32}}
  - {{role: "*", format: int8_block}}
state:
  - {{role: "*", format: fp32}}
"""
_BY_EXPERT = f"""version: 1
name: by-expert
targets: [torch, executorch]
weights:
  - {{match: "*.experts.1.x_proj.weight", keep: stored, why: "a test"}}
  - {{match: "*.experts.2.x_proj.weight", format: int8}}
  - {{match: "*.layers.0.*.experts.0.dt_proj.weight", keep: fp32, why: "a test"}}
  - {{match: "*.layers.0.*.experts.3.dt_proj.weight", format: int8}}
  - {{match: "*.layers.1.*.experts.2.dt_proj.weight", format: int4_g128}}
  - {{match: "*.experts.1.dt_proj.bias", keep: stored, why: "a test"}}
  - {{match: "*.layers.1.mixer.D", keep: stored, why: "a test"}}
  - {{match: "*.layers.1.mixer.in_proj.weight", keep: stored, why: "a test"}}
  - {{match: "*.layers.0.mlp.experts.2.w2.weight", format: int8}}
  - {{match: "*.layers.1.mlp.experts.0.w2.weight", keep: stored, why: "a test"}}
  - {{match: "*.mlp.experts.1.w3.weight", format: int4_g128}} {_REST}
  - {{role: "*", format: int4_g32}}
activations:
  - {{role: "*", format: int8_row_asym}}
state:
  - {{role: "*", format: fp32}}
"""
_ONE_INPUT = _MIXED.replace("  - {match: layers.1.mixer.out_proj.input, format: fp32}\n", "").replace(
    "mixed", "one-input"
)
_INT8_STATES = f"""version: 1
name: int8-states
targets: [torch, native]
weights: {_REST}
  - {{role: "*", format: int4_g32}}
activations:
  - {{role: "*", format: int8_block}}
state:
  - {{role: ssm.ssm_state, format: int8}}
  - {{role: "*", format: fp32}}
"""
RECIPES = {
    **{"int4": "int4-uniform", "int8": "int8-uniform", "g128": _G128},
    **{"mixed": _MIXED, "by expert": _BY_EXPERT, "one input": _ONE_INPUT},
    **{
        "int8 states": _INT8_STATES,
        "fp16 states": _INT8_STATES.replace("ssm_state, format: int8", "ssm_state, format: fp16"),
    },
}
"""Name → recipe; "mixed", "by expert" and "one input" have another format for every other expert, as .onnx, .pte and
.moss hold them."""

SUFFIXES = {"onnx": "onnx", "executorch": "pte", "native": "moss"}


@dataclass(frozen=True)
class Lowered:
    """A checkpoint, quantized or not, and its artifact."""

    config: MossNetConfig
    checkpoint: Path
    artifact: Path
    target: str = "onnx"

    @property
    def program(self) -> Path:
        return self.artifact / f"model.{SUFFIXES[self.target]}"

    @cached_property
    def runner(self) -> Runner:
        return open_runner(self.artifact, threads=1)

    def reference(self, *, activations: str | None = None) -> TorchRunner:
        """The PyTorch model of the checkpoint in float64, with the activations of the artifact unless others are said.

        An artifact with several activation formats has those of the plan.
        """
        own = self.runner.info.activations
        wanted = activations or ("planned" if own == "mixed" else own)
        return TorchRunner.open(self.checkpoint, activations=wanted, dtype=torch.float64)

    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.program)

    def tokens(self, batch: int, time: int, *, seed: int = 0) -> NDArray[np.int64]:
        found: NDArray[np.int64] = random_tokens(self.config, batch, time, seed=seed).numpy()
        return found


class Workshop:
    """Makes checkpoints and artifacts when they are first asked for, in a folder that all processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str | None, ...], Lowered] = {}

    def __call__(
        self,
        model: str,
        recipe: str | None = None,
        activations: Activations | None = None,
        *,
        target: str = "onnx",
        scales: str | None = None,
        isa: str | None = None,
        kernels: str | None = None,
    ) -> Lowered:
        """The model lowered; without a recipe in full precision (its checkpoint is stored in bf16)."""
        key = (model, recipe, activations, target, scales, isa, kernels)
        if key not in self._made:
            checkpoint = self.checkpoint(model, recipe)
            artifact = once(
                checkpoint.with_name(f"{checkpoint.name}-{activations}-{target}-{scales}-{isa}-{kernels}"),
                lambda folder: export(
                    checkpoint,
                    folder,
                    target=target,
                    activations=activations,
                    scales=scales,
                    isa=isa,
                    kernels=kernels,
                ),
            )
            self._made[key] = Lowered(MODELS[model], checkpoint, artifact, target)
        return self._made[key]

    def checkpoint(self, model: str, recipe: str | None = None) -> Path:
        """The checkpoint of a model, or what the recipe makes of it."""
        name = model.replace(" ", "-")
        original = once(
            self._folder / name,
            lambda folder: write_model(folder, random_model(MODELS[model], dtype=torch.float32), dtype=torch.bfloat16),
        )
        if recipe is None:
            return original

        def make(folder: Path) -> None:
            text = RECIPES[recipe]
            if "\n" in text:
                path = folder.with_name(f"{folder.name}.yaml")
                path.write_text(text)
                text = str(path)
            quantize(original, folder, recipe=text)

        return once(self._folder / f"{name}-{recipe.replace(' ', '-')}", make)


def relative(found: NDArray[np.floating], expected: NDArray[np.floating]) -> NDArray[np.float64]:
    """Largest difference at every position, relative to the largest expected value: [B, T, V] → [B, T]."""
    assert found.shape == expected.shape
    scale = np.abs(expected).max()
    return np.asarray(np.abs(found.astype(np.float64) - expected).max(-1) / scale)


def read_back(checkpoint: str | Path, artifact: str | Path) -> WeightsReport:
    """What reading back the weights of an artifact finds."""
    located = locate(artifact)
    return target_of(located).read_back(open_weights(checkpoint, verb="verify"), located)


def same_bits(own: Runner, other: Runner, tokens: Tokens, lengths: Sequence[int]) -> None:
    """Logits of all positions, then of the last one, for calls of these lengths, and the states after them.

    Args:
        own: whose states' names are compared.
        other: what it is held against.
        tokens: [B, T], T at least twice the lengths' sum.
        lengths: tokens of a call.
    """
    states, at = (own.initial_state(len(tokens)), other.initial_state(len(tokens))), 0
    wants: tuple[LogitsWanted, ...] = ("all", "last")
    for length in lengths:
        for wanted in wants:
            part = tokens[:, at : at + length]
            found, mine = own(part, states[0], logits=wanted)
            expected, theirs = other(part, states[1], logits=wanted)
            np.testing.assert_array_equal(found, expected)
            states, at = (mine, theirs), at + length
    after = other.read(states[1])
    for name, array in own.read(states[0]).items():
        np.testing.assert_array_equal(array, after[name])
