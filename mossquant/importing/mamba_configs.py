# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of a Mamba in either layout, read as the config of a MossNet.

A key that changes what is computed is understood or refused with its value; what no key says is the layout's default.
Keys that say how the model was initialised or trained have no effect here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from mossquant.errors import InputError
from mossquant.files.json import validated
from mossquant.model.config import MossNetConfig

# Hugging Face: how the model was initialised, trained, saved or is generated from; what differs in rounding alone; and
# keys of the original that its conversion script left in the file.
_HUGGING_FACE_UNUSED = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "rescale_prenorm_residual"),
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale"),
    *("residual_in_fp32", "use_associative_scan", "use_mambapy"),
    *("d_inner", "d_model", "n_layer", "fused_add_norm", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg"),
}
_ORIGINAL_UNUSED = {"residual_in_fp32", "fused_add_norm"}
_ORIGINAL_SSM_UNUSED = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
_NOUN, _ADVICE = "a Mamba-1 that we can compute", "Import another model."


@dataclass(frozen=True)
class SourceConfig:
    """A source's config, understood.

    Attributes:
        layout: "Hugging Face", "state-spaces" or "mossnet".
        config: the shape as a MossNet.
        conv_bias: whether the convolution has a bias.
        notes: what the user should know, a sentence each.
    """

    layout: str
    config: MossNetConfig
    conv_bias: bool
    notes: tuple[str, ...]


Rank = Annotated[PositiveInt | None, BeforeValidator(lambda value: None if value == "auto" else value)]
"""dt_rank: an integer, or "auto" for ⌈D / 16⌉."""


class _Keys(BaseModel):
    """Keys that have an effect, with the layout's defaults; the others are in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)

    def others(self, unused: set[str]) -> list[str]:
        """Keys of which it is not known that they have no effect."""
        return [key[:60] for key in self.model_extra or {} if key not in unused]


class _HuggingFace(_Keys):
    model_type: Literal["mamba"]
    hidden_act: Literal["silu", "swish"] = "silu"
    use_bias: Literal[False] = False
    quantization_config: None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    expand: PositiveInt = 2
    intermediate_size: PositiveInt | None = None
    state_size: PositiveInt = 16
    conv_kernel: PositiveInt = 4
    time_step_rank: Rank = None
    rms_norm_eps: Annotated[float, Field(alias="layer_norm_epsilon", gt=0, lt=1)] = 1e-5
    tie_word_embeddings: bool = True
    use_conv_bias: bool = True


class _OriginalSsm(_Keys):
    layer: Literal["Mamba1"] = "Mamba1"
    bias: Literal[False] = False
    expand: PositiveInt = 2
    state_size: Annotated[PositiveInt, Field(alias="d_state")] = 16
    conv_kernel: Annotated[PositiveInt, Field(alias="d_conv")] = 4
    time_step_rank: Annotated[Rank, Field(alias="dt_rank")] = None
    conv_bias: bool = True


class _Original(_Keys):
    rms_norm: Literal[True] = True
    d_intermediate: Literal[0] = 0
    attn_layer_idx: Annotated[list[Any], Field(max_length=0)] = []
    attn_cfg: Annotated[dict[str, Any], Field(max_length=0)] = {}
    ssm_cfg: _OriginalSsm = _OriginalSsm()
    hidden_size: Annotated[PositiveInt, Field(alias="d_model")]
    num_hidden_layers: Annotated[PositiveInt, Field(alias="n_layer")]
    vocab_size: PositiveInt
    pad_vocab_size_multiple: PositiveInt = 8
    tie_word_embeddings: Annotated[bool, Field(alias="tie_embeddings")] = True


def read_source_config(values: Mapping[str, Any], *, where: Path) -> SourceConfig:
    """Read the content of a Mamba's `config.json`, in either layout, or of a MossNet's.

    Whole numbers may be written as floats (`"expand": 2.0`).

    Raises:
        InputError: another kind of model, or keys with values that no MossNet computes; all offenders at once.
    """
    values, kind = whole_numbers(values), values.get("model_type")
    if kind == "mossnet":
        return SourceConfig("mossnet", MossNetConfig.from_json(values, where=str(where)), True, ())
    if kind == "mamba":
        return _hugging_face(validated(values, _HuggingFace, where=str(where), noun=_NOUN, advice=_ADVICE), where)
    if kind is None and "d_model" in values and "n_layer" in values:
        return _original(validated(values, _Original, where=str(where), noun=_NOUN, advice=_ADVICE), where)
    said = "has no model_type" if kind is None else f"has model_type {repr(kind)[:60]}"
    raise InputError(
        f"{where} {said}; import takes a Mamba-1 (model_type 'mamba', or the original's d_model and n_layer) "
        "or a MossNet"
    )


def whole_numbers(value: Any) -> Any:
    """A JSON value in which whole numbers that are written as floats are integers."""
    if isinstance(value, dict):
        return {key: whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hugging_face(keys: _HuggingFace, where: Path) -> SourceConfig:
    inner = keys.expand * keys.hidden_size
    if keys.intermediate_size not in (None, inner):
        offender = f"intermediate_size is {keys.intermediate_size}, expand · hidden_size is {inner}"
        raise InputError.listing(f"{where} is not {_NOUN}", [offender], _ADVICE)
    unknown = keys.others(_HUGGING_FACE_UNUSED)
    notes = [f"keys of config.json that have no effect here: {', '.join(unknown)}"] if unknown else []
    return _understood("Hugging Face", _shape(keys), keys.use_conv_bias, notes, where)


def _original(keys: _Original, where: Path) -> SourceConfig:
    ssm, multiple = keys.ssm_cfg, keys.pad_vocab_size_multiple
    # The original's config is a closed list, so that a key outside it comes from another model.
    unknown = [*keys.others(_ORIGINAL_UNUSED), *(f"ssm_cfg.{key}" for key in ssm.others(_ORIGINAL_SSM_UNUSED))]
    if unknown:
        raise InputError.listing(f"{where} is not {_NOUN}", [f"unknown key {key}" for key in unknown], _ADVICE)
    shape = {**_shape(keys), **_shape(ssm), "vocab_size": -(-keys.vocab_size // multiple) * multiple}
    return _understood("state-spaces", shape, ssm.conv_bias, [], where)


def _shape(keys: _Keys) -> dict[str, Any]:
    """The keys that a MossNet has too."""
    return {name: value for name, value in keys if name in MossNetConfig.__dataclass_fields__}


def _understood(layout: str, shape: dict[str, Any], conv_bias: bool, notes: list[str], where: Path) -> SourceConfig:
    if not conv_bias:
        notes = [*notes, "the convolutions have no bias: zeros are stored, which compute the same"]
    config = MossNetConfig(**{**shape, "time_step_rank": shape["time_step_rank"] or -(-shape["hidden_size"] // 16)})
    checked = MossNetConfig.from_json(config.to_json(torch_dtype="float32"), where=f"{where}, read as a MossNet,")
    return SourceConfig(layout, checked, conv_bias, tuple(notes))
