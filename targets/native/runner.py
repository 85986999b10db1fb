# SPDX-License-Identifier: Apache-2.0
"""Runs a .moss of ours on libmoss; nothing but its path is needed. Letters as in `mossquant.model`.

Called through ctypes (`mossquant.targets.native.library`), so that what is tested and measured is what an app links.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
from mossquant.targets.native.library import ALL, LAST, Model, ModelState, MossError
from mossquant.targets.native.open import open_to_run

_AGAIN = "copy the artifact's folder again, or export again"


class NativeRunner:
    """A `mossquant.runner.Runner` of a .moss file or the artifact folder that holds it."""

    def __init__(
        self, path: str | Path, *, given: str | None = None, threads: int | None = None, isa: str | None = None
    ) -> None:
        """Open a .moss.

        Args:
            path: the file, or the artifact's folder.
            given: how the user named it, the path if not given.
            threads: the calling one included; None: as many as there are cores.
            isa: the most that kernels may use ("baseline", "avx2", …), for tests; None: whatever the machine can.

        Raises:
            InputError: no .moss of ours; one that is damaged or cut short, or contradicts its metadata or the manifest
                beside it; a tokenizer that does not belong to it; libmoss is missing or refuses the file.
        """
        program = locate(path).require("native", verb="the native Runner")
        opened = open_to_run(program)
        self._path = program
        self._specs, self._vocab_size = state_specs(opened.config), opened.config.vocab_size
        try:
            self._model = Model(program, threads=threads or 0, isa=isa)
        except MossError as error:
            raise InputError(f"{error}; {_AGAIN}") from None
        self._info = runner_info(
            opened.metadata,
            path=given or str(path),
            weight_bytes=opened.metadata.weight_bytes,
            file_bytes=opened.bytes,
            files=opened.hashes,
        )

    @property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        return self._info

    @property
    def path(self) -> Path:
        """The program."""
        return self._path

    @property
    def model(self) -> Model:
        """What libmoss says of the model: its kernel, whether weights were repacked, memory."""
        return self._model

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        return State(self._empty(checked_batch(batch)), batch)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [B, T]; see `mossquant.runner.Runner`."""
        checked_tokens(tokens, state, self._vocab_size)
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        batch, time = ids.shape
        carried: ModelState = state.take()
        wanted = np.empty((batch, time if logits == "all" else 1, self._vocab_size), np.float32)
        carried.set_position(state.position)
        try:
            carried.forward(ids, ALL if logits == "all" else LAST, wanted)
        except MossError as error:
            raise InputError(f"{self._info.path} cannot be run: {error}") from None
        return wanted, State(carried, batch, position=state.position + time)

    def copy(self, state: State) -> State:
        """An independent copy; `state` stays usable."""
        carried: ModelState = state.peek()
        return State(carried.copy(), state.batch, position=state.position)

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [B, …]."""
        carried: ModelState = state.peek()
        arrays = {spec.name: np.empty((state.batch, *spec.shape), np.float32) for spec in self._specs}
        for index, array in enumerate(arrays.values()):
            carried.read(index, array)
        return arrays

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`."""
        batch = checked_arrays(arrays, self._specs)
        carried = self._empty(batch)
        for index, spec in enumerate(self._specs):
            carried.write(index, np.ascontiguousarray(arrays[spec.name], np.float32))
        return State(carried, batch)

    def _empty(self, batch: int) -> ModelState:
        try:
            return self._model.state(batch)
        except MossError as error:
            raise InputError(f"{self._info.path} has no state of {batch} streams: {error}") from None


def open_runner(located: Located, *, threads: int | None) -> NativeRunner:
    """The Runner of what a PATH argument points at."""
    return NativeRunner(located.path, given=located.given, threads=threads)
