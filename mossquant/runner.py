# SPDX-License-Identifier: Apache-2.0
"""The one interface of everything that can be run: the PyTorch model, an .onnx, a .pte, a .moss, later an NPU program.

    state = runner.initial_state(batch)
    logits, state = runner(tokens, state, logits="last")

Perplexity, divergence, generation, parity and bench are written once against it, so that they always measure what
ships. Tokens are int64 arrays [B, T], logits are float arrays [B, T, V] ("all") or [B, 1, V] ("last"). The functions
here check what a Runner is given before a state is consumed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mossquant.errors import InputError
from mossquant.model.tensors import StateSpec

Tokens = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Arrays = Mapping[str, NDArray[np.float32]]
LogitsWanted = Literal["last", "all"]


@dataclass(frozen=True)
class RunnerInfo:
    """What a Runner is and what it can take.

    Attributes:
        path: what was opened, as the user gave it.
        kind: "checkpoint", "quantized checkpoint", or the target of a program.
        vocab_size: V; tokens must lie in 0..V-1.
        activations: activation format of the linear inputs: "fp32", "int8_block", "int8_row_asym", or "planned".
        state_format: format in which the state is carried; where arrays have several, all of them.
        weights: recipe name, or the stored dtype of a checkpoint ("bfloat16").
        max_batch: largest batch, None for any.
        max_chunk: most tokens in one call, None for any.
        files: file name → SHA-256 of what was loaded.
        weight_bytes: bytes stored for the weights (payload: codes, scales, padding, unquantized tensors).
        file_bytes: bytes on disk of the program or weights, without the tokenizer.
        parameters: number of parameters of the full-precision model.
        config: the model's config as JSON.
        source_files: file name → SHA-256 of the checkpoint that this is, or was lowered from.
        seen_text: SHA-256 of texts that the model was trained or calibrated on.
        tokenizer_sha256: of the `tokenizer.json` that a program was exported with; None where there was none, and for a
            checkpoint, whose own is beside it.
        declares_text: whether a program was exported with a `text.json`; False for a checkpoint too.
    """

    path: str
    kind: str
    vocab_size: int
    activations: str
    state_format: str
    weights: str
    weight_bytes: int
    file_bytes: int
    parameters: int
    config: Mapping[str, Any]
    source_files: Mapping[str, str]
    max_batch: int | None = None
    max_chunk: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    seen_text: tuple[str, ...] = ()
    tokenizer_sha256: str | None = None
    declares_text: bool = False

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes stored for the weights ÷ parameters of the full-precision model."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def model_sha256(self) -> str:
        """Which model this is, the same on every Runner of it: `sha256sum config.json model* | sha256sum`.

        The config and the stored weights make the model: a checkpoint and everything lowered from it are one model, and
        so are two tokenizers' copies of it; another quantization of the same original is another.
        """
        names = sorted(name for name in self.source_files if name == "config.json" or name.startswith("model"))
        return hashlib.sha256("".join(f"{self.source_files[name]}  {name}\n" for name in names).encode()).hexdigest()


class State:
    """Opaque recurrent state of one Runner; a call consumes it, so that the runtime may update it in place.

    Attributes:
        batch: streams.
        position: tokens that were read since it began, as far as is known: a state format that draws its roundings
            needs to know the token. `Runner.write` begins at 0.
    """

    def __init__(self, payload: Any, batch: int, *, position: int = 0) -> None:
        self._payload: Any = payload
        self.batch = batch
        self.position = position

    def take(self) -> Any:
        """The payload, once. Raises `UsedStateError` on a second use."""
        payload = self.peek()
        self._payload = None
        return payload

    def peek(self) -> Any:
        """The payload, without consuming it. Raises `UsedStateError` if it was consumed."""
        if self._payload is None:
            raise UsedStateError(
                "this state was consumed by an earlier call; keep the one that the call returned, or runner.copy(state)"
            )
        return self._payload


class UsedStateError(RuntimeError):
    """A state was given to a second call."""


class Runner(Protocol):
    """Runs a language model with explicit recurrent state."""

    @property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        ...

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token."""
        ...

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [B, T], T ≥ 1; consumes `state`.

        Returns:
            Logits [B, 1, V] of the last position ("last": the head is paid once) or [B, T, V] ("all"), and the state.

        Raises:
            InputError: tokens outside the vocabulary, no tokens, a batch other than the state's.
            UsedStateError: `state` was consumed before.
        """
        ...

    def copy(self, state: State) -> State:
        """An independent copy; `state` stays usable."""
        ...

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [B, …], the same names and shapes on every Runner of a model."""
        ...

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`. Raises InputError on missing, unexpected or misshapen arrays."""
        ...


def checked_batch(batch: int) -> int:
    """The batch that a state is asked for.

    Raises:
        InputError: less than one stream.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch} streams was asked for; ask for one or more")
    return batch


def checked_tokens(tokens: Tokens, state: State, vocab_size: int) -> None:
    """Check what a Runner is given, before its state is consumed.

    Raises:
        InputError: not an integer array [B, T] with T ≥ 1, a batch other than the state's, or tokens outside 0..V−1.
    """
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise InputError(f"tokens have shape {list(tokens.shape)} and type {tokens.dtype}; give integers [batch, time]")
    if tokens.shape[0] != state.batch:
        raise InputError(f"tokens have batch {tokens.shape[0]} and the state has {state.batch}; give both the same one")
    if tokens.shape[1] == 0:
        raise InputError("no tokens were given; give one or more")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token {wrong} is outside the vocabulary of {vocab_size}; use the model's own tokenizer")


def checked_arrays(arrays: Arrays, specs: Iterable[StateSpec]) -> int:
    """Check state arrays [B, …] against what a model carries; returns B.

    Raises:
        InputError: missing, unexpected or misshapen arrays, or batches that differ; all offenders at once.
    """
    known = {spec.name: spec for spec in specs}
    batches: set[int] = {value.shape[0] for value in arrays.values() if value.ndim > 0}
    offenders = [f"{name} is missing" for name in known if name not in arrays]
    offenders += [f"{name[:80]} is unexpected" for name in arrays if name not in known]
    for name, spec in known.items():
        if name in arrays and (arrays[name].ndim == 0 or not spec.fits(arrays[name].shape[1:])):
            needed = ["batch", *spec.symbolic("tokens")]
            offenders.append(f"{name} has shape {list(arrays[name].shape)}, needs {needed}")
    if not offenders and len(batches) > 1:
        offenders.append(f"batches of {', '.join(map(str, sorted(batches)))} are mixed")
    if not offenders and 0 in batches:
        offenders.append("a batch of 0")
    if offenders:
        advice = "Give a state that this model's read() gave."
        raise InputError.listing("the state does not fit the model", offenders, advice)
    return batches.pop()
