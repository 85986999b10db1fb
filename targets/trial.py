# SPDX-License-Identifier: Apache-2.0
"""Tries programs in a child process with limits, before they are loaded into this one.

A damaged program can crash a runtime, and with it the process; a file can be made so that reading it takes all memory.
One child process serves all programs that a process opens, of every target: it loads the libraries once, and for each
program sets limits on address space and time, calls a function of the target, and answers (`mossquant.targets.child`).

    → {"function": "module:name", "path": …, "arguments": {…}, "seconds": …, "bytes": …}
    ← {}, {"refused": a whole message}, or {"failed": what went wrong}

If the child ends instead, by a signal or because the time was over, that is the answer, and the next program gets a new
child. After an error the state of its native code is unknown: if it ends later, the program that it had then is tried
again in a new child.
"""

import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mossquant.errors import InputError
from mossquant.targets.child import Child, serve

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
        answer = {"failed": _ended(child.status or 0, seconds)}
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


_lock = threading.Lock()
_child: Child | None = None
_passed: set[tuple[str, str]] = set()


def _running(function: str) -> Child:
    """The child process, a new one where there is none; it loads what it needs to call this function first."""
    global _child
    if _child is None or _child.status is not None:
        _child = Child("mossquant.targets.trial", function, quiet=True)
    return _child


def _ended(status: int, seconds: float) -> str:
    if status == -signal.SIGALRM:
        return f"it did not end within {seconds:g} seconds"
    if status < 0:
        return f"the runtime was ended by {signal.Signals(-status).name}"
    return f"the runtime ended with status {status}"


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        function = _resolved(request["function"])
        with _limited(request["seconds"], request["bytes"]):
            function(Path(request["path"]), **request["arguments"])
    except InputError:
        raise
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
    serve(_answer, lambda: _resolved(sys.argv[1]))
