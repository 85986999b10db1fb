# SPDX-License-Identifier: Apache-2.0
"""How much memory a piece of work takes, watched from outside."""

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mossquant.files.space import trim_heap

_SAMPLE_SECONDS = 0.0005
_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of malloc.h."""


def grown(work: Callable[[], object]) -> int:
    """Run `work` in a forked copy of this process; its highest anonymous memory above what it had before."""
    waiting, go = os.pipe()
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # threads of the parent are not there
            # What the tests before left behind would be filled, or would not: it begins like a process of its own.
            gc.collect()
            trim_heap()
            # Each tensor gets a mapping of its own, which ends with it: glibc would put more and more of them into its
            # heap, and what holes stay there goes by all that was allocated before.
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 128 * 1024)
            os.write(said, b".")
            os.read(waiting, 1)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(said)
    os.read(ready, 1)
    os.close(ready)
    before = peak = anonymous_bytes(child)
    os.write(go, b".")
    ended, status = 0, 0
    while not ended:
        peak = max(peak, anonymous_bytes(child))
        time.sleep(_SAMPLE_SECONDS)
        ended, status = os.waitpid(child, os.WNOHANG)
    os.close(waiting)
    os.close(go)
    assert status == 0, "the work failed"
    return peak - before


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file backs; 0 once it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE)))
