# SPDX-License-Identifier: Apache-2.0
"""What a .pte of ours says about itself: JSON that its method `mossquant` returns, read here without running it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.targets.executorch.packages import EXECUTORCH, load_runtime
from mossquant.targets.executorch.program_file import CONSTANTS, WEIGHTS, PlanMethod, ProgramFile
from mossquant.targets.metadata import Count, ProgramMetadata, parsed
from mossquant.targets.program import METHODS
from mossquant.targets.trial import EXTRA_BYTES, start, try_apart

__all__ = ["Metadata", "Opened", "open_program", "open_to_run", "read_metadata", "weight_bytes"]

_READ = "mossquant.targets.executorch.program_file:read"
_RUN = "mossquant.targets.executorch.first_run:run"
_READING_SECONDS, _READING_BYTES = 20.0, 1 << 28
"""Reading 24 blocks takes two seconds and some ten megabytes."""


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        target: always "executorch".
        runtime_minimum: oldest ExecuTorch that it was run with.
        activations: format of the inputs of quantized linears: "fp32" where nothing is quantized, or "int8_row_asym".
        max_chunk: most tokens of one call of prefill or score.
    """

    target: Literal["executorch"] = "executorch"
    runtime_minimum: str = EXECUTORCH
    activations: Literal["fp32", "int8_row_asym"]
    max_chunk: Count


def read_metadata(file: ProgramFile) -> Metadata:
    """What a .pte says about itself. Raises `InputError`: not written by this project, or by another release."""
    return parsed(Metadata, json.dumps(file.metadata), file.path)


@dataclass(frozen=True)
class Opened:
    """A program that was read and checked against itself; nothing of it was run.

    Attributes:
        file: what it holds.
        metadata: what it says about itself.
        config: the model's shape.
        sha256: of the file.
    """

    file: ProgramFile
    metadata: Metadata
    config: MossNetConfig
    sha256: str

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """Name of each state array, in the order of the methods, and its shape without the batch axis."""
        return {spec.name: spec.shape for spec in state_specs(self.config)}


def open_program(path: Path) -> Opened:
    """Read a .pte of ours, in the child process first: nothing but its limits bounds what bytes may say.

    Raises:
        InputError: no .pte of ours, or damaged; methods, inputs, outputs or a table that are not those of its config.
    """
    sha256, extra = file_sha256(path), _READING_BYTES + path.stat().st_size
    try_apart(path, sha256, _READ, seconds=_READING_SECONDS, extra_bytes=extra)
    file = ProgramFile(path)
    metadata = read_metadata(file)
    config = MossNetConfig.from_json(metadata.config, where=f"the metadata of {path}")
    opened = Opened(file, metadata, config, sha256)
    _check_ports(opened)
    return opened


def open_to_run(path: Path) -> Opened:
    """Read a .pte of ours and run it once in the child process; then it can be loaded here.

    Raises:
        InputError: as `open_program`; it cannot be loaded or run, or brought the child process down.
    """
    start(_RUN, file_sha256(path))
    load_runtime()  # while the child process does so too
    opened, extra = open_program(path), EXTRA_BYTES + 4 * path.stat().st_size
    try_apart(path, opened.sha256, _RUN, arguments={"methods": METHODS}, extra_bytes=extra)
    return opened


def _check_ports(opened: Opened) -> None:
    """Inputs and outputs of every method must be those of a model of the config in the metadata."""
    methods, chunk = opened.file.methods, opened.metadata.max_chunk
    arrays = [("<f4", (1, *shape)) for shape in opened.states.values()]
    offenders = [f"{name} is missing" for name in METHODS if name not in methods]
    for name, method in methods.items():
        length = 1 if name == "decode" else chunk
        inputs = [("<i8", (1, length)), *arrays]
        outputs = [("<f4", (1, length if name == "score" else 1, opened.config.vocab_size)), *arrays]
        if name not in METHODS:
            offenders.append(f"{name[:80]} is unexpected")
        elif list(method.inputs) != inputs or list(method.outputs) != outputs:
            offenders.append(f"{name} takes or gives other arrays than the model's")
        elif not _has_table(method, opened.config):
            offenders.append(f"{name} has no table of {opened.config.vocab_size} rows")
    if offenders:
        raise InputError.listing(
            f"the methods of {opened.file.path} do not fit its metadata", offenders, "Export it again."
        )


def _has_table(method: PlanMethod, config: MossNetConfig) -> bool:
    """Whether there are rows for every token: codes and scales, or values. The runtime looks beyond the last one."""
    rows = [one for one in method.constants if one.ndim == 2 and one.shape[0] == config.vocab_size]
    codes, values = ([one for one in rows if (one.dtype.kind in "iu") == kind] for kind in (True, False))
    return len(codes) == 1 and len(values) > 0 if codes else any(one.shape[1] == config.hidden_size for one in values)


def weight_bytes(opened: Opened) -> int:
    """Bytes of codes, padding, scales and values in the program; a tied table, which is there twice, once."""
    sections, decode = opened.file.sections, opened.file.methods["decode"]
    total = sections[WEIGHTS] + sections[CONSTANTS]
    if not opened.config.tie_word_embeddings:
        return total
    linears = [linear for part in decode.delegates for linear in part.linears]
    rows_of = opened.config.vocab_size
    rows = [one for one in decode.constants if one.ndim == 2 and one.shape[0] == rows_of]
    # The look-up's copy of scales or values is the head's too.
    heads = (linear for linear in linears if linear.shape[0] == rows_of)
    of_head = {_digest(linear.scales if linear.bits else linear.codes) for linear in heads}
    # No other tensor than the table is held in codes outside the delegates. What lies in one place is looked at once.
    places = {one.__array_interface__["data"][0]: one for one in rows}
    shared = {place for place, one in places.items() if one.dtype.kind in "iu" or _digest(one) in of_head}
    return total - sum(one.nbytes for place, one in places.items() if place in shared)


def _digest(array: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()
