# SPDX-License-Identifier: Apache-2.0
"""The shape of a MossNet, as stored in `config.json`, and the presets.

Field names continue Hugging Face's Mamba config; `mlp_intermediate_size` has the `mlp_` because Hugging Face's
`intermediate_size` means d_inner. Letters as in `mossquant.model`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, read_json
from mossquant.formats.dtypes import FLOAT_DTYPES

MAX_VOCABULARY = 1 << 22
"""Most entries of a vocabulary."""
# Far above any model that fits on a machine, low enough that nothing multiplies out to an absurd allocation or loop.
_LIMITS = {
    "vocab_size": MAX_VOCABULARY,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1 << 10,
    "expand": 16,
    "state_size": 1 << 10,
    "conv_kernel": 64,
    "time_step_rank": 1 << 14,
    "num_ssm_experts_per_tok": 1 << 10,
    "num_mlp_experts_per_tok": 1 << 10,
    "mlp_intermediate_size": 1 << 18,
}
_MAX_EXPERTS = 1 << 10
_MAX_EXPERTS_IN_ALL = 1 << 13
# Keys of the file that are not fields: who wrote it, how it is stored, and what quantization adds.
_OTHER_KEYS = {"model_type", "torch_dtype", "version", "architectures", "quantization_config", "mossquant"}


@dataclass(frozen=True)
class MossNetConfig:
    """Shape of a MossNet. `num_ssm_experts` and `num_mlp_experts` are one number, or one per layer (pruned models).

    Attributes:
        vocab_size: V.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks.
        expand: d_inner E = expand · D.
        state_size: N, states per channel.
        conv_kernel: W, width of the causal convolution.
        time_step_rank: R, dt_rank.
        rms_norm_eps: added to the mean square in RMSNorm.
        tie_word_embeddings: the LM head is the embedding.
        num_ssm_experts: X of the SSM-MoE; 1 means no router and gate 1.
        num_ssm_experts_per_tok: K; where fewer experts are left, all of them are chosen.
        num_mlp_experts: X of the MLP-MoE; 0 means that the block has no MLP, 1 no router.
        num_mlp_experts_per_tok: K of the MLP-MoE.
        mlp_intermediate_size: F, hidden width of an MLP expert.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    time_step_rank: int
    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    num_ssm_experts: int | tuple[int, ...] = 1
    num_ssm_experts_per_tok: int = 1
    num_mlp_experts: int | tuple[int, ...] = 0
    num_mlp_experts_per_tok: int = 1
    mlp_intermediate_size: int = 0

    @property
    def d_inner(self) -> int:
        """E."""
        return self.expand * self.hidden_size

    def ssm_experts(self, layer: int) -> int:
        """Number of SSM experts of a layer."""
        count = self.num_ssm_experts
        return count if isinstance(count, int) else count[layer]

    def mlp_experts(self, layer: int) -> int:
        """Number of MLP experts of a layer, 0 where it has no MLP."""
        count = self.num_mlp_experts
        return count if isinstance(count, int) else count[layer]

    def ssm_chosen(self, layer: int) -> int:
        """K of the SSM-MoE of a layer."""
        return min(self.num_ssm_experts_per_tok, self.ssm_experts(layer))

    def mlp_chosen(self, layer: int) -> int:
        """K of the MLP-MoE of a layer."""
        return min(self.num_mlp_experts_per_tok, self.mlp_experts(layer))

    def to_json(self, *, torch_dtype: str) -> dict[str, Any]:
        """The content of `config.json`; `torch_dtype` is the stored type, one of float32, bfloat16, float16."""
        values: dict[str, Any] = {"version": 1, "model_type": "mossnet", "torch_dtype": torch_dtype}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str = "config.json") -> "MossNetConfig":
        """Read and check the content of a `config.json`.

        Raises:
            InputError: another model type or version, unknown or missing keys, a value of the wrong type or out of
                range; all offenders at once.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: expected a JSON object; this is not a MossNet config")
        if values.get("model_type") != "mossnet":
            raise InputError(
                f"{where}: model_type is {_short(values.get('model_type'))}, not 'mossnet'; "
                "bring a Mamba in with `mossquant import`"
            )
        version = values.get("version", 1)
        if version != 1 or isinstance(version, bool):
            raise InputError(f"{where}: version {_short(version)} was written by a newer release; upgrade mossquant")
        offenders = [
            f"unknown key {_short(key)}"
            for key in values
            if key not in _OTHER_KEYS and key not in cls.__dataclass_fields__
        ]
        dtype = values.get("torch_dtype", "float32")
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
            offenders.append(f"torch_dtype {_short(dtype)} is none of {', '.join(FLOAT_DTYPES)}")
        names = [field.name for field in fields(cls)]
        offenders += [f"{name} is missing" for name in names if name not in values]
        shape = {name: values[name] for name in names if name in values}
        shape = {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}
        offenders += _offenders(shape)
        if offenders:
            raise InputError.listing(
                f"{where} is not a valid MossNet config", offenders, "Mend the file or export it again."
            )
        return cls(**shape)


def read_config_json(folder: Path) -> dict[str, Any]:
    """The JSON object in `folder/config.json`.

    Raises:
        InputError: the folder or file is missing, too large to be a config, or not a JSON object.
    """
    path = folder / "config.json"
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a checkpoint folder or the name tiny")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the checkpoint folder that holds config.json and model.safetensors")
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json, so it is not a checkpoint folder; give one, or the name tiny")
    values = read_json(path, largest=LARGEST_SMALL, advice="mend the file or export it again")
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object; this is not a model config")
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _offenders(values: Mapping[str, Any]) -> list[str]:
    out = []
    for name, limit in _LIMITS.items():
        if name not in values:
            continue
        value, low = values[name], 0 if name == "mlp_intermediate_size" else 1
        if type(value) is not int or not low <= value <= limit:
            out.append(f"{name} is {_short(value)}, needs an integer from {low} to {limit}")
    layers = values.get("num_hidden_layers")
    in_all = 0
    for name, low in (("num_ssm_experts", 1), ("num_mlp_experts", 0)):
        if name not in values:
            continue
        value = values[name]
        counts = value if isinstance(value, tuple) else (value,)
        wrong = [count for count in counts if type(count) is not int or not low <= count <= _MAX_EXPERTS]
        if wrong:
            out.append(f"{name} has {_short(wrong[0])}, needs integers from {low} to {_MAX_EXPERTS}")
        elif isinstance(value, tuple) and len(value) != layers:
            out.append(f"{name} lists {len(value)} layers, num_hidden_layers is {_short(layers)}")
        elif name == "num_mlp_experts" and any(counts) and values.get("mlp_intermediate_size", 0) == 0:
            out.append("mlp_intermediate_size is 0 though num_mlp_experts is not")
        elif type(layers) is int:
            in_all += sum(counts) * (1 if isinstance(value, tuple) else layers)
    if in_all > _MAX_EXPERTS_IN_ALL:
        out.append(
            f"num_ssm_experts and num_mlp_experts come to {in_all} over all layers, {_MAX_EXPERTS_IN_ALL} is the most"
        )
    eps = values.get("rms_norm_eps", 1e-5)
    if type(eps) not in (int, float) or not math.isfinite(eps) or not 0 < eps < 1:
        out.append(f"rms_norm_eps is {_short(eps)}, needs a number between 0 and 1")
    if not isinstance(values.get("tie_word_embeddings", True), bool):
        out.append(f"tie_word_embeddings is {_short(values['tie_word_embeddings'])}, needs true or false")
    return out


def _moss(hidden: int, layers: int, vocab: int, intermediate: int, *, experts: int, rank: int) -> MossNetConfig:
    return MossNetConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        time_step_rank=rank,
        num_ssm_experts=experts,
        num_ssm_experts_per_tok=2,
        num_mlp_experts=experts,
        num_mlp_experts_per_tok=2,
        mlp_intermediate_size=intermediate,
    )


PRESETS: dict[str, MossNetConfig] = {
    "tiny": _moss(256, 4, 4096, 192, experts=4, rank=24),
    "8x30m": _moss(384, 10, 32000, 512, experts=8, rank=24),
    "8x200m": _moss(1024, 16, 32000, 1536, experts=8, rank=64),
    "8x1.5b": _moss(2048, 28, 50280, 4096, experts=8, rank=128),
}
"""Ours, not the paper's; the last number of a name is the dense-equivalent size."""


def preset(name: str) -> MossNetConfig:
    """The preset of that name.

    Raises:
        InputError: no such preset; the known names are listed.
    """
    if name not in PRESETS:
        raise InputError.unknown("preset", name, PRESETS)
    return PRESETS[name]
