# SPDX-License-Identifier: Apache-2.0
"""Files of the user, read up to a limit."""

import errno
from pathlib import Path

from mossquant.errors import InputError

_POINTER = b"version https://git-lfs"


def read_bytes(path: Path, *, largest: int, advice: str) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        largest: most bytes that it may have.
        advice: what to do where it cannot be read, without a full stop.

    Raises:
        InputError: missing, unreadable, too large, or not a regular file: reading a device or a pipe may never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a folder" if path.is_dir() else "it is not a regular file")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    if len(data) > largest:
        size = f"{largest >> 20} MB" if largest >= 1 << 20 else f"{largest >> 10} kB"
        raise InputError(f"{path} is larger than {size}; {advice}")
    check_fetched(path)
    return data


def check_fetched(*paths: Path) -> None:
    """Refuse what Git LFS leaves in place of a file that was not fetched. Raises `InputError`, naming all of them."""
    pointers = [f"{path} is a Git LFS pointer" for path in paths if is_pointer(path)]
    if pointers:
        raise InputError.listing("the files themselves are not here", pointers, "Run `git lfs pull`.")


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(_POINTER)) == _POINTER
    except OSError:  # whoever reads it says so
        return False
