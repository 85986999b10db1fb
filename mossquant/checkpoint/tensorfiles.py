# SPDX-License-Identifier: Apache-2.0
"""Named tensors on disk: one `model.safetensors`, or shards with `model.safetensors.index.json`.

Reading is memory-mapped, one tensor at a time. Writing holds one shard in memory: below 256 MB everything is one file,
above it shards of whole tensors are closed at 64 MB, in the order in which the tensors come.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mossquant.errors import InputError
from mossquant.files.json import LARGEST, read_json
from mossquant.files.outputs import write_json
from mossquant.formats.dtypes import dtype_name

ONE_FILE_BYTES = 256 * 10**6
SHARD_BYTES = 64 * 10**6

_LENGTH_BYTES = 8
_LARGEST_HEADER = LARGEST
"""The library takes headers of up to 100 MB, and some ten times that in memory to read them."""

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles:
    """The tensors of a folder, read on demand from memory-mapped files.

    Attributes:
        folder: where they lie.
        files: names of the tensor files (and of the index, if there is one), sorted.
        shapes: tensor name → shape.
        dtypes: tensor name → dtype.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            InputError: no tensor file, an index that is none or names files outside the folder; missing shards, files
                that are not safetensors (truncated, corrupted, a pickle), a tensor in two shards or of an unknown
                dtype, all offenders at once.
        """
        self.folder = folder
        listed = _weight_map(folder)
        shards = [_FILE] if listed is None else sorted(set(listed.values()))
        self.files = sorted([*shards, _INDEX] if (folder / _INDEX).is_file() else shards)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        offenders = [offender for shard in shards for offender in self._read_header(shard)]
        if not offenders and listed is not None and listed != self._where:
            wrong = [name for name in {**listed, **self._where} if listed.get(name) != self._where.get(name)]
            offenders = [f"{_INDEX} does not say where {name[:80]} is" for name in sorted(wrong)]
        if offenders:
            raise InputError.listing(
                f"{folder} cannot be read",
                offenders,
                "Copy the whole folder or export it again; an original Mamba comes in with `mossquant import`.",
            )

    def _read_header(self, shard: str) -> list[str]:
        """Take the tensors of one file in; returns what is wrong with it."""
        path = self.folder / shard
        if not path.is_file():
            return [f"{shard} is missing, though {_INDEX} names it"]
        with path.open("rb") as file:
            claimed = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if _LARGEST_HEADER < claimed < path.stat().st_size:
            return [f"{shard} has a header of {claimed} bytes, {_LARGEST_HEADER} is the most that is read"]
        try:
            opened: Any = safe_open(path, framework="pt")
            names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            pickled = _looks_pickled(path)
            kind = "a pickle, as in pytorch_model.bin" if pickled else "truncated, corrupted or of another format"
            return [f"{shard} is not a safetensors file ({kind}: {str(error)[:100]})"]
        self._open[shard] = opened
        offenders = []
        for name in names:
            view = opened.get_slice(name)
            kind = view.get_dtype()
            if name in self._where:
                offenders.append(f"{name[:80]} is in {self._where[name]} and in {shard}")
            elif kind not in _DTYPES:
                offenders.append(f"{name[:80]} in {shard} has dtype {kind}, which no checkpoint of ours has")
            else:
                self._where[name] = shard
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = _DTYPES[kind]
        return offenders

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored."""
        tensor: Tensor = self._open[self._where[name]].get_tensor(name)
        return tensor

    def stored_bytes(self, name: str) -> int:
        """Bytes of one tensor's data."""
        count = self.dtypes[name].itemsize
        for size in self.shapes[name]:
            count *= size
        return count


class NeededTensor(NamedTuple):
    """Shape of a tensor that a file must hold, and the types that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def tensor_offenders(
    needed: Mapping[str, NeededTensor], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> list[str]:
    """Which tensors are missing, unexpected, or of another shape or type than needed.

    Args:
        needed: tensor name → what it must be.
        shapes: tensor name → shape, of the tensors that are there.
        dtypes: tensor name → type of the same.
    """
    offenders = [f"{name} is missing" for name in needed if name not in shapes]
    offenders += [f"{name[:80]} is unexpected" for name in sorted(shapes) if name not in needed]
    for name, tensor in needed.items():
        if name not in shapes:
            continue
        if shapes[name] != tensor.shape:
            offenders.append(f"{name} has shape {list(shapes[name])}, needs {list(tensor.shape)}")
        if dtypes[name] not in tensor.dtypes:
            allowed = " or ".join(dict.fromkeys(map(dtype_name, tensor.dtypes)))
            offenders.append(f"{name} has dtype {dtype_name(dtypes[name])}, needs {allowed}")
    return offenders


class TensorWriter:
    """Writes named tensors into a folder, as one file or as shards; `close` ends it.

    Args:
        folder: an existing folder (itself written aside).
        total_bytes: bytes of all tensors that will come, which decides between one file and shards.
    """

    def __init__(self, folder: Path, *, total_bytes: int) -> None:
        self._folder = folder
        self._limit = None if total_bytes <= ONE_FILE_BYTES else SHARD_BYTES
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; it is held until its shard is full."""
        tensor = tensor.detach().contiguous()
        self._pending[name] = tensor
        self._pending_bytes += tensor.numel() * tensor.element_size()
        self._total += tensor.numel() * tensor.element_size()
        if self._limit is not None and self._pending_bytes >= self._limit:
            self._flush()

    def _flush(self) -> None:
        number = len(self._shards)
        save_tensors(self._pending, self._folder / _shard_name(number), metadata=_METADATA)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._limit is None:
            save_tensors(self._pending, self._folder / _FILE, metadata=_METADATA)
            return
        if self._pending:
            self._flush()
        where = {name: _shard_name(number) for number, names in enumerate(self._shards) for name in names}
        write_json(
            self._folder / _INDEX,
            {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))},
        )


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file.

    Raises:
        OSError: the system refused, e.g. a full disk: the library hides its error number in a text.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
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


def _shard_name(number: int) -> str:
    return f"model-{number + 1:05d}.safetensors"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name → shard, as the index says; None where there is one file without an index."""
    index = folder / _INDEX
    indexed, single = index.is_file(), (folder / _FILE).is_file()
    if not indexed:
        if not single:
            raise InputError(f"{folder} holds no {_FILE} and no {_INDEX}; copy the whole checkpoint folder again")
        return None
    if single:
        raise InputError(f"{folder} holds both {_FILE} and {_INDEX}; remove the one that is not meant")
    content = read_json(index, largest=LARGEST, advice="copy it again")
    try:
        listed: dict[str, str] = content["weight_map"]
        shards = sorted(set(listed.values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is not a safetensors index (a JSON object with weight_map); copy it again") from None
    outside = [str(name)[:60] for name in shards if not (isinstance(name, str) and _SHARD.fullmatch(name))]
    if outside:
        raise InputError.listing(
            f"{index} names files outside its folder", outside, "Shards must lie beside the index."
        )
    if not shards:
        raise InputError(f"{index} names no shards; copy it again")
    return listed


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
    return head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head == b"PK\x03\x04"
