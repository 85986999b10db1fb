# SPDX-License-Identifier: Apache-2.0
"""Tries programs in a child process with limits, before they are loaded into this one.

A damaged program can crash a runtime, and with it the process; a file can be made so that reading it takes all memory.
One child process serves all programs that a process opens, of every target: it loads the libraries once, and for each
program sets limits on address space and time, calls a function of the target, and answers with one line.

    → {"function": "module:name", "path": …, "arguments": {…}, "seconds": …, "bytes": …}
    ← {}, {"refused": a whole message}, or {"failed": what went wrong}

If the child ends instead, by a signal or because the time was over, that is the answer, and the next program gets a new
child. After an error the state of its native code is unknown: if it ends later, the program that it had then is tried
again in a new child.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mossquant.errors import InputError

__all__ = ["EXTRA_BYTES", "SECONDS", "accept", "passed", "start", "try_apart"]

SECONDS = 120.0
"""How long loading a program and all calls may take; one that runs longer does not end."""
EXTRA_BYTES = 1 << 30
"""Address space that a program may ask for, beyond four times its files: mapped, and packed for each method."""

_AGAIN = "copy the artifact's folder again, or export again"


def try_apart(
    path: Path,
    sha256: str,
    function: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
    extra_bytes: int = EXTRA_BYTES,
) -> None:
    """Call a function with a program in the child process, unless this process did so before and it passed.

    Args:
        path: the program.
        sha256: what tells it from others.
        function: "module:name"; called with the path and the arguments.
        arguments: of the function, as JSON holds them.
        seconds: the time that it may take.
        extra_bytes: address space that it may take above the child's own.

    Raises:
        InputError: as the function; any other error of it, a crash, or the time was over.
        RuntimeError: the child process cannot be started.
    """
    if (function, sha256) in _passed:
        return
    request = {
        "function": function,
        "path": str(path.absolute()),
        "arguments": dict(arguments or {}),
        "seconds": seconds,
        "bytes": extra_bytes,
    }
    with _lock:
        child = _running(function)
        answer = child.ask(request)
        if answer is None and child.had_errors:
            child = _running(function)
            answer = child.ask(request)
    if answer is None:
        answer = {"failed": _ended(child.status, seconds)}
    if "refused" in answer:
        raise InputError(answer["refused"])
    if "failed" in answer:
        raise InputError(f"{path} cannot be run ({answer['failed']}); {_AGAIN}")
    _passed.add((function, sha256))


def start(function: str, sha256: str) -> None:
    """Let the child process load what it needs to call a function with a program, while this one does other work."""
    with _lock:
        if (function, sha256) not in _passed:
            _running(function)


def passed() -> list[tuple[str, str]]:
    """What this process tried and passed, (function, SHA-256): for `accept` in a process that it starts."""
    return sorted(_passed)


def accept(tried: Iterable[tuple[str, str]]) -> None:
    """Take what passed in the process that started this one as passed here too."""
    _passed.update((function, sha256) for function, sha256 in tried)


class _Child:
    """The child process.

    Attributes:
        had_errors: whether a program failed in it.
        status: its exit status, once it ended.
    """

    def __init__(self, function: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mossquant.targets.trial", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ready = self.had_errors = False
        self.status = 0
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, str] | None:
        """The answer to a request, None where the process ended over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer: dict[str, str] | None = None
        try:
            if not self._ready and not self._process.stdout.readline():
                raise RuntimeError("the process that tries programs does not start")
            self._ready = True
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line) if line else None
        except BaseException:
            # Whoever is interrupted leaves an answer behind, which must not be taken for the next program's.
            self.close()
            raise
        if answer is None:
            self.status = self._process.wait()
            self.close()
        elif "failed" in answer:
            self.had_errors = True
        return answer

    def close(self) -> None:
        """End the process."""
        global _child
        if _child is self:
            _child = None
        atexit.unregister(self.close)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


_lock = threading.Lock()
_child: _Child | None = None
_passed: set[tuple[str, str]] = set()


def _running(function: str) -> _Child:
    global _child
    if _child is None:
        _child = _Child(function)
    return _child


def _ended(status: int, seconds: float) -> str:
    if status == -signal.SIGALRM:
        return f"it did not end within {seconds:g} seconds"
    if status < 0:
        return f"the runtime was ended by {signal.Signals(-status).name}"
    return f"the runtime ended with status {status}"


def _serve(function: str) -> None:
    """Answer requests until there are no more; the first of them will be for this function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for whoever asked, and ends this process
    # Answers have a file of their own, so that nothing that a runtime prints can come between them.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        with suppress(ImportError, InputError):  # said where it is called
            _resolved(function)
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line))) + "\n")
            answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        function = _resolved(request["function"])
        with _limited(request["seconds"], request["bytes"]):
            function(Path(request["path"]), **request["arguments"])
    except InputError as error:
        return {"refused": str(error)}
    except BaseException as error:
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {}


def _resolved(function: str) -> Callable[..., None]:
    module, _, name = function.partition(":")
    resolved: Callable[..., None] = getattr(import_module(module), name)
    return resolved


@contextmanager
def _limited(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Time, after which the process is ended by the system (native code does not come back to be asked), and memory.

    The soft limit can be raised again for the next program.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + extra_bytes if before[1] == resource.RLIM_INFINITY else min(used + extra_bytes, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


if __name__ == "__main__":
    _serve(sys.argv[1])
