# SPDX-License-Identifier: Apache-2.0
"""Runs a .pte of ours on the ExecuTorch runtime (XNNPACK, CPU); nothing but its path is needed.

The state goes in and comes out as tensors; one stream at a time. Letters as in `mossquant.model`.
"""

from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.locate import locate
from mossquant.errors import InputError
from mossquant.model.mossnet import state_specs
from mossquant.plan.capabilities import get_capabilities
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
from mossquant.targets.artifact import check_listed, check_tokenizer
from mossquant.targets.executorch.metadata import Metadata, open_to_run, weight_bytes
from mossquant.targets.executorch.packages import check_packages, load_method, load_program, set_threads

__all__ = ["ExecutorchRunner"]


class ExecutorchRunner:
    """A `mossquant.runner.Runner` of a .pte file or the artifact folder that holds it."""

    def __init__(self, path: str | Path, *, given: str | None = None, threads: int | None = None) -> None:
        """Open a .pte. It is read and run in a child process first (`mossquant.targets.trial`), then loaded.

        Args:
            path: the file, or the artifact's folder.
            given: how the user named it, the path if not given.
            threads: threads of XNNPACK, for the whole process and all its .pte programs; None leaves them.

        Raises:
            InputError: no .pte of ours; one that is damaged or cut short, or contradicts its metadata or the manifest
                beside it; a tokenizer that does not belong to it; packages that are missing.
        """
        self._given = given or str(path)
        self._path = locate(path).require("executorch", verb="the ExecuTorch Runner")
        check_packages()
        opened = open_to_run(self._path)
        self._metadata, self._weight_bytes = opened.metadata, weight_bytes(opened)
        self._specs, self._vocab_size = state_specs(opened.config), opened.config.vocab_size
        self._chunk = self._metadata.max_chunk
        self._sha256 = opened.sha256
        check_listed(self._path, {self._path.name: self._sha256}, model=self._metadata.model_dump())
        check_tokenizer(self._path, self._metadata.tokenizer_sha256)
        if threads is not None and set_threads(threads):
            for other in _OPEN:
                other._load()
        self._load()
        _OPEN.add(self)

    def _load(self) -> None:
        self._program = load_program(self._path)
        self._methods: dict[str, Any] = {}

    @cached_property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        metadata, size = self._metadata, self._path.stat().st_size
        return RunnerInfo(
            path=self._given,
            kind="executorch",
            vocab_size=self._vocab_size,
            activations=metadata.activations,
            state_format=metadata.state_format,
            weights=metadata.weights,
            weight_bytes=self._weight_bytes,
            file_bytes=size,
            parameters=metadata.parameters,
            config=metadata.config,
            source_files=metadata.source_files,
            max_batch=get_capabilities("executorch").limits.max_batch,
            files={self._path.name: self._sha256},
            seen_text=tuple(metadata.seen_text),
            tokenizer_sha256=metadata.tokenizer_sha256,
        )

    @property
    def metadata(self) -> Metadata:
        """What the file says about itself."""
        return self._metadata

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        _one_stream(checked_batch(batch))
        return State([spec.zeros(1) for spec in self._specs], 1)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [1, T]; see `mossquant.runner.Runner`."""
        checked_tokens(tokens, state, self._vocab_size)
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
        states: list[Tensor] = state.take()
        if ids.shape[1] == 1:
            last, states = self._execute("decode", ids, states)
            return last, State(states, 1)
        parts: list[Floats] = []
        for start in range(0, ids.shape[1], self._chunk):
            piece = ids[:, start : start + self._chunk].contiguous()
            method = "decode" if piece.shape[1] == 1 else "score" if logits == "all" else "prefill"
            found, states = self._execute(method, piece, states)
            parts = [*parts, found] if logits == "all" else [found]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, 1)), State(states, 1)

    def copy(self, state: State) -> State:
        """An independent copy; a call never changes a state array in place, so that sharing them is enough."""
        return State(list(state.peek()), 1)

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [1, …]."""
        payload: list[Tensor] = state.peek()
        return {spec.name: value.numpy().copy() for spec, value in zip(self._specs, payload, strict=True)}

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`."""
        _one_stream(checked_arrays(arrays, self._specs))
        # Copied into tensors of PyTorch's own: the runtime ends the process over the strides of an empty array.
        states = [spec.zeros(1) for spec in self._specs]
        for spec, state in zip(self._specs, states, strict=True):
            state.copy_(torch.tensor(arrays[spec.name]))
        return State(states, 1)

    def _execute(self, name: str, tokens: Tensor, states: list[Tensor]) -> tuple[Floats, list[Tensor]]:
        if name not in self._methods:
            self._methods[name] = load_method(self._program, name)
        logits, *after = self._methods[name]([tokens, *states])
        return logits.numpy(), after


_OPEN: "WeakSet[ExecutorchRunner]" = WeakSet()
"""Runners whose methods are loaded again where the number of threads changes."""


def _one_stream(batch: int) -> None:
    if batch != 1:
        raise InputError(f"a .pte runs one stream, and {batch} were asked for; run them one after the other")
