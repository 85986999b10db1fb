# SPDX-License-Identifier: Apache-2.0
"""Opens a .moss of ours: what it says about itself, that its tensors are those of its config, the files beside it.

libmoss checks the header again when it maps the file, so that nothing has to be tried apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossquant.errors import InputError
from mossquant.files.json import parse_json
from mossquant.files.outputs import file_sha256
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import parameter_count, state_specs, tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import get_capabilities
from mossquant.targets.artifact import check_beside
from mossquant.targets.metadata import parsed
from mossquant.targets.native.header import read_header
from mossquant.targets.native.library import load_library
from mossquant.targets.native.metadata import FILE_VERSIONS, METADATA_KEY, RUNTIME_KEY, Metadata, runtime_metadata
from mossquant.targets.native.stored import stored_bytes

_AGAIN = "Copy the artifact's folder again, or export again."


@dataclass(frozen=True)
class Opened:
    """A program whose header was read and checked; its tensors are mapped.

    Attributes:
        path: the file.
        metadata: what it says about itself.
        config: the model's shape.
        specs: tensor name → what it is.
        formats: tensor name → number format, or the type in which it is kept.
        states: state array's name → state format, of those that are rounded.
        spans: tensor name → its bytes in the file.
    """

    path: Path
    metadata: Metadata
    config: MossNetConfig
    specs: Mapping[str, TensorSpec]
    formats: Mapping[str, str]
    states: Mapping[str, str]
    spans: Mapping[str, slice]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the program."""
        return {self.path.name: file_sha256(self.path)}

    @property
    def bytes(self) -> int:
        """Bytes of the program."""
        return self.path.stat().st_size

    def stored(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped."""
        return self._mapped[self.spans[name]]

    @cached_property
    def _mapped(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, np.uint8, mode="r")


def open_program(path: Path) -> Opened:
    """Read and check the header of a .moss of ours, and the manifest and tokenizer beside it.

    Raises:
        InputError: no .moss, cut short, not written by this project or by another release; tensors that are not those
            of its config, formats and layout; it contradicts the manifest, or another tokenizer lies there.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .moss that `mossquant export` wrote")
    texts, spans = read_header(path)
    if METADATA_KEY not in texts or RUNTIME_KEY not in texts:
        raise InputError(f"{path} holds no mossquant metadata; give a .moss that `mossquant export` wrote")
    metadata = parsed(Metadata, texts[METADATA_KEY], path)
    config = MossNetConfig.from_json(metadata.config, where=f"the metadata of {path}")
    specs = {spec.name: spec for spec in tensor_specs(config)}
    formats, states = _formats_and_states(path, texts[RUNTIME_KEY], metadata, config)
    offenders = list(_offenders(metadata, config, specs, formats, states, spans))
    if offenders:
        raise InputError.listing(f"{path} is damaged", offenders, _AGAIN)
    opened = Opened(path, metadata, config, specs, formats, states, spans)
    check_beside(path, opened.hashes, metadata)
    return opened


def open_to_run(path: Path) -> Opened:
    """`open_program`, and libmoss is loaded.

    Raises:
        InputError: as `open_program`; libmoss is missing or of another release.
    """
    opened = open_program(path)
    load_library()
    return opened


def _formats_and_states(
    path: Path, text: str, metadata: Metadata, config: MossNetConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Tensor name → format, and state array's name → format where it is rounded, from what the file says to libmoss,
    the rest of which follows from the config.

    Raises:
        InputError: it is not JSON, of another version, or says something else than the metadata.
    """
    try:
        said: Any = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: what it says to libmoss is not JSON ({str(error)[:120]}). {_AGAIN}") from None
    if not isinstance(said, dict) or said.get("version") not in FILE_VERSIONS:
        known = " and ".join(map(str, FILE_VERSIONS))
        raise InputError(f"{path} is of another version than {known}; use the release of mossquant that wrote it")
    formats = _texts(path, said.get("formats"), "tensors are stored")
    states = _texts(path, said.get("states", {}), "states are carried")
    expected = runtime_metadata(config, metadata.layout, formats, states)
    own = said.get("config")
    held = {**said, "config": {key: own.get(key) for key in expected["config"]} if isinstance(own, dict) else None}
    differing = [key for key, value in expected.items() if held.get(key) != value]
    if differing:
        raise InputError(f"{path} says another {differing[0]} to libmoss than its metadata does. {_AGAIN}")
    return formats, states


def _texts(path: Path, said: Any, what: str) -> dict[str, str]:
    """Name → text. Raises `InputError`: it is something else."""
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise InputError(f"{path} does not say how its {what}. {_AGAIN}")
    return said


def _offenders(
    metadata: Metadata,
    config: MossNetConfig,
    specs: Mapping[str, TensorSpec],
    formats: Mapping[str, str],
    states: Mapping[str, str],
    spans: Mapping[str, slice],
) -> Iterator[str]:
    yield from (f"{name} is missing" for name in specs if name not in spans)
    yield from (f"{name[:80]} is unexpected" for name in spans if name not in specs)
    target = get_capabilities("native")
    for name, spec in specs.items():
        storage = formats.get(name)
        if storage is None or storage not in (*target.holds(spec), *FLOAT_DTYPES):
            yield f"{name} is stored in {repr(storage)[:40]}, which libmoss does not read"
        elif name in spans:
            size, needed = spans[name].stop - spans[name].start, stored_bytes(spec, storage, metadata.layout)
            if size != needed:
                yield f"{name} has {size} bytes, {storage} needs {needed}"
    roles = {spec.name: spec.role for spec in state_specs(config)}
    for name, state in states.items():
        if name not in roles or state not in target.carries(roles[name]):
            yield f"{name[:80]} is carried in {repr(state)[:40]}, which libmoss does not do"
    said = ", ".join(sorted({states.get(name, "fp32") for name in roles}))
    if metadata.state_format != said:
        yield f"its states are {said[:40]}, its metadata says {metadata.state_format[:40]}"
    weight_bytes = sum(span.stop - span.start for span in spans.values())
    if metadata.weight_bytes != weight_bytes:
        yield f"its weights have {weight_bytes} bytes, its metadata says {metadata.weight_bytes}"
    if metadata.parameters < parameter_count(config):
        yield f"its metadata says {metadata.parameters} parameters, fewer than the model has"
