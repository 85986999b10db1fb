# SPDX-License-Identifier: Apache-2.0
"""The state of one stream as a small file, so that a prompt is never read twice.

    a safetensors file
        layers.0.mixer.conv, …    the state as `Runner.read` gives it: fp32 [1, …]
        logits                    fp32 [1, 1, V], what the last token that was read makes of the next
        __metadata__.mossquant    JSON: version, release, model, tokenizer, tokens that were read, SHA-256 of arrays,
                                  recent tokens, where the text of the next ones depends on them

The logits are in it because the state does not know the next token, and reading the last one once more would be another
call with other roundings: with them, whatever follows is bit for bit what it would have been without the file.

A state belongs to a model (`RunnerInfo.model_sha256`), not to a runtime: one that the PyTorch model saved goes on in an
artifact lowered from the same checkpoint. Nothing else is in the file: the same input gives the same bytes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from mossquant.checkpoint.manifest import Sha256
from mossquant.checkpoint.tensorfiles import NeededTensor, TensorFile, save_tensors, tensor_offenders
from mossquant.errors import InputError
from mossquant.files.json import parse_json, parse_stored
from mossquant.files.outputs import check_free, check_outside, new_file
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.release import release
from mossquant.runner import Arrays, Floats, Runner, RunnerInfo, State
from mossquant.text.text import MOST_RECENT, Tokenizer

_KEY, _LOGITS = "mossquant", "logits"
_AGAIN = "Read the prompt again with --save-state."
_MOST_TOKENS = (1 << 63) - 1

Array = NDArray[np.float32]


@dataclass(frozen=True)
class SavedState:
    """Where a stream stands.

    Attributes:
        state: after `tokens` tokens.
        logits: [1, 1, V] of the last of them.
        tokens: how many were read since the initial state.
        recent: the last few of them that the text of the next ones depends on (`StreamDecoder.ids`).
    """

    state: State
    logits: Floats
    tokens: int
    recent: tuple[int, ...] = ()


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    kind: Literal["state"] = "state"
    release: str
    weights: str
    model_sha256: Sha256
    tokenizer_sha256: Sha256 | None
    tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)]
    arrays_sha256: Sha256
    recent: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=MOST_RECENT, exclude_if=lambda recent: not recent)
    ] = ()


def save_state(
    path: str | Path,
    runner: Runner,
    saved: SavedState,
    *,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
) -> None:
    """Write the state of one stream; it stays usable.

    Args:
        path: the file to write, which appears whole or not at all.
        runner: whose state it is.
        saved: the state, and what the call that returned it gave for the last position.
        tokenizer: what turned the text into tokens; None where tokens came from elsewhere.
        force: replace a state that is there.

    Raises:
        InputError: something is at `path`, and `force` is off or it is not a state; more than one stream; no token
            was read; a Runner in fp64, which fp32 would round; values that are not finite.
    """
    info = runner.info
    if saved.state.batch != 1:
        raise InputError(f"a state of {saved.state.batch} streams was given; save one stream a file")
    if not 1 <= saved.tokens <= _MOST_TOKENS:  # a file may claim as many as can be counted
        raise InputError(f"a state after {saved.tokens} tokens was given; save one after 1 to {_MOST_TOKENS}")
    if "fp64" in info.state_format:
        raise InputError(f"{info.path} computes in fp64, and states are saved in fp32; run it in fp32")
    arrays = {**runner.read(saved.state), _LOGITS: saved.logits[:, -1:].astype(np.float32)}
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        advice = "Its weights or its activation format do not hold this model."
        raise InputError.listing(f"{info.path} computed values that are not finite", broken, advice)
    metadata = _Metadata(
        release=release(),
        weights=info.weights,
        model_sha256=info.model_sha256,
        tokenizer_sha256=None if tokenizer is None else tokenizer.sha256,
        tokens=saved.tokens,
        arrays_sha256=_sha256(arrays),
        recent=saved.recent,
    )
    check_state_free(path, force=force)
    with new_file(Path(path), force=force) as partial:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_tensors(tensors, partial, metadata={_KEY: metadata.model_dump_json()})


def load_state(path: str | Path, runner: Runner, *, tokenizer: Tokenizer | None = None) -> SavedState:
    """Read a state that any Runner of the same model saved.

    Args:
        path: the file.
        runner: what goes on from it.
        tokenizer: what will turn text into tokens; None where tokens come from elsewhere.

    Raises:
        InputError: not a state, a damaged one, or one of another release, another model or another tokenizer.
    """
    try:
        opened, metadata = _open(Path(path))
        _check_model(path, metadata, runner, tokenizer)
        if max(metadata.recent, default=0) >= runner.info.vocab_size:
            what = f"{path} is a damaged state: its recent tokens are more than a vocabulary of"
            raise InputError(f"{what} {runner.info.vocab_size} has. {_AGAIN}")
        arrays = _arrays(path, opened, metadata, runner.info)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); give a readable file") from None
    logits = arrays.pop(_LOGITS)
    state = runner.write(arrays)
    state.position = metadata.tokens
    return SavedState(state, logits, metadata.tokens, metadata.recent)


def check_state_free(path: str | Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Say early that a state cannot be written to `path`; `force` replaces a state, and nothing else.

    Raises:
        InputError: as `check_free`, or what is there is not a state.
    """
    path = Path(path)
    check_free(path, force=force, as_file=True, inputs=inputs)
    check_outside(path)
    if path.is_file():
        try:
            _open(path)
        except (InputError, OSError):
            raise InputError(f"{path} is not a state, so it is not replaced; choose another path for it") from None


def _open(path: Path) -> tuple[TensorFile, _Metadata]:
    """The opened file, of which the header was read, and what it says about itself."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give one that `mossquant generate --save-state` wrote")
    try:
        str(path).encode()  # the library needs a name in UTF-8
        opened = TensorFile(path)
        values = parse_json(opened.metadata.get(_KEY, "null"))
    except UnicodeEncodeError:
        raise InputError(f"{path} is not a name in UTF-8; rename it, or choose another") from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a state: {str(error)[:100]}. {_AGAIN}") from None
    return opened, parse_stored(values, _Metadata, where=str(path), noun="a state", advice=_AGAIN)


def _check_model(path: str | Path, metadata: _Metadata, runner: Runner, tokenizer: Tokenizer | None) -> None:
    info = runner.info
    if metadata.model_sha256 != info.model_sha256:
        raise InputError(
            f"{path} is the state of another model: {metadata.weights[:40]}, SHA-256 {metadata.model_sha256[:12]}; "
            f"{info.path} is {info.weights}, {info.model_sha256[:12]}; "
            "give the model that saved it, or something lowered from that"
        )
    if tokenizer is not None and metadata.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f"{path} was read with another tokenizer ({_short(metadata.tokenizer_sha256)}) than that of {info.path} "
            f"({_short(tokenizer.sha256)}). {_AGAIN}"
        )


def _short(sha256: str | None) -> str:
    return "no tokenizer.json" if sha256 is None else f"SHA-256 {sha256[:12]}"


def _sha256(arrays: Arrays) -> str:
    """SHA-256 of the values of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _arrays(path: str | Path, opened: TensorFile, metadata: _Metadata, info: RunnerInfo) -> dict[str, Array]:
    """The tensors of an opened file, which must be those of the model; no value is read before all shapes fit."""
    specs = state_specs(MossNetConfig.from_json(info.config))
    shapes = {spec.name: (1, *spec.after(metadata.tokens)) for spec in specs} | {_LOGITS: (1, 1, info.vocab_size)}
    needed = {name: NeededTensor(shape, (torch.float32,)) for name, shape in shapes.items()}
    offenders = tensor_offenders(needed, opened.shapes, opened.dtypes)
    arrays: dict[str, Array] = {}
    if not offenders:
        arrays = {name: opened.tensor(name).numpy() for name in shapes}
        offenders = [f"{name} holds NaN or infinite values" for name in shapes if not np.isfinite(arrays[name]).all()]
        offenders += [] if _sha256(arrays) == metadata.arrays_sha256 else ["its values have another SHA-256"]
    if offenders:
        raise InputError.listing(f"{path} is a damaged state", offenders, _AGAIN)
    return arrays
