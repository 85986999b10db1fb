# SPDX-License-Identifier: Apache-2.0
"""Opens a .pte of ours: what it holds and says about itself, the files beside it; then it is tried."""

import json
from dataclasses import dataclass
from pathlib import Path

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import StateSpec
from mossquant.targets.artifact import check_beside
from mossquant.targets.executorch.kernels.chain import constants, differences
from mossquant.targets.executorch.kernels.library import load_operators
from mossquant.targets.executorch.metadata import Metadata
from mossquant.targets.executorch.packages import load_runtime
from mossquant.targets.executorch.program_file import CONSTANTS, WEIGHTS, PlanMethod, ProgramFile
from mossquant.targets.metadata import parsed
from mossquant.targets.native.blocks.states import held_shape
from mossquant.targets.native.export import host_layout
from mossquant.targets.program import METHODS
from mossquant.targets.trial import EXTRA_BYTES, start, try_apart

_READ = "mossquant.targets.executorch.program_file:read"
_RUN = "mossquant.targets.executorch.first_run:run"
_READING_SECONDS, _READING_BYTES = 20.0, 1 << 28
"""Reading 24 blocks takes two seconds and some ten megabytes."""


@dataclass(frozen=True)
class Opened:
    """A program that was read and checked against itself; nothing of it was run.

    Attributes:
        file: what it holds.
        metadata: what it says about itself.
        config: the model's shape.
        hashes: file name → SHA-256 of the program.
    """

    file: ProgramFile
    metadata: Metadata
    config: MossNetConfig
    hashes: dict[str, str]

    @property
    def own_kernels(self) -> bool:
        """Whether its blocks are operators of ours."""
        return self.metadata.layout is not None

    def state_shape(self, spec: StateSpec) -> tuple[int, ...]:
        """The shape in which methods take and give a state array, without the batch axis."""
        return held_shape(spec) if self.own_kernels else spec.shape


def read_metadata(file: ProgramFile) -> Metadata:
    """What a .pte says about itself. Raises `InputError`: not written by this project, or by another release."""
    return parsed(Metadata, json.dumps(file.metadata), file.path)


def open_program(path: Path, *, sha256: str | None = None) -> Opened:
    """Read a .pte of ours, in the child process first, whose limits bound what it may take; and what lies beside it.

    Args:
        path: the file.
        sha256: its hash, if it was taken before.

    Raises:
        InputError: no .pte of ours, or damaged; methods, inputs, outputs or a table that are not those of its config;
            it contradicts the manifest, or another tokenizer lies there.
    """
    sha256 = sha256 or file_sha256(path)
    extra = _READING_BYTES + path.stat().st_size
    try_apart(path, sha256, _READ, seconds=_READING_SECONDS, extra_bytes=extra)
    file = ProgramFile(path)
    metadata = read_metadata(file)
    config = MossNetConfig.from_json(metadata.config, where=f"the metadata of {path}")
    opened = Opened(file, metadata, config, {path.name: sha256})
    _check_ports(opened)
    check_beside(path, opened.hashes, metadata)
    return opened


def open_to_run(path: Path) -> Opened:
    """Read a .pte of ours and run it once in the child process; then it can be loaded here.

    Raises:
        InputError: as `open_program`; it cannot be loaded or run, or brought the child process down.
    """
    sha256, extra = file_sha256(path), EXTRA_BYTES + 4 * path.stat().st_size
    start(_RUN, sha256)
    load_runtime()  # while the child process does so too
    opened = open_program(path, sha256=sha256)
    if opened.own_kernels:
        _check_layout(opened)
        load_operators()
    arguments = {"methods": METHODS, "own_kernels": opened.own_kernels}
    try_apart(path, sha256, _RUN, arguments=arguments, extra_bytes=extra)
    return opened


def _check_layout(opened: Opened) -> None:
    """Weights must be packed as this machine's kernels want them: a .pte has no second place to pack them to.

    Values in fp32 are not packed; a program of nothing else runs on every machine.
    """
    own, layout = host_layout(), opened.metadata.layout
    if layout != own and any(one.storage != "float32" for one in constants(opened.file, "decode", opened.config)):
        raise InputError(
            f"{opened.file.path} is packed for {layout}, and the kernels of this machine want {own}; "
            f"export it again with --isa {own}"
        )


def _check_ports(opened: Opened) -> None:
    """Inputs and outputs of every method must be those of a model of the config in the metadata."""
    methods, chunk, vocabulary = opened.file.methods, opened.metadata.max_chunk, opened.config.vocab_size
    states = [("<f4", (1, *opened.state_shape(spec))) for spec in state_specs(opened.config)]
    offenders = [f"{name} is missing" for name in METHODS if name not in methods]
    for name, method in methods.items():
        length = 1 if name == "decode" else chunk
        inputs = [("<i8", (1, length)), *states]
        outputs = [("<f4", (1, length if name == "score" else 1, vocabulary)), *states]
        if name not in METHODS:
            offenders.append(f"{name[:80]} is unexpected")
        elif list(method.inputs) != inputs or list(method.outputs) != outputs:
            offenders.append(f"{name} takes or gives other arrays than the model's")
        elif opened.own_kernels:
            offenders += differences(opened.file, name, opened.config, opened.metadata.layout)
        elif not _has_table(method, opened.config):
            offenders.append(f"{name} has no table of {vocabulary} rows")
    if offenders:
        raise InputError.listing(
            f"the methods of {opened.file.path} do not fit its metadata", offenders, "Export it again."
        )


def _has_table(method: PlanMethod, config: MossNetConfig) -> bool:
    """Whether there are rows for every token: codes and scales, or values. The runtime looks beyond the last one."""
    rows = [array for array in method.constants if array.ndim == 2 and array.shape[0] == config.vocab_size]
    codes, values = ([array for array in rows if (array.dtype.kind in "iu") == kind] for kind in (True, False))
    if codes:
        return len(codes) == 1 and len(values) > 0
    return any(array.shape[1] == config.hidden_size for array in values)


def weight_bytes(opened: Opened) -> int:
    """Bytes of codes, padding, scales and values in the program; a tied table, which is there twice, once."""
    if opened.own_kernels:
        return opened.file.sections[CONSTANTS]
    total, vocabulary = opened.file.sections[WEIGHTS] + opened.file.sections[CONSTANTS], opened.config.vocab_size
    decode = opened.file.methods["decode"]
    linears = [linear for delegate in decode.delegates for linear in delegate.linears]
    if not opened.config.tie_word_embeddings or not linears:
        return total
    # The look-up's copy has codes of its own, which no other tensor has outside the delegates, and fp32 scales.
    codes = [array for array in decode.constants if array.shape[:1] == (vocabulary,) and array.dtype.kind in "iu"]
    if not codes:
        return total - 4 * vocabulary * opened.config.hidden_size
    return total - codes[0].nbytes - 4 * linears[-1].stored_scales.size
