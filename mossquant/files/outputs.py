# SPDX-License-Identifier: Apache-2.0
"""Outputs that appear whole or not at all.

A file or folder is written under a hidden temporary name beside its destination, flushed to disk, then renamed.
A process killed at any point leaves nothing at the output path, or what was there before; what it left beside it
(`.NAME.mossquant-partial`) is removed by the next run that writes to the same path.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from mossquant.errors import InputError
from mossquant.files.json import json_object

# Names in a full-precision checkpoint, which has no manifest that lists them.
_CHECKPOINT_FILES = re.compile(
    r"(config|training|tokenizer|text)\.json|model(-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
_MANIFEST = "manifest.json"
_KINDS = ("quantized checkpoint", "artifact", "statistics")
_ANOTHER = "choose another output path"


def check_free(path: Path, *, force: bool = False, as_file: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Say early that an output cannot be written.

    Args:
        path: the output.
        force: whether what is there may be replaced: a file by a file, and a folder that is empty, or holds nothing
            but what its manifest or the layout of a checkpoint names.
        as_file: a file is to be written, not a folder.
        inputs: what is read; an output that is one of them, or inside or around one, is refused.

    Raises:
        InputError: one of the above, the name is not UTF-8, or the folder above is not a folder or not writable, which
            is tried.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path} is not a name in UTF-8, which the runtimes need; {_ANOTHER}") from None
    kind, there = "file" if as_file else "folder", os.path.lexists(path)
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    check_apart(path, inputs)
    if there and (path.is_symlink() or not (path.is_file() if as_file else path.is_dir())):
        raise InputError(f"{path} is there and not a {kind}, which alone is replaced; {_ANOTHER} or remove it")
    if there and not force:
        raise InputError(f"{path} exists already; {_ANOTHER} or pass --force to replace it")
    if there and Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{path} holds the working folder, so it is not replaced; {_ANOTHER}")
    if there and not as_file:
        _check_ours(path)
    for folder in (above, path) if there and not as_file else (above,):
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise InputError(f"{folder} is not a folder, or not writable, so {path} cannot be written; {_ANOTHER}")
    tried = _temporary(above / path.name, "partial")
    if not os.path.lexists(tried):
        with _written(path):
            tried.touch()
            tried.unlink()


@contextmanager
def new_folder(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an exception; see `check_free`."""
    check_free(path, force=force, inputs=inputs)
    with _beside(path, Path.mkdir) as partial:
        yield partial
        for entry in sorted(partial.rglob("*")):
            _flush(entry)
        _flush(partial)
        check_free(path, force=force)  # the work may have taken hours
        replaced = _temporary(path, "replaced")
        if path.exists():
            path.rename(replaced)
        partial.rename(path.absolute())
        _flush(partial.parent)
        _remove(replaced)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path to write to, in the same folder; it becomes `path` when the block ends without an exception."""
    check_free(path, force=force, as_file=True)
    with _beside(path, Path.touch) as partial:
        yield partial
        _flush(partial)
        check_free(path, force=force, as_file=True)
        partial.replace(path.absolute())
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


def check_apart(path: Path, others: Sequence[Path], *, role: Literal["input", "output"] = "input") -> None:
    """Raise `InputError`: `path` is one of the others, which are of this role, or inside or around one."""
    for other in others:
        real, real_other = Path(os.path.realpath(path)), Path(os.path.realpath(other))
        if real.is_relative_to(real_other) or real_other.is_relative_to(real):
            raise InputError(f"{path} is, holds or lies in the {role} {other}; {_ANOTHER}")


def check_outside(path: Path) -> None:
    """Raise `InputError`: the folder of a file to be written is a checkpoint or an artifact, which stays as it is."""
    if _names_written(path.absolute().parent):
        raise InputError(f"{path} lies in a checkpoint or artifact, which is left as it is; choose another path")


def _check_ours(folder: Path) -> None:
    """Raise `InputError`: the folder holds something that we did not write."""
    written = _names_written(folder)
    for entry in sorted(folder.iterdir()):
        if not written:
            raise InputError(f"{folder} is a folder that mossquant did not write, so it is not replaced; {_ANOTHER}")
        if entry.name not in written or entry.is_dir():
            raise InputError(
                f"{folder} holds {entry.name}, which mossquant did not write, so it is not replaced; "
                f"move that away or {_ANOTHER}"
            )


def _names_written(folder: Path) -> set[str]:
    """Names that a checkpoint, quantized checkpoint or artifact of ours may hold; none for any other folder."""
    manifest = json_object(folder / _MANIFEST)
    files = manifest.get("files")
    if manifest.get("kind") in _KINDS and "release" in manifest and isinstance(files, dict):
        return {_MANIFEST, *files}
    if json_object(folder / "config.json").get("model_type") == "mossnet":
        return {path.name for path in folder.iterdir() if _CHECKPOINT_FILES.fullmatch(path.name)}
    return set()


@contextmanager
def _beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What `make` makes under a temporary name beside `path`. If the block fails, nothing stays: not it, not folders
    made to hold it.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    partial = _temporary(path, "partial")
    try:
        with _written(path):
            partial.parent.mkdir(parents=True, exist_ok=True)
            for left_by_a_killed_run in (partial, _temporary(path, "replaced")):
                _remove(left_by_a_killed_run)
            make(partial)
        yield partial
    finally:
        if os.path.lexists(partial):
            _remove(partial)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """What the system refuses here, a name that is too long for it, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); {_ANOTHER}") from None


def _temporary(path: Path, what: str) -> Path:
    path = path.absolute()
    return path.with_name(f".{path.name}.mossquant-{what}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():
            os.fchmod(handle, 0o644)  # safetensors writes files that only their owner can read
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
