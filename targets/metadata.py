# SPDX-License-Identifier: Apache-2.0
"""What every program of ours says about itself, whatever its target; each target adds what only it has."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.manifest import FileName, Sha256
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.files.json import parse_json
from mossquant.files.outputs import file_sha256
from mossquant.release import release
from mossquant.targets.source import Source

__all__ = ["Count", "ProgramMetadata", "activations_of", "common_metadata", "parsed"]

Count = Annotated[int, Field(gt=0, lt=1 << 63)]


class ProgramMetadata(BaseModel):
    """What a program is.

    Attributes:
        version: of this content.
        kind: always "artifact".
        release: of mossquant, that wrote it.
        config: the model's config, as in `config.json`.
        weights: name of the recipe, or the stored type of a full-precision checkpoint.
        state_format: format in which the state is carried.
        parameters: parameters of the full-precision model, a tied table once.
        payload_bytes: bytes of codes, padding, scales and kept tensors in the checkpoint that was lowered.
        source_kind: "checkpoint" or "quantized checkpoint".
        source_files: file name → SHA-256 of what was lowered.
        tokenizer_sha256: of the `tokenizer.json` that belongs to it, None where there is none.
        seen_text: SHA-256 of texts that the model was trained or calibrated on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    kind: Literal["artifact"] = "artifact"
    release: str
    config: dict[str, Any]
    weights: str
    state_format: Literal["fp32"] = "fp32"
    parameters: Count
    payload_bytes: Count
    source_kind: Literal["checkpoint", "quantized checkpoint"]
    source_files: dict[FileName, Sha256]
    tokenizer_sha256: Sha256 | None
    seen_text: list[Sha256]


def common_metadata(source: Checkpoint | QuantizedCheckpoint) -> dict[str, Any]:
    """The fields of `ProgramMetadata` for what is lowered."""
    quantized = isinstance(source, QuantizedCheckpoint)
    tokenizer = source.tokenizer_path
    return {
        "release": release(),
        "config": source.config.to_json(torch_dtype=source.torch_dtype),
        "weights": source.recipe_name if isinstance(source, QuantizedCheckpoint) else source.torch_dtype,
        "parameters": source.parameters,
        "payload_bytes": source.payload_bytes if isinstance(source, QuantizedCheckpoint) else source.stored_bytes,
        "source_kind": "quantized checkpoint" if quantized else "checkpoint",
        "source_files": source.hashes(),
        "tokenizer_sha256": None if tokenizer is None else file_sha256(tokenizer),
        "seen_text": list(source.seen_text()),
    }


def activations_of(source: Source, names: list[str]) -> str:
    """The activation format of the inputs of quantized linears, "fp32" where there are none, "mixed" for several."""
    found = {source.activations(name) for name in names if source.format(name) is not None}
    return "mixed" if len(found) > 1 else next(iter(found), "fp32")


def changed_inputs(source: Checkpoint | QuantizedCheckpoint, tensors: Source, names: list[str]) -> tuple[str, ...]:
    """A note for every planned activation format that the target rounds in its own way instead."""
    if isinstance(source, Checkpoint):
        return ()
    pairs = {(planned[0], tensors.activations(name)) for name in names if (planned := source.input_format(name))}
    return tuple(f"inputs are {now} in place of the planned {was}" for was, now in sorted(pairs) if was != now)


M = TypeVar("M", bound=ProgramMetadata)


def parsed(model: type[M], text: str, path: Path) -> M:
    """Metadata from JSON. Raises `InputError`: it is not what this release writes."""
    try:
        return model.model_validate(parse_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])) or "metadata", first["msg"].lower()
    except ValueError as error:
        where, what = "metadata", str(error)
    raise InputError(
        f"{path}: its metadata cannot be read ({where[:80]}: {what[:120]}); "
        "another release of mossquant wrote it: use that one, or export again"
    )
