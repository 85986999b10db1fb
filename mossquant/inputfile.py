# SPDX-License-Identifier: Apache-2.0
"""Files of the user that are read whole, or up to a limit."""

import errno
import stat
from pathlib import Path

__all__ = ["first_bytes"]


def first_bytes(path: Path, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all of them.

    Raises:
        OSError: it cannot be read, or is a device, pipe or socket: reading one may never end.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a device, pipe or socket", str(path))
    with path.open("rb") as file:
        return file.read(count)
