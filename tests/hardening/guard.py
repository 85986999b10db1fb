# SPDX-License-Identifier: Apache-2.0
"""Runs something under the bounds of a case: a time after which the process dies with every stack, and peak memory.

The largest resident set since it was last reset is the kernel's own count; it sees what native code allocates too.
"""

import faulthandler
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mossquant.targets import trial

EXTRA_MB = 1000
"""A case may not take more than this above what the process had before."""
SECONDS = trial.SECONDS + 60
"""After so long a case hangs: a .pte that does not end is refused when the trial's time is over."""

_CAP_BYTES = 6 << 30
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """What a case took."""

    seconds: float = 0.0
    extra_mb: float = 0.0


def cap_memory() -> None:
    """Let what would take all of a machine fail instead: address space, which nothing below the bound comes near."""
    limit = _read("VmSize") * 1024 + _CAP_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextmanager
def measured() -> Iterator[Cost]:
    """Fill in a cost; if it lasts too long, print all stacks and end the process."""
    cost = Cost()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _read("VmRSS"), time.monotonic()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield cost
    finally:
        faulthandler.cancel_dump_traceback_later()
        cost.seconds = time.monotonic() - started
        cost.extra_mb = (_read("VmHWM") - before) / 1000


def _read(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
