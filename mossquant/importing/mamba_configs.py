# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of a Mamba in either layout, read as the config of a MossNet.

A key that changes what is computed is understood or refused with its value; what no key says is the layout's default.
Keys that say how the model was initialised or trained have no effect here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from mossquant.errors import InputError
from mossquant.files.json import complaints
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


@dataclass(frozen=True)
class SourceConfig:
    """A source's config, understood.

    Attributes:
        layout: "Hugging Face", "state-spaces" or "mossnet".
        config: the shape as a MossNet.
        conv_bias: whether the convolution has a bias.
        embeddings: the layout's name of the embedding table.
        notes: what the user should know, a sentence each.
    """

    layout: str
    config: MossNetConfig
    conv_bias: bool
    embeddings: str
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
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    tie_word_embeddings: bool = True
    use_conv_bias: bool = True


class _OriginalSsm(_Keys):
    layer: Literal["Mamba1"] = "Mamba1"
    bias: Literal[False] = False
    expand: PositiveInt = 2
    d_state: PositiveInt = 16
    d_conv: PositiveInt = 4
    dt_rank: Rank = None
    conv_bias: bool = True


class _Original(_Keys):
    rms_norm: Literal[True] = True
    d_intermediate: Literal[0] = 0
    attn_layer_idx: Annotated[list[Any], Field(max_length=0)] = []
    attn_cfg: Annotated[dict[str, Any], Field(max_length=0)] = {}
    ssm_cfg: _OriginalSsm = _OriginalSsm()
    d_model: PositiveInt
    n_layer: PositiveInt
    vocab_size: PositiveInt
    pad_vocab_size_multiple: PositiveInt = 8
    tie_embeddings: bool = True


Layout = TypeVar("Layout", bound=_Keys)


def read_source_config(values: Mapping[str, Any], *, where: Path) -> SourceConfig:
    """Read the content of a Mamba's `config.json`, in either layout.

    Raises:
        InputError: another kind of model, or keys with values that no MossNet computes; all offenders at once.
    """
    kind = values.get("model_type")
    if kind == "mamba":
        return _hugging_face(_parsed(_HuggingFace, values, where), where)
    if kind is None and "d_model" in values and "n_layer" in values:
        return _original(_parsed(_Original, values, where), where)
    said = "has no model_type" if kind is None else f"has model_type {repr(kind)[:60]}"
    raise InputError(
        f"{where} {said}; import takes a Mamba-1 (model_type 'mamba', or the original's d_model and n_layer) "
        "or a MossNet"
    )


def _parsed(layout: type[Layout], values: Mapping[str, Any], where: Path) -> Layout:
    try:
        return layout.model_validate(values)
    except ValidationError as error:
        raise _refusal(where, complaints(error)) from None


def _refusal(where: Path, offenders: Sequence[str]) -> InputError:
    return InputError.listing(f"{where} is not a Mamba-1 that we can compute", offenders, "Import another model.")


def _hugging_face(keys: _HuggingFace, where: Path) -> SourceConfig:
    inner = keys.expand * keys.hidden_size
    if keys.intermediate_size not in (None, inner):
        offender = f"intermediate_size is {keys.intermediate_size}, expand · hidden_size is {inner}"
        raise _refusal(where, [offender])
    config = MossNetConfig(
        vocab_size=keys.vocab_size,
        hidden_size=keys.hidden_size,
        num_hidden_layers=keys.num_hidden_layers,
        expand=keys.expand,
        state_size=keys.state_size,
        conv_kernel=keys.conv_kernel,
        time_step_rank=keys.time_step_rank or -(-keys.hidden_size // 16),
        rms_norm_eps=keys.layer_norm_epsilon,
        tie_word_embeddings=keys.tie_word_embeddings,
    )
    unknown = keys.others(_HUGGING_FACE_UNUSED)
    notes = [f"keys of config.json that have no effect here: {', '.join(unknown)}"] if unknown else []
    return _understood("Hugging Face", config, keys.use_conv_bias, "backbone.embeddings.weight", notes, where)


def _original(keys: _Original, where: Path) -> SourceConfig:
    ssm, multiple = keys.ssm_cfg, keys.pad_vocab_size_multiple
    # The original's config is a closed list, so that a key outside it comes from another model.
    unknown = [*keys.others(_ORIGINAL_UNUSED), *(f"ssm_cfg.{key}" for key in ssm.others(_ORIGINAL_SSM_UNUSED))]
    if unknown:
        raise _refusal(where, [f"unknown key {key}" for key in unknown])
    config = MossNetConfig(
        vocab_size=-(-keys.vocab_size // multiple) * multiple,
        hidden_size=keys.d_model,
        num_hidden_layers=keys.n_layer,
        expand=ssm.expand,
        state_size=ssm.d_state,
        conv_kernel=ssm.d_conv,
        time_step_rank=ssm.dt_rank or -(-keys.d_model // 16),
        tie_word_embeddings=keys.tie_embeddings,
    )
    return _understood("state-spaces", config, ssm.conv_bias, "backbone.embedding.weight", [], where)


def _understood(
    layout: str, config: MossNetConfig, conv_bias: bool, embeddings: str, notes: list[str], where: Path
) -> SourceConfig:
    if not conv_bias:
        notes = [*notes, "the convolutions have no bias: zeros are stored, which compute the same"]
    checked = MossNetConfig.from_json(config.to_json(torch_dtype="float32"), where=f"{where}, read as a MossNet,")
    return SourceConfig(layout, checked, conv_bias, embeddings, tuple(notes))
