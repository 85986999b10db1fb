# SPDX-License-Identifier: Apache-2.0
"""Disk and memory: what work needs is compared with what is free before it starts, and matrices come in row blocks.

Anonymous memory is what counts: tensors that are read from mapped files are the system's to drop.
"""

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

from mossquant.errors import InputError

BLOCK_WEIGHTS = 1 << 18
"""Weights in a block: few enough to stay near a core, enough to make each operation worth its call."""

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
_MEMINFO = Path("/proc/meminfo")


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut the rows of a matrix into slices of about `BLOCK_WEIGHTS` weights, of one row at least."""
    step = max(1, BLOCK_WEIGHTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def trim_heap() -> None:
    """Give the heap's free pages back to the system, where its C library can (glibc).

    A few small pieces that last keep megabytes of holes between them resident; over a model of many tensors that came
    to half as much again as what was kept.
    """
    if _TRIM is not None:
        _TRIM(0)


def check_space(output: Path, *, disk_bytes: int, memory_bytes: int) -> None:
    """Say before work starts that there is too little room for it.

    Args:
        output: what is to be written; it need not exist, nor the folders above it.
        disk_bytes: room that it takes.
        memory_bytes: anonymous memory that making it takes, beside the interpreter's own.

    Raises:
        InputError: the disk above `output` has less free, or the system less memory available (where it says so).
    """
    offenders = []
    above = output.absolute().parent  # outputs are written beside their place first
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if free < disk_bytes:
        offenders.append(f"the output takes {_mb(disk_bytes)} of disk, and {above} has {_mb(free)} free")
    available = _available_memory()
    if available is not None and available < memory_bytes:
        offenders.append(f"making it takes {_mb(memory_bytes)} of memory, and {_mb(available)} are available")
    if offenders:
        raise InputError.listing("there is too little room", offenders, "Free some, or choose another disk or machine.")


def _available_memory() -> int | None:
    """MemAvailable of Linux, which counts what the system can drop; None elsewhere. It knows no container's limit."""
    try:
        words = _MEMINFO.read_text().partition("MemAvailable:")[2].split()
    except OSError:
        return None
    return int(words[0]) * 1024 if words else None


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
