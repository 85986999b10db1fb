# SPDX-License-Identifier: Apache-2.0
"""Runs a .pte apart, before it is loaded here: a damaged program can bring the runtime down, and with it the process.

The runtime checks the outer flatbuffer and believes what lies inside: offsets of planned memory, indices of values, the
delegates' graphs. So every program is first run for a few tokens in a process of its own. That process is one for all
programs (it loads the libraries once) and forks for each of them; what happens to the fork is the answer.

    → {"path": …}        a line on the standard input
    ← {"error": null}    or what was wrong, one line on the standard output
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from mossquant.errors import InputError

__all__ = ["Trial", "trial"]

SECONDS = 120
"""How long a few tokens may take; a program that runs longer does not end."""
EXTRA_BYTES = 4 << 30
"""Address space beyond the size of the file (twice: mapped, and packed by XNNPACK) that a program may ask for."""

_POLL_SECONDS = 0.005
_AGAIN = "copy the artifact's folder again, or export again"


class Trial:
    """The process that tries programs. It is started at once and answers when asked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mossquant.targets.executorch.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lock = threading.Lock()
        self._passed: set[tuple[str, str]] = set()
        atexit.register(self.close)

    def run(self, path: Path, sha256: str) -> None:
        """Try a program; one that passed is not tried again.

        Raises:
            InputError: it cannot be loaded or run, or brought its process down.
        """
        key = (str(path), sha256)
        with self._lock:
            if key in self._passed:
                return
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            answer = ""
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"path": str(path.absolute())}) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError("the process that tries .pte programs ended by itself")
            error = json.loads(answer)["error"]
            if error is None:
                self._passed.add(key)
        if error is not None:
            raise InputError(f"{path} cannot be run ({error}); {_AGAIN}")

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@lru_cache(maxsize=1)
def trial() -> Trial:
    """The one process of this process that tries programs."""
    return Trial()


def _serve(requests: IO[str], answers: IO[str]) -> None:
    from mossquant.targets.executorch.packages import runtime

    runtime()
    for line in requests:
        answers.write(json.dumps({"error": _in_a_fork(json.loads(line)["path"])}) + "\n")
        answers.flush()


def _in_a_fork(path: str) -> str | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _run(path)
        except BaseException as error:
            os.write(writing, " ".join(f"{type(error).__name__}: {error}".split()).encode()[:300])
            os._exit(1)
        os._exit(0)
    os.close(writing)
    deadline, status = time.monotonic() + SECONDS, 0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return f"it did not end within {SECONDS} seconds"
        time.sleep(_POLL_SECONDS)
    said = os.read(reading, 4096).decode(errors="replace")
    os.close(reading)
    if os.WIFSIGNALED(status):
        return f"the runtime was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    return None if code == 0 else said or f"the runtime ended with status {code}"


def _run(path: str) -> None:
    """Every method once, on zeros."""
    import torch

    from mossquant.targets.executorch.packages import runtime
    from mossquant.targets.program import METHODS

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + EXTRA_BYTES + 2 * Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    program = runtime().load_program(path)
    for name in METHODS:
        method = program.load_method(name)
        meta = method.metadata
        shapes = [meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs())]
        length = 1 if name == "decode" else 3
        arrays = [torch.zeros((1, length), dtype=torch.int64), *(torch.zeros(tuple(shape)) for shape in shapes[1:])]
        logits, *states = method.execute(arrays)
        expected = [(1, length if name == "score" else 1), *(tuple(shape) for shape in shapes[1:])]
        found = [tuple(logits.shape[:2]), *(tuple(state.shape) for state in states)]
        if found != expected:
            raise ValueError(f"{name} gives arrays of other shapes than it should")
        if not all(bool(torch.isfinite(array).all()) for array in (logits, *states)):
            raise ValueError(f"{name} gives values that are not finite")


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
