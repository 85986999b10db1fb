# SPDX-License-Identifier: Apache-2.0
"""Runs a .pte apart, before it is loaded here: a damaged program can bring the runtime down, and with it the process.

The runtime checks the outer flatbuffer and believes what lies inside: offsets of planned memory, indices of values, the
delegates' graphs. So every program is first run, few tokens and as many as it takes, in a process of its own. That
process is one for all programs (it loads the libraries once) and forks for each of them; what happens to the fork is
the answer. A program that passed is noted by its hash in the user's cache ($XDG_CACHE_HOME or ~/.cache, mossquant/ran)
and not tried again.

    → {"path": …}        a line on the standard input
    ← {"error": null}    or what was wrong, one line on the standard output
"""

import atexit
import json
import math
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

import torch

from mossquant.errors import InputError
from mossquant.release import release
from mossquant.targets.executorch.packages import EXECUTORCH, load_method, load_program, load_runtime
from mossquant.targets.program import METHODS

__all__ = ["try_apart"]

SECONDS = 120.0
"""How long loading a program and all calls may take; one that runs longer does not end."""
EXTRA_BYTES = 1 << 30
"""Address space that a program may ask for, beyond four times its file: mapped, and packed for each method."""

_POLL_SECONDS = 0.005
_FEW = 3
_AGAIN = "copy the artifact's folder again, or export again"


def try_apart(path: Path, sha256: str) -> None:
    """Run a program apart, unless it passed before.

    Args:
        path: the .pte.
        sha256: its hash.

    Raises:
        InputError: it cannot be loaded or run, or brought its process down.
    """
    name = f"{sha256}-executorch-{EXECUTORCH}-mossquant-{release()}"
    # Without a place to read and write, it is tried every time.
    with suppress(OSError, RuntimeError):
        if (_cache() / name).is_file():
            return
    error = _process().ask(path)
    if error is not None:
        raise InputError(f"{path} cannot be run ({error}); {_AGAIN}")
    with suppress(OSError, RuntimeError):
        _cache().mkdir(parents=True, exist_ok=True)
        (_cache() / name).touch()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mossquant" / "ran"


class _Process:
    """The process that tries programs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mossquant.targets.executorch.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, path: Path) -> str | None:
        """What is wrong with a program, None if it passes."""
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            answer = ""
            try:
                with suppress(BrokenPipeError):
                    self._process.stdin.write(json.dumps({"path": str(path.absolute())}) + "\n")
                    self._process.stdin.flush()
                    answer = self._process.stdout.readline()
            except BaseException:
                # Whoever is interrupted leaves an answer behind, which must not be taken for the next program's.
                self.close()
                _forget()
                raise
            if not answer:
                self.close()
                _forget()
                raise RuntimeError("the process that tries .pte programs ended by itself")
            found: str | None = json.loads(answer)["error"]
            return found

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@lru_cache(maxsize=1)
def _process() -> _Process:
    return _Process()


_forget = _process.cache_clear


def _serve(requests: IO[str], answers: IO[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for whoever asked; it ends this process
    load_runtime()
    for line in requests:
        answers.write(json.dumps({"error": _in_a_fork(json.loads(line)["path"])}) + "\n")
        answers.flush()


def _in_a_fork(path: str) -> str | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # Should this process's own end before: a program that does not come back from C++ is ended by the system.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(SECONDS) + 1)
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
    """Every method, on few tokens and on as many as it takes, from the table's first row to its last, and on zeros."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + EXTRA_BYTES + 4 * Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    program = load_program(path)
    for name in METHODS:
        method = load_method(program, name)
        meta = method.method_meta()
        (_, longest), *shapes = (meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs()))
        vocabulary = meta.output_tensor_meta(0).sizes()[-1]
        for length in sorted({min(_FEW, longest), longest}):
            tokens = torch.linspace(vocabulary - 1, 0, length, dtype=torch.float64).long()[None]
            logits, *states = method([tokens, *(torch.zeros(tuple(shape)) for shape in shapes)])
            expected = [(1, length if name == "score" else 1), *map(tuple, shapes)]
            found = [tuple(logits.shape[:2]), *(tuple(state.shape) for state in states)]
            if found != expected:
                raise ValueError(f"{name} gives arrays of other shapes than it should")
            if not all(bool(torch.isfinite(array).all()) for array in (logits, *states)):
                raise ValueError(f"{name} gives values that are not finite")


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
