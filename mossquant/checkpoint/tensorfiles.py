# SPDX-License-Identifier: Apache-2.0
"""Named tensors on disk: one `model.safetensors`, or shards with `model.safetensors.index.json`, or of another stem.

Reading is memory-mapped, one tensor at a time. Writing holds one shard in memory: below 256 MB everything is one file,
above it shards of whole tensors are closed at 64 MB, in the order in which the tensors come.
"""

import difflib
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mossquant.errors import LISTED, InputError
from mossquant.files.inputs import check_fetched
from mossquant.files.json import LARGEST, read_json
from mossquant.files.outputs import write_json
from mossquant.formats.dtypes import dtype_name

ONE_FILE_BYTES = 256 * 10**6
SHARD_BYTES = 64 * 10**6

# Of tensors that are there, these are compared with one that is missing.
_LONGEST_NAME, _COMPARED = 200, 1000
# The library takes headers of up to 100 MB, and some ten times that in memory to read them.
_LARGEST_HEADER = LARGEST

_STEM = "model"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Readers of other projects ask for it. One entry and no more: the library writes several in a random order.
_METADATA = {"format": "pt"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


class TensorFile:
    """One safetensors file, memory-mapped.

    Attributes:
        metadata: what it says about itself.
        shapes: tensor name → shape.
        dtypes: tensor name → dtype.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            SafetensorError: of another format, cut short, a header above 16 MB, or a dtype that no file of ours has.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if _LARGEST_HEADER < header < path.stat().st_size:
            raise SafetensorError(f"a header of {header} bytes, {_LARGEST_HEADER} is the most that is read")
        opened: Any = safe_open(path, framework="pt")
        self._opened = opened
        self.metadata: dict[str, str] = opened.metadata() or {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in opened.keys():  # noqa: SIM118
            entry = opened.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in _DTYPES:
                raise SafetensorError(f"{name[:80]} has dtype {dtype}")
            self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), _DTYPES[dtype]

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor


class TensorFiles:
    """The tensors of a folder, read on demand from memory-mapped files.

    Attributes:
        files: names of the tensor files (and of the index, if there is one), sorted.
        shapes: tensor name → shape.
        dtypes: tensor name → dtype.
    """

    def __init__(self, folder: Path, *, stem: str = _STEM) -> None:
        """Read the headers of the files named `stem`.

        Raises:
            InputError: no tensor file, an index that is none or names files outside the folder; missing shards, files
                that `TensorFile` does not read, a tensor in two shards, all offenders at once.
        """
        listed, index = _weight_map(folder, stem), _index_name(stem)
        shards = [_file_name(stem)] if listed is None else sorted(set(listed.values()))
        check_fetched(*(folder / shard for shard in shards))
        self.files = shards if listed is None else sorted([*shards, index])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._holder: dict[str, TensorFile] = {}
        where: dict[str, str] = {}
        offenders = []
        for shard in shards:
            if not (folder / shard).is_file():
                offenders.append(f"{shard} is missing, though {index} names it")
                continue
            try:
                file = TensorFile(folder / shard)
            except (SafetensorError, OSError) as error:
                offenders.append(f"{shard} is not a safetensors file that is read ({str(error)[:200]})")
                continue
            twice = sorted(where.keys() & file.shapes.keys())
            offenders += [f"{name[:80]} is in {where[name]} and in {shard}" for name in twice]
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes
            self._holder |= dict.fromkeys(file.shapes, file)
            where |= dict.fromkeys(file.shapes, shard)
        if not offenders and listed is not None:
            wrong = sorted(name for name in {**listed, **where} if listed.get(name) != where.get(name))
            offenders = [f"{index} does not say where {name[:80]} is" for name in wrong]
        if offenders:
            raise InputError.listing(f"{folder} cannot be read", offenders, "Copy the whole folder again.")

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        return self._holder[name].tensor(name)


class NeededTensor(NamedTuple):
    """Shape of a tensor that a file must hold, and the types that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def tensor_offenders(
    needed: Mapping[str, NeededTensor], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> list[str]:
    """Which tensors are missing, unexpected, or of another shape or type than needed.

    One that is missing is named with the one that seems to stand in its place: of its shape, with the nearest name.

    Args:
        needed: tensor name → what it must be.
        shapes: tensor name → shape, of the tensors that are there.
        dtypes: tensor name → type of the same.
    """
    unexpected = sorted(name for name in shapes if name not in needed)
    absent = [name for name in needed if name not in shapes]
    missing = [f"{name} is missing" for name in absent]
    for i, name in enumerate(absent[:LISTED]):
        alike = [other for other in unexpected if shapes[other] == needed[name].shape and len(other) < _LONGEST_NAME]
        for near in difflib.get_close_matches(name, alike[:_COMPARED], n=1):
            unexpected.remove(near)
            missing[i] += f" (there is {near})"
    misfits = []
    for name, tensor in needed.items():
        if name not in shapes:
            continue
        if shapes[name] != tensor.shape:
            misfits.append(f"{name} has shape {list(shapes[name])}, needs {list(tensor.shape)}")
        if dtypes[name] not in tensor.dtypes:
            allowed = " or ".join(dict.fromkeys(map(dtype_name, tensor.dtypes)))
            misfits.append(f"{name} has dtype {dtype_name(dtypes[name])}, needs {allowed}")
    others = [f"{name[:80]} is unexpected" for name in unexpected]
    in_turn = itertools.zip_longest(missing, others, misfits)  # so that what is listed first shows every kind
    return [offender for turn in in_turn for offender in turn if offender is not None]


class TensorWriter:
    """Writes named tensors into a folder, as one file or as shards; `close` ends it.

    Args:
        folder: an existing folder (itself written aside).
        total_bytes: bytes of all tensors that will come, which decides between one file and shards.
        stem: what the files' names begin with.
        one_file_bytes: up to how many they are one file; None: `ONE_FILE_BYTES`.
    """

    def __init__(self, folder: Path, *, total_bytes: int, stem: str = _STEM, one_file_bytes: int | None = None) -> None:
        self._folder, self._stem = folder, stem
        most = ONE_FILE_BYTES if one_file_bytes is None else one_file_bytes
        self._limit = None if total_bytes <= most else SHARD_BYTES
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; it is held until its shard is full."""
        tensor = tensor.detach().contiguous()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total += tensor.nbytes
        if self._limit is not None and self._pending_bytes >= self._limit:
            self._flush()

    def _flush(self) -> None:
        number = len(self._shards)
        save_tensors(self._pending, self._folder / _shard_name(self._stem, number), metadata=_METADATA)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._limit is None:
            save_tensors(self._pending, self._folder / _file_name(self._stem), metadata=_METADATA)
            return
        if self._pending:
            self._flush()
        where = {name: _shard_name(self._stem, number) for number, names in enumerate(self._shards) for name in names}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        write_json(self._folder / _index_name(self._stem), index)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file.

    Raises:
        OSError: the system refused, e.g. a full disk: the library hides its error number in a text.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinities: one pass, nothing allocated."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _file_name(stem: str) -> str:
    return f"{stem}.safetensors"


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _shard_name(stem: str, number: int) -> str:
    return f"{stem}-{number + 1:05d}.safetensors"


def _weight_map(folder: Path, stem: str) -> dict[str, str] | None:
    """Tensor name → shard, as the index says; None where there is one file without an index."""
    one, many = _file_name(stem), _index_name(stem)
    index = folder / many
    present = [name for name in (one, many) if (folder / name).is_file()]
    if len(present) != 1:
        raise InputError(f"{folder} holds {' and '.join(present) or 'neither'} of {one} and {many}; one is needed")
    if present == [one]:
        return None
    content = read_json(index, largest=LARGEST, advice="copy it again")
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(map(_is_shard, listed.values())):
        raise InputError(
            f"{index} is not a safetensors index, whose weight_map gives every tensor the name of a file beside it; "
            "copy it again"
        )
    return listed


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None
