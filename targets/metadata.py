# SPDX-License-Identifier: Apache-2.0
"""What every program of ours says about itself, whatever its target; each target adds what only it has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from mossquant.checkpoint.manifest import FileName, Sha256
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, parse_json
from mossquant.files.outputs import file_sha256
from mossquant.release import release
from mossquant.runner import RunnerInfo
from mossquant.text.declared import DeclaredText

# Characters of a text.json, of the megabyte that a program says about itself.
_LARGEST_TEXT = LARGEST_SMALL // 2
Count = Annotated[int, Field(gt=0, lt=1 << 63)]


class ProgramMetadata(BaseModel):
    """What a program is.

    Attributes:
        version: of this content.
        kind: always "artifact".
        release: of mossquant, that wrote it.
        config: the model's config, as in `config.json`.
        weights: name of the recipe, or the stored type of a full-precision checkpoint.
        state_format: format in which the state is carried; where arrays have several, all of them.
        parameters: parameters of the full-precision model, a tied table once.
        payload_bytes: bytes of codes, padding, scales and kept tensors in the checkpoint that was lowered.
        source_kind: "checkpoint" or "quantized checkpoint".
        source_files: file name → SHA-256 of what was lowered.
        tokenizer_sha256: of the `tokenizer.json` that belongs to it, None where there is none.
        seen_text: SHA-256 of texts that the model was trained or calibrated on.
        target: what it was lowered to.
        runtime_minimum: oldest release of the runtime that it runs on.
        activations: format of the inputs of quantized linears, "mixed" for several; "fp32" where nothing is quantized.
        text: what the model declares about its text, as in `text.json`; None, and then not written, where nothing.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    version: Literal[1] = 1
    kind: Literal["artifact"] = "artifact"
    release: str
    config: dict[str, Any]
    weights: str
    state_format: str = "fp32"
    parameters: Count
    payload_bytes: Count
    source_kind: Literal["checkpoint", "quantized checkpoint"]
    source_files: dict[FileName, Sha256]
    tokenizer_sha256: Sha256 | None
    seen_text: list[Sha256]
    target: str
    runtime_minimum: str
    activations: str
    text: DeclaredText | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if key != "text" or value is not None}


def common_metadata(weights: Weights) -> dict[str, Any]:
    """The fields of `ProgramMetadata` for what is lowered."""
    origin, text = weights.origin, weights.origin.declared_text(weights.config.vocab_size)
    if text is not None and len(text.to_json()) > _LARGEST_TEXT:
        raise InputError(f"text.json of {origin.path} holds more than the {_LARGEST_TEXT} bytes that a program carries")
    return {
        "release": release(),
        "config": weights.config.to_json(torch_dtype=origin.torch_dtype),
        "weights": origin.name,
        "parameters": origin.parameters,
        "payload_bytes": origin.payload_bytes,
        "source_kind": origin.kind,
        "source_files": dict(origin.files),
        "tokenizer_sha256": None if origin.tokenizer is None else file_sha256(origin.tokenizer),
        "seen_text": list(origin.seen_text),
        "text": text,
    }


def runner_info(
    metadata: ProgramMetadata,
    *,
    path: str,
    weight_bytes: int,
    file_bytes: int,
    files: Mapping[str, str],
    max_batch: int | None = None,
) -> RunnerInfo:
    """What a Runner of a program says about it; the other arguments are fields of `RunnerInfo`."""
    return RunnerInfo(
        path=path,
        kind=metadata.target,
        vocab_size=metadata.config["vocab_size"],
        activations=metadata.activations,
        state_format=metadata.state_format,
        weights=metadata.weights,
        weight_bytes=weight_bytes,
        file_bytes=file_bytes,
        parameters=metadata.parameters,
        config=metadata.config,
        source_files=metadata.source_files,
        max_batch=max_batch,
        files=files,
        seen_text=tuple(metadata.seen_text),
        tokenizer_sha256=metadata.tokenizer_sha256,
        declares_text=metadata.text is not None,
    )


def activations_of(weights: Weights) -> str:
    """The activation format of the inputs of quantized linears, "fp32" where there are none, "mixed" for several."""
    sites = {spec.site for name, spec in weights.specs.items() if weights.format(name) is not None}
    formats = {weights.activation(site) for site in sites if site is not None}
    return "mixed" if len(formats) > 1 else next(iter(formats), "fp32")


M = TypeVar("M", bound=ProgramMetadata)


def parsed(model: type[M], text: str, path: Path) -> M:
    """Metadata from JSON. Raises `InputError`: it is not what this release writes."""
    try:
        return model.model_validate_json(json.dumps(parse_json(text)))
    except ValidationError as error:
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])) or "metadata", first["msg"].lower()
    except ValueError as error:
        where, what = "metadata", str(error)
    raise InputError(
        f"{path}: its metadata cannot be read ({where[:80]}: {what[:120]}); "
        "another release of mossquant wrote it: use that one, or export again"
    )
