# SPDX-License-Identifier: Apache-2.0
"""Outputs that appear whole or not at all.

A file or folder is written under a hidden temporary name beside its destination, flushed to disk, then renamed.
A process killed at any point leaves nothing at the output path, or what was there before; what it left beside it
(`.NAME.partial-PID`) is removed by the next run that writes to the same path.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, read_json

__all__ = ["check_free", "check_outside", "file_sha256", "json_bytes", "new_file", "new_folder", "write_json"]

_PARTIAL = ".partial-"
# What follows it: of a process; what stood at the output where the system cannot swap; what looking left.
_LEFTOVER = re.compile(r"([1-9][0-9]{0,9})(-old|-probe)?")

# Names in a full-precision checkpoint, which has no manifest that lists them.
_CHECKPOINT_FILES = re.compile(
    r"(config|training|tokenizer)\.json|model(-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
_MANIFEST = "manifest.json"
_KINDS = ("quantized checkpoint", "artifact")

# As root nothing else would keep us from replacing /dev/null or /dev/stdout.
_DEVICES = Path("/dev")

# Of renameat2(2), which Python has no name for.
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
# What it says where the system or the file system cannot.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_free(path: Path, *, force: bool = False, as_file: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Say early that an output cannot be written.

    Args:
        path: the output.
        force: whether what is there may be replaced.
        as_file: a file is to be written, not a folder.
        inputs: what is read; an output that is one of them, or inside or around one, is refused.

    Raises:
        InputError: the name is not UTF-8; something is at `path` and `force` is off; it is a link; it is a file where
            a folder is to be written or the other way round, or neither; it holds the working folder, an input, or
            files that are not ours; or the folder above it is not a folder, not reachable or not writable.
    """
    try:
        str(path.absolute()).encode()
        if path.absolute().parent == _DEVICES or (path.exists() and not (path.is_file() or path.is_dir())):
            raise InputError(f"{path} is a device, pipe or socket, so nothing is written there; choose another output")
        if path.is_symlink():
            raise InputError(f"{path} is a link, and no link is replaced; choose another output path or remove it")
        if path.is_dir() and as_file:
            raise InputError(f"{path} is a folder, and a file is to be written; choose another output path")
        for source in inputs:
            one, other = (Path(os.path.realpath(each)) for each in (path, source))
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise InputError(f"{path} is, holds or lies in the input {source}; choose another output path")
        if path.exists() and not force:
            raise InputError(f"{path} exists already; choose another output path or pass --force to replace it")
        if path.is_file() and not as_file:
            raise InputError(f"{path} is a file, and a folder is to be written; choose another output path")
        if Path.cwd().resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} holds the working folder, so it is not replaced; choose another output path")
        if os.path.ismount(path):
            raise InputError(f"{path} is a mount point, which cannot be replaced; choose another output path")
        if path.is_dir():
            _check_ours(path)
            if not os.access(path, os.W_OK | os.X_OK):  # it could be put aside, and not removed
                raise InputError(f"{path} belongs to somebody else, so it is not replaced; choose another output path")
        above = path.absolute().parent
        while not os.path.lexists(above) and above != above.parent:
            above = above.parent
    except UnicodeEncodeError:
        raise InputError(f"{path} is not a name in UTF-8, which the runtimes need; choose another output") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another output path") from None
    except RuntimeError:  # what resolve() makes of a link that leads to itself
        raise InputError(f"{path} is a link that leads to itself; choose another output path") from None
    if not above.is_dir():
        raise InputError(f"{above} is not a folder, so {path} cannot be written; choose another output path")
    # Tried, because permissions do not tell of read-only disks. A killed run's is removed with its other leftovers.
    probe = above / f".{path.name}{_PARTIAL}{os.getpid()}-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise InputError(
            f"{above} is not writable ({error.strerror}), so {path} cannot be written; choose another output path"
        ) from None


@contextmanager
def new_folder(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an exception; see `check_free`."""
    check_free(path, force=force, inputs=inputs)
    with _beside(path) as partial:
        partial.mkdir()
        yield partial
        for entry in sorted(partial.rglob("*")):
            _flush(entry)
        _flush(partial)
        check_free(path, force=force)  # something may have appeared meanwhile
        _put(partial, path.absolute(), force=force)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path to write to, in the same folder; it becomes `path` when the block ends without an exception."""
    check_free(path, force=force, as_file=True)
    force = force and os.path.lexists(path)  # what appears later was not meant
    with _beside(path) as partial:
        yield partial
        _flush(partial)
        check_free(path, force=force, as_file=True)
        if force:
            partial.replace(path.absolute())
        else:
            _put_beside_nothing(partial, path.absolute())
        _flush(partial.parent)


def json_bytes(value: Any) -> bytes:
    """JSON as this project stores it: UTF-8, indented, keys in the given order, one newline at the end; no NaN."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `json_bytes(value)` to `path` (inside a folder that is itself written aside)."""
    path.write_bytes(json_bytes(value))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_ours(folder: Path) -> None:
    """Raise `InputError`: the folder is neither empty nor one that we wrote, or it holds more than what we wrote."""
    entries = sorted(folder.iterdir())
    if not entries:
        return
    written = _names_written(folder)
    damaged = (folder / _MANIFEST).exists() and (written is None or _MANIFEST not in written)
    if written is None or damaged:
        why = f"did not write, or its {_MANIFEST} is damaged" if damaged else "did not write"
        raise InputError(f"{folder} is a folder that mossquant {why}, so it is not replaced; choose another")
    for entry in entries:
        if entry.name not in written or entry.is_dir():
            raise InputError(
                f"{folder} holds {entry.name}, which mossquant did not write, so it is not replaced; "
                "move that away or choose another output path"
            )


def _names_written(folder: Path) -> set[str] | None:
    """Names that a checkpoint, quantized checkpoint or artifact of ours may hold; None for any other folder."""
    manifest = _object(folder / _MANIFEST)
    files = manifest.get("files")
    if manifest.get("kind") in _KINDS and "release" in manifest and isinstance(files, dict):
        return {_MANIFEST, *files}
    if _object(folder / "config.json").get("model_type") == "mossnet":
        return {path.name for path in folder.iterdir() if _CHECKPOINT_FILES.fullmatch(path.name)}
    return None


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        found = read_json(path, largest=LARGEST_SMALL, advice="") if path.is_file() else None
    except InputError:
        found = None
    return found if isinstance(found, dict) else {}


def check_outside(path: Path) -> None:
    """Raise `InputError`: the folder of a file to be written is a checkpoint or an artifact, which stays as it is."""
    if _names_written(path.absolute().parent) is not None:
        raise InputError(f"{path} lies in a checkpoint or artifact, which is left as it is; choose another path")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A free temporary name beside `path`. If the block fails, nothing stays: not it, not folders made to hold it."""
    path = path.absolute()
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
        found = _LEFTOVER.fullmatch(left.name.removeprefix(f".{path.name}{_PARTIAL}"))
        if found is not None and not _alive(int(found[1])):
            _remove(left)
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")
    try:
        yield partial
    finally:
        _remove(partial)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # a number that no process can have is not of ours
        return True
    return pid != os.getpid()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():
            os.fchmod(handle, 0o644)  # safetensors writes files that only their owner can read
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(partial: Path, path: Path, *, force: bool) -> None:
    """Rename a folder to its destination. What was there is removed once the new folder is in its place, and only if
    it still holds nothing but what we wrote.
    """
    if not force or not os.path.lexists(path):
        _put_beside_nothing(partial, path)
    else:
        old = partial
        if not _renamed(partial, path, _RENAME_EXCHANGE):
            old = partial.with_name(partial.name + "-old")
            path.rename(old)
            partial.rename(path)
        try:
            _check_ours(old)
        except InputError:
            _remove(path)
            old.rename(path)
            raise InputError(f"{path} was written to meanwhile, so it is not replaced; choose another path") from None
        _remove(old)
    _flush(path.parent)


def _put_beside_nothing(partial: Path, path: Path) -> None:
    """Rename to where nothing may be, whoever wrote there a moment ago."""
    try:
        if not _renamed(partial, path, _RENAME_NOREPLACE):
            partial.rename(path)
    except FileExistsError:
        raise InputError(f"{path} appeared meanwhile, so it is not replaced; choose another output path") from None


def _renamed(one: Path, other: Path, how: int) -> bool:
    """Rename, or swap, two paths in one step; False where the system or the file system cannot. Raises `OSError`."""
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0:
        return True
    error = ctypes.get_errno()
    if error in _UNKNOWN:
        return False
    raise OSError(error, os.strerror(error), str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
