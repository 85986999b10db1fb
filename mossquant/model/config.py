# SPDX-License-Identifier: Apache-2.0
"""The shape of a MossNet, as stored in `config.json`, and the presets.

Field names continue Hugging Face's Mamba config; `mlp_intermediate_size` has the `mlp_` because Hugging Face's
`intermediate_size` means d_inner. Letters as in `mossquant.model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, parse_stored, read_json

MAX_VOCABULARY = 1 << 22
"""Most entries of a vocabulary."""
_MAX_EXPERTS = 1 << 10
_MAX_EXPERTS_IN_ALL = 1 << 13

# The limits of the fields are far above any model that fits on a machine, and low enough that nothing multiplies out to
# an absurd allocation or loop.
ExpertCount = Annotated[int, Field(ge=0, le=_MAX_EXPERTS)]
ExpertCounts = Annotated[
    Annotated[ExpertCount, Tag("all layers")]
    | Annotated[tuple[ExpertCount, ...], Field(max_length=1 << 10), Tag("layers")],
    Discriminator(lambda value: "layers" if isinstance(value, list | tuple) else "all layers"),
]
Chosen = Annotated[int, Field(ge=1, le=_MAX_EXPERTS)]


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

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 16)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=1 << 10)]
    time_step_rank: Annotated[int, Field(ge=1, le=1 << 14)]
    expand: Annotated[int, Field(ge=1, le=16)] = 2
    state_size: Annotated[int, Field(ge=1, le=1 << 10)] = 16
    conv_kernel: Annotated[int, Field(ge=1, le=64)] = 4
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    tie_word_embeddings: bool = True
    num_ssm_experts: ExpertCounts = 1
    num_ssm_experts_per_tok: Chosen = 1
    num_mlp_experts: ExpertCounts = 0
    num_mlp_experts_per_tok: Chosen = 1
    mlp_intermediate_size: Annotated[int, Field(ge=0, le=1 << 18)] = 0

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
        if values.get("model_type") != "mossnet":
            raise InputError(
                f"{where}: model_type is {repr(values.get('model_type'))[:60]}, not 'mossnet'; "
                "bring a Mamba in with `mossquant import`"
            )
        names = [field.name for field in fields(cls)]
        stored = {"version": 1, **dict.fromkeys(names), **values}  # no default stands in for a key that is missing
        noun, advice = "a valid MossNet config", "Mend the file or copy the folder again."
        file = parse_stored(stored, _File, where=where, noun=noun, advice=advice)
        config = cls(**{name: getattr(file, name) for name in names})
        contradictions = config._contradictions()
        if contradictions:
            raise InputError.listing(f"{where} is not {noun}", contradictions, advice)
        return config

    def _contradictions(self) -> list[str]:
        """What its fields say against one another."""
        layers = range(self.num_hidden_layers)
        counts = {"num_ssm_experts": self.num_ssm_experts, "num_mlp_experts": self.num_mlp_experts}
        offenders = [
            f"{name} lists {len(count)} layers, num_hidden_layers is {len(layers)}"
            for name, count in counts.items()
            if isinstance(count, tuple) and len(count) != len(layers)
        ]
        if offenders:
            return offenders
        if min(map(self.ssm_experts, layers)) < 1:
            offenders.append("num_ssm_experts has 0, and every layer needs one")
        if max(map(self.mlp_experts, layers)) > 0 and self.mlp_intermediate_size == 0:
            offenders.append("mlp_intermediate_size is 0 though num_mlp_experts is not")
        in_all = sum(self.ssm_experts(layer) + self.mlp_experts(layer) for layer in layers)
        if in_all > _MAX_EXPERTS_IN_ALL:
            offenders.append(f"its experts come to {in_all} over all layers, {_MAX_EXPERTS_IN_ALL} is the most")
        return offenders


@dataclass(frozen=True)
class _File(MossNetConfig):
    """`config.json`: the shape, how it is stored, who wrote it, and what quantization adds."""

    version: Literal[1] = 1
    model_type: Literal["mossnet"] = "mossnet"
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    architectures: Any = None
    quantization_config: Any = None
    mossquant: Any = None


def read_config_json(folder: Path) -> dict[str, Any]:
    """The JSON object in `folder/config.json`.

    Raises:
        InputError: the folder or file is missing, too large to be a config, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{path} is not there, so {folder} is no checkpoint; give a checkpoint folder, or the name tiny"
        )
    values = read_json(path, largest=LARGEST_SMALL, advice="mend the file or copy it again")
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object; this is not a model config")
    return values


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


def _mamba(hidden: int, layers: int, vocab: int) -> MossNetConfig:
    return MossNetConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, time_step_rank=-(-hidden // 16)
    )


PRESETS: dict[str, MossNetConfig] = {
    "tiny": _moss(256, 4, 4096, 192, experts=4, rank=24),
    "8x30m": _moss(384, 10, 32000, 512, experts=8, rank=24),
    "8x200m": _moss(1024, 16, 32000, 1536, experts=8, rank=64),
    "8x1.5b": _moss(2048, 28, 50280, 4096, experts=8, rank=128),
    "mamba-5m": _mamba(256, 10, 4096),
    "mamba-130m": _mamba(768, 24, 50280),
    "mamba-370m": _mamba(1024, 48, 50280),
}
"""MossNets of ours, not the paper's: the last number of a name is the dense-equivalent size.
The two larger Mambas have the published shapes (Gu & Dao 2023)."""


def preset(name: str) -> MossNetConfig:
    """The preset of that name.

    Raises:
        InputError: no such preset; the known names are listed.
    """
    if name not in PRESETS:
        raise InputError.unknown("preset", name, PRESETS)
    return PRESETS[name]
