# SPDX-License-Identifier: Apache-2.0
"""Runs an .onnx of ours on stock onnxruntime (CPU); nothing but its path is needed. Letters as in `mossquant.model`.

The state lives in two sets of arrays that are bound to the session: a call reads one and writes the other, so that in a
decode loop only tokens and logits cross into Python.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from mossquant.checkpoint.locate import Located, locate
from mossquant.errors import InputError
from mossquant.model.mossnet import state_specs
from mossquant.runner import (
    Arrays,
    Floats,
    LogitsWanted,
    RunnerInfo,
    State,
    Tokens,
    checked_arrays,
    checked_batch,
    checked_tokens,
)
from mossquant.targets.metadata import runner_info
from mossquant.targets.onnx.open import open_to_run
from mossquant.targets.onnx.ports import FIRST_LOGIT, LOGITS, STATE_OUT, TOKENS
from mossquant.targets.onnx.session import open_session

ROWS_AT_ONCE = 512
"""Rows (B · T) in one run of the graph: bounds the memory of a long prefill, and costs no speed."""

_AGAIN = "copy the artifact's folder again, or export again"
# onnxruntime reads these where they lie: they must outlive every run.
_ALL, _LAST = np.array([0], np.int64), np.array([-1], np.int64)
# The last one where the error's own text quotes a damaged name.
_ERRORS = (
    *(errors.InvalidProtobuf, errors.InvalidGraph, errors.Fail, errors.InvalidArgument, errors.NotImplemented),
    *(errors.RuntimeException, UnicodeDecodeError),
)


class OnnxRunner:
    """A `mossquant.runner.Runner` of an .onnx file or the artifact folder that holds it."""

    def __init__(self, path: str | Path, *, given: str | None = None, threads: int | None = None) -> None:
        """Open an .onnx.

        Args:
            path: the file, or the artifact's folder.
            given: how the user named it, the path if not given.
            threads: threads inside an operator; None: as many as there are cores.

        Raises:
            InputError: no .onnx of ours; one that is damaged or cut short, or contradicts its metadata or the manifest
                beside it; external weights or a tokenizer that do not belong to it; an onnxruntime that is too old.
        """
        program = locate(path).require("onnx", verb="the ONNX Runner")
        opened = open_to_run(program)
        metadata, self._specs = opened.metadata, state_specs(opened.config)
        self._session = _session(program, threads)
        self._vocab_size = opened.config.vocab_size
        self._info = runner_info(
            metadata,
            path=given or str(path),
            weight_bytes=metadata.weight_bytes,
            file_bytes=opened.bytes,
            files=opened.hashes,
        )

    @property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        return self._info

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        checked_batch(batch)
        arrays = {spec.name: np.zeros((batch, *spec.shape), np.float32) for spec in self._specs}
        return State(self._carried(arrays), batch)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [B, T]; see `mossquant.runner.Runner`."""
        checked_tokens(tokens, state, self._vocab_size)
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        carried: _Carried = state.take()
        batch, time = ids.shape
        if time == 1:
            return carried.step(ids, self._vocab_size), State(carried, batch)
        length, every = max(1, ROWS_AT_ONCE // batch), logits == "all"
        wanted: Floats = np.empty((batch, time if every else 1, self._vocab_size), np.float32)
        for start in range(0, time, length):
            piece = ids[:, start : start + length]
            rows = wanted[:, start : start + length] if every else wanted
            # The graph writes to memory without gaps.
            target = rows if rows.flags.c_contiguous else np.empty_like(rows, order="C")
            carried.piece(piece, target)
            if target is not rows:
                rows[:] = target
        return wanted, State(carried, batch)

    def copy(self, state: State) -> State:
        """An independent copy; `state` stays usable."""
        carried: _Carried = state.peek()
        return State(self._carried(carried.read()), state.batch)

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [B, …]."""
        carried: _Carried = state.peek()
        return carried.read()

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`."""
        batch = checked_arrays(arrays, self._specs)
        own = {spec.name: np.array(arrays[spec.name], np.float32, order="C") for spec in self._specs}
        return State(self._carried(own), batch)

    def _carried(self, arrays: dict[str, NDArray[np.float32]]) -> "_Carried":
        return _Carried(
            self._session, arrays, {spec.name: spec.grows + 1 for spec in self._specs if spec.grows is not None}
        )


def open_runner(located: Located, *, threads: int | None) -> OnnxRunner:
    """The Runner of what a PATH argument points at."""
    return OnnxRunner(located.path, given=located.given, threads=threads)


class _Carried:
    """The state of some streams, bound to the session; it owns the arrays that it is given.

    Args:
        session: what runs.
        arrays: the state by name, [B, …].
        growing: name → axis, of those that get longer with every token.
    """

    def __init__(
        self, session: ort.InferenceSession, arrays: dict[str, NDArray[np.float32]], growing: Mapping[str, int]
    ) -> None:
        self._session, self._growing = session, growing
        self._sets = (arrays, {name: np.empty_like(array) for name, array in arrays.items()})
        self._turn = 0
        self._bindings: dict[tuple[int, bool], ort.IOBinding] = {}
        self._token: NDArray[np.int64] | None = None
        self._logits: NDArray[np.float32] | None = None

    def read(self) -> dict[str, NDArray[np.float32]]:
        """A copy of the arrays."""
        return {name: array.copy() for name, array in self._sets[self._turn].items()}

    def step(self, tokens: Tokens, vocab_size: int) -> Floats:
        """Advance by one token [B, 1] → logits [B, 1, V]."""
        self._make_room(1)
        if self._token is None or self._logits is None:
            self._token = np.empty_like(tokens)
            self._logits = np.empty((len(tokens), 1, vocab_size), np.float32)
        self._token[:] = tokens
        if (self._turn, True) not in self._bindings:
            self._bind(self._binding(step=True), self._token, self._logits)
        self._run(self._binding(step=True))
        return self._logits.copy()

    def piece(self, tokens: Tokens, logits: Floats) -> None:
        """Advance by tokens [B, T]; fills logits [B, T, V], or [B, 1, V] with those of the last position."""
        self._make_room(tokens.shape[1])
        binding, own = self._binding(step=False), np.ascontiguousarray(tokens)
        self._bind(binding, own, logits)
        self._run(binding)

    def _make_room(self, tokens: int) -> None:
        """Arrays that grow are written to new ones, and so nothing that was bound before is of use."""
        for name, axis in self._growing.items():
            shape = list(self._sets[self._turn][name].shape)
            shape[axis] += tokens
            self._sets[1 - self._turn][name] = np.empty(shape, np.float32)
            self._bindings.clear()

    def _binding(self, *, step: bool) -> ort.IOBinding:
        """Reads the current set and writes the other; for steps, tokens and logits are bound once and for all."""
        key = (self._turn, step)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for name, array in self._sets[self._turn].items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for name, array in self._sets[1 - self._turn].items():
                binding.bind_ortvalue_output(name + STATE_OUT, ort.OrtValue.ortvalue_from_numpy(array))
            self._bindings[key] = binding
        return self._bindings[key]

    def _bind(self, binding: ort.IOBinding, tokens: Tokens, logits: Floats) -> None:
        first = _ALL if logits.shape[1] == tokens.shape[1] else _LAST
        binding.bind_ortvalue_input(TOKENS, ort.OrtValue.ortvalue_from_numpy(tokens))
        binding.bind_ortvalue_input(FIRST_LOGIT, ort.OrtValue.ortvalue_from_numpy(first))
        binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))

    def _run(self, binding: ort.IOBinding) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except _ERRORS as error:  # a graph that was changed may run on some lengths alone
            raise InputError(f"the program cannot be run ({_reason(error)}); {_AGAIN}") from None
        self._turn = 1 - self._turn


def _session(path: Path, threads: int | None) -> ort.InferenceSession:
    try:
        return open_session(path, threads)
    except _ERRORS as error:
        raise InputError(f"{path} cannot be loaded ({_reason(error)}); {_AGAIN}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
