# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on, and how fast that machine copies memory."""

import os
import platform
import resource
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.kernels import _native
from mossquant.targets.target import runtimes

_COPY_BYTES = 256 << 20
"""Size of the copied block: far above every cache."""
_COPIES = 5
_READS = 4


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_out(threads: int | None, models: int) -> tuple[int, int]:
    """How many models work at the same time, and with how many threads each.

    Models side by side keep the cores busier than the threads of one, which wait for one another at every operator.

    Args:
        threads: in all; None: as many as this process may use CPUs. Less than one is left to `open_model` to refuse.
        models: how many there are.
    """
    whole = cpu_count() if threads is None else threads
    at_once = max(1, min(whole, models))
    return at_once, whole // at_once


def machine() -> dict[str, Any]:
    """CPU model, logical cores, system, and versions of Python and the runtimes."""
    return {
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **runtimes(),
    }


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written a second, in 10⁹, by PyTorch's copy of 256 MiB; the best of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        best = min(timeit.repeat(lambda: target.copy_(source), number=1, repeat=_COPIES))
    finally:
        torch.set_num_threads(before)
    return 2 * _COPY_BYTES / best / 1e9


def read_bandwidth(data: NDArray[np.uint8], threads: int) -> float:
    """Bytes read a second, in 10⁹: as many threads go through `data` [n], each through its own part of it."""
    return _native.read_bandwidth(data, threads=threads, passes=_READS)


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in 10⁶ bytes.

    On Linux it is VmHWM of /proc/self/status, because ru_maxrss of a new process begins with its parent's.
    """
    if highest := _line_of("/proc/self/status", "VmHWM"):
        return int(highest.split()[0]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _line_of(path: str, name: str) -> str:
    """What the first line `name: …` of a file of the system says; nothing where there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
