# SPDX-License-Identifier: Apache-2.0
"""Runs a .pte of ours on the ExecuTorch runtime (CPU); nothing but its path is needed.

The state goes in and comes out as tensors; one stream at a time. Letters as in `mossquant.model`.
"""

from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.locate import Located, locate
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
from mossquant.targets.executorch.method import Carried, Method, zeros
from mossquant.targets.executorch.open import open_to_run, weight_bytes
from mossquant.targets.executorch.packages import check_packages, load_program, set_threads
from mossquant.targets.metadata import runner_info
from mossquant.targets.native.blocks.states import from_held, to_held


class ExecutorchRunner:
    """A `mossquant.runner.Runner` of a .pte file or the artifact folder that holds it."""

    def __init__(self, path: str | Path, *, given: str | None = None, threads: int | None = None) -> None:
        """Open a .pte. It is read and run in a child process first (`mossquant.targets.trial`), then loaded.

        Args:
            path: the file, or the artifact's folder.
            given: how the user named it, the path if not given.
            threads: threads of ExecuTorch, for the whole process and all its .pte programs; None leaves them.

        Raises:
            InputError: no .pte of ours; one that is damaged or cut short, or contradicts its metadata or the manifest
                beside it; a tokenizer that does not belong to it; packages that are missing.
        """
        self._path = locate(path).require("executorch", verb="the ExecuTorch Runner")
        check_packages()
        opened = open_to_run(self._path)
        metadata = opened.metadata
        self._specs, self._vocab_size = state_specs(opened.config), opened.config.vocab_size
        self._shapes = [opened.state_shape(spec) for spec in self._specs]
        self.config, self.own_kernels = opened.config, opened.own_kernels
        self._chunk = metadata.max_chunk
        self._info = runner_info(
            metadata,
            path=given or str(path),
            weight_bytes=weight_bytes(opened),
            file_bytes=self._path.stat().st_size,
            files=opened.hashes,
            max_batch=get_capabilities("executorch").limits.max_batch,
        )
        if threads is not None and set_threads(threads):
            for runner in _OPEN:
                runner._load()
        self._load()
        _OPEN.add(self)

    def _load(self) -> None:
        self._program = load_program(self._path)
        self._methods: dict[str, Method] = {}

    @property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        return self._info

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        _one_stream(checked_batch(batch))
        return State(zeros(self._shapes), 1)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [1, T]; see `mossquant.runner.Runner`."""
        checked_tokens(tokens, state, self._vocab_size)
        ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
        carried: Carried = state.take()
        every = logits == "all"
        found = np.empty((1, ids.shape[1] if every else 1, self._vocab_size), np.float32)
        for start in range(0, ids.shape[1], self._chunk):
            piece = ids[:, start : start + self._chunk].contiguous()
            method = "decode" if piece.shape[1] == 1 else "score" if every else "prefill"
            part, carried = self._execute(method, piece, carried)
            found[:, slice(start, start + piece.shape[1]) if every else slice(None)] = part
        return found, State(carried, 1)

    def copy(self, state: State) -> State:
        """An independent copy."""
        carried: Carried = state.peek()
        return State(carried.copy(), 1)

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [1, …]."""
        carried: Carried = state.peek()
        arrays = zip(self._specs, carried.arrays, strict=True)
        if not self.own_kernels:
            return {spec.name: array.numpy().copy() for spec, array in arrays}
        return {spec.name: from_held(spec, array[0].numpy())[None] for spec, array in arrays}

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`."""
        _one_stream(checked_arrays(arrays, self._specs))
        carried = zeros(self._shapes)
        for spec, state in zip(self._specs, carried.arrays, strict=True):
            array = np.array(arrays[spec.name], np.float32)
            state.copy_(torch.from_numpy(to_held(spec, array[0])[None] if self.own_kernels else array))
        return State(carried, 1)

    def _execute(self, name: str, tokens: Tensor, carried: Carried) -> tuple[Floats, Carried]:
        if name not in self._methods:
            self._methods[name] = Method(self._program, name, in_place=self.own_kernels)
        return self._methods[name](tokens, carried)


def open_runner(located: Located, *, threads: int | None) -> ExecutorchRunner:
    """The Runner of what a PATH argument points at."""
    return ExecutorchRunner(located.path, given=located.given, threads=threads)


_OPEN: "WeakSet[ExecutorchRunner]" = WeakSet()
"""Runners whose methods are loaded again where the number of threads changes."""


def _one_stream(batch: int) -> None:
    if batch != 1:
        raise InputError(f"a .pte runs one stream, and {batch} were asked for; run them one after the other")
