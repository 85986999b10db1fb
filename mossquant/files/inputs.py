# SPDX-License-Identifier: Apache-2.0
"""Files of the user that are read up to a limit, and files that may be left out."""

import errno
import os
import stat
from pathlib import Path

from mossquant.errors import InputError

__all__ = ["first_bytes", "is_there"]


def first_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file, or all of them where there are fewer.

    Raises:
        OSError: it cannot be read, or is a device, pipe or socket: reading one may never end.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a device, pipe or socket", str(path))
    with path.open("rb") as file:
        # What has no size, as the system's own files, is as good as empty: reading it may never end.
        return file.read(min(count, found.st_size))


def is_there(path: Path) -> bool:
    """Whether a file is there that may be left out.

    Raises:
        InputError: something else is: a folder, device or pipe, or a link that leads nowhere. To leave that out would
            be to skip what somebody meant to give.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = "is a link that leads nowhere" if not path.exists() else "is no file"
        raise InputError(f"{path} {what}; put the file there, or take it away")
    return False
