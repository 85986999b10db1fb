# SPDX-License-Identifier: Apache-2.0
"""The `config.json` of a Mamba in either layout, read as the config of a MossNet.

A key that changes what is computed is understood or refused with its value; what no key says is the layout's default.
Keys that say how the model was initialised or trained have no effect here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.model.config import MossNetConfig

__all__ = ["SourceConfig", "read_source_config"]

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


def read_source_config(values: Mapping[str, Any], *, where: Path) -> SourceConfig:
    """Read the content of a Mamba's `config.json`, in either layout.

    Raises:
        InputError: another kind of model, or keys with values that no MossNet computes; all offenders at once.
    """
    kind = values.get("model_type")
    if kind == "mamba":
        return _hugging_face(_Keys(values), where)
    if kind is None and "d_model" in values and "n_layer" in values:
        return _original(_Keys(values), where)
    found = "has no model_type" if kind is None else f"has model_type {_short(kind)}"
    raise InputError(
        f"{where} {found}; import takes a Mamba-1 (model_type 'mamba', or the original's d_model and n_layer) "
        "or a MossNet"
    )


@dataclass
class _Keys:
    """Keys taken one by one; what is wrong with them is gathered in `offenders`."""

    values: Mapping[str, Any]
    prefix: str = ""
    offenders: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any) -> Any:
        self.taken.add(key)
        return self.values.get(key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive integer; 1 stands in for one that is wrong."""
        value = self.get(key, default)
        if value is None:
            self.offenders.append(f"{self.prefix}{key} is missing")
        elif type(value) is not int or value < 1:
            self.offenders.append(f"{self.prefix}{key} is {_short(value)}, needs a positive integer")
        else:
            return value
        return 1

    def rank(self, key: str, width: int) -> int:
        """dt_rank: an integer, or "auto" for ⌈D / 16⌉."""
        return -(-width // 16) if self.get(key, "auto") == "auto" else self.whole(key)

    def fraction(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) is not float or not 0 < value < 1:
            self.offenders.append(f"{self.prefix}{key} is {_short(value)}, needs a number between 0 and 1")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.offenders.append(f"{self.prefix}{key} is {_short(value)}, needs true or false")
            return default
        return value

    def must(self, key: str, *allowed: Any) -> None:
        """The first of `allowed` is the default."""
        value = self.get(key, allowed[0])
        if not any(type(value) is type(other) and value == other for other in allowed):
            needed = " or ".join(_short(other) for other in allowed)
            self.offenders.append(f"{self.prefix}{key} is {_short(value)}, only {needed} is supported")

    def rest(self, unused: set[str]) -> list[str]:
        """Keys that were neither taken nor are known to have no effect."""
        return [f"{self.prefix}{key}"[:60] for key in self.values if key not in self.taken and key not in unused]


def _hugging_face(keys: _Keys, where: Path) -> SourceConfig:
    keys.must("model_type", "mamba")
    keys.must("hidden_act", "silu", "swish")
    keys.must("use_bias", False)
    keys.must("quantization_config", None)
    hidden, expand = keys.whole("hidden_size"), keys.whole("expand", 2)
    inner = keys.get("intermediate_size", hidden * expand)
    if inner != hidden * expand and not keys.offenders:
        keys.offenders.append(f"intermediate_size is {_short(inner)}, expand · hidden_size is {hidden * expand}")
    config = MossNetConfig(
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=keys.whole("num_hidden_layers"),
        expand=expand,
        state_size=keys.whole("state_size", 16),
        conv_kernel=keys.whole("conv_kernel", 4),
        time_step_rank=keys.rank("time_step_rank", hidden),
        rms_norm_eps=keys.fraction("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
    )
    conv_bias = keys.flag("use_conv_bias", True)
    unknown = keys.rest(_HUGGING_FACE_UNUSED)
    note = [f"keys of config.json that have no effect here: {', '.join(unknown)}"] if unknown else []
    return _understood(keys, "Hugging Face", config, conv_bias, "backbone.embeddings.weight", note, where)


def _original(keys: _Keys, where: Path) -> SourceConfig:
    keys.must("rms_norm", True)
    keys.must("d_intermediate", 0)
    keys.must("attn_layer_idx", [])
    keys.must("attn_cfg", {})
    given = keys.get("ssm_cfg", {})
    if not isinstance(given, Mapping):
        keys.offenders.append(f"ssm_cfg is {_short(given)}, needs an object")
        given = {}
    ssm = _Keys(given, "ssm_cfg.", keys.offenders)
    ssm.must("layer", "Mamba1")
    ssm.must("bias", False)
    hidden, vocab, multiple = keys.whole("d_model"), keys.whole("vocab_size"), keys.whole("pad_vocab_size_multiple", 8)
    config = MossNetConfig(
        vocab_size=-(-vocab // multiple) * multiple,
        hidden_size=hidden,
        num_hidden_layers=keys.whole("n_layer"),
        expand=ssm.whole("expand", 2),
        state_size=ssm.whole("d_state", 16),
        conv_kernel=ssm.whole("d_conv", 4),
        time_step_rank=ssm.rank("dt_rank", hidden),
        tie_word_embeddings=keys.flag("tie_embeddings", True),
    )
    conv_bias = ssm.flag("conv_bias", True)
    # The original's config is a closed list, so that a key outside it comes from another model.
    unknown = keys.rest(_ORIGINAL_UNUSED) + ssm.rest(_ORIGINAL_SSM_UNUSED)
    keys.offenders.extend(f"unknown key {key}" for key in unknown)
    return _understood(keys, "state-spaces", config, conv_bias, "backbone.embedding.weight", [], where)


def _understood(
    keys: _Keys,
    layout: str,
    config: MossNetConfig,
    conv_bias: bool,
    embeddings: str,
    notes: list[str],
    where: Path,
) -> SourceConfig:
    if keys.offenders:
        raise InputError.listing(
            f"{where} is not a Mamba-1 that we can compute", keys.offenders, "Import another model."
        )
    if not conv_bias:
        notes = [*notes, "the convolutions have no bias: zeros are stored, which compute the same"]
    checked = MossNetConfig.from_json(config.to_json(torch_dtype="float32"), where=f"{where}, read as a MossNet,")
    return SourceConfig(layout, checked, conv_bias, embeddings, tuple(notes))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
