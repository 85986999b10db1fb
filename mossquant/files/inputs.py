# SPDX-License-Identifier: Apache-2.0
"""Files of the user, read up to a limit."""

import errno
from pathlib import Path

__all__ = ["first_bytes"]


def first_bytes(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file, or all of them where there are fewer.

    Raises:
        OSError: it cannot be read, or is not a regular file: reading a device or pipe may never end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        return file.read(count)
