# SPDX-License-Identifier: Apache-2.0
"""Runs the command line in this process, in a forked copy of it, or in one of its own."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from mossquant.cli import main as cli

# -P: the folder that pytest runs in must not hide the installed package.
COMMAND = [sys.executable, "-P", "-m", "mossquant"]


@dataclass(frozen=True)
class Outcome:
    """Exit status, stdout and stderr."""

    status: int
    out: str
    err: str


def command(*words: object, stdin: bytes = b"") -> Outcome:
    """Run a command in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main([str(word) for word in words])
    finally:
        sys.stdin = before
    return Outcome(status, out.getvalue(), err.getvalue())


def refused(folder: Path, *words: object, stdin: bytes = b"") -> str:
    """Run a command that must be refused: status 2, one line on stderr, nothing on stdout, nothing left in `folder`.

    Returns what it says.
    """
    before = tree(folder)
    outcome = command(*words, stdin=stdin)
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("mossquant: "), outcome.err
    assert outcome.err.endswith("\n"), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.removesuffix("\n").isprintable(), outcome.err
    assert "Traceback" not in outcome.err
    assert "did not foresee" not in outcome.err
    assert tree(folder) == before, "something was left behind"
    return outcome.err


def process(*words: object) -> Outcome:
    """Run a command as a user does, in a process of its own."""
    ran = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, check=False)
    return Outcome(ran.returncode, ran.stdout.decode(), ran.stderr.decode())


def forked(*words: object, before: Callable[[], object], killed_after: float | None = None) -> int:
    """Run a command in a forked copy of this process, which first calls `before`; its wait status.

    With `killed_after` it is killed so many seconds later, unless it has ended by then.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # threads of the parent are not there
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                before()
                os._exit(cli.main([str(word) for word in words]))
        finally:
            os._exit(99)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)  # a process that has ended, and was not waited for yet, takes no notice
    return os.waitpid(child, 0)[1]


def started(
    *words: object,
    stdin: int = -1,
    stdout: int = -1,
    stderr: int = -1,
    before: Callable[[], object] = lambda: None,
) -> int:
    """Run the installed command in a forked copy of this process, with these descriptors as its streams; its id.

    A process of its own would import PyTorch first. A descriptor of −1 is /dev/null.
    """
    child = os.fork()
    if child == 0:
        status: object = 99
        try:
            torch.set_num_threads(1)  # threads of the parent are not there
            for number, descriptor in enumerate((stdin, stdout, stderr)):
                os.dup2(os.open(os.devnull, os.O_RDWR) if descriptor < 0 else descriptor, number)
            # What an interpreter opens when it starts; they are closed with the process.
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
            sys.argv = ["mossquant", *map(str, words)]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            cli.run()
        except SystemExit as ended:
            status = ended.code
        finally:
            os._exit(status if isinstance(status, int) else 99)
    return child


def streamed(*words: object, stdout: int = -1, before: Callable[[], object] = lambda: None) -> Outcome:
    """Run the installed command as `started` does, to its end; what it wrote to stderr."""
    reading, writing = os.pipe()
    child = started(*words, stdout=stdout, stderr=writing, before=before)
    os.close(writing)
    with os.fdopen(reading) as errors:
        said = errors.read()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", said)


# Whatever changes the file system, or comes before a change of it.
_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


def die_at(operation: int, folder: Path) -> Callable[[], None]:
    """For a forked child: be killed when that operation on something in `folder` is about to begin."""

    def prepare() -> None:
        begun = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal begun
            if event in _OPERATIONS and str(arguments[0]).startswith(str(folder)):
                begun += 1
                if begun == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return prepare


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """Everything in a folder, hidden files too: name, kind and size."""
    entries = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        entries.append((str(path.relative_to(folder)), status.st_mode, 0 if path.is_dir() else status.st_size))
    return entries


def reading(model: Path, good: Path, text: Path, out: Path) -> Iterator[list[object]]:
    """Every verb that reads a checkpoint, quantized or not, or an artifact."""
    yield ["info", model]
    yield ["export", model, "-o", out]
    yield ["export", model, "--dry-run"]
    yield ["perplexity", model, "--text", text]
    yield ["compare", model, good, "--text", text]
    yield ["compare", good, model, "--text", text]
    yield ["generate", model, "hello", "--max-tokens", 2]


def making(model: Path, out: Path) -> Iterator[list[object]]:
    """Every verb that makes a checkpoint from another."""
    yield ["quantize", model, "-o", out]
    yield ["quantize", model, "--dry-run"]
    yield ["import", model, "-o", out]


def writing(model: Path, text: Path, out: object) -> Iterator[list[object]]:
    """Every verb that writes a folder."""
    yield ["quantize", model, "-o", out]
    yield ["export", model, "-o", out]
    yield ["import", model, "-o", out]
    yield ["train", "--tokenizer", "bytes", "--steps", 1, "--batch", 2, "--window", 8, "--text", text, "-o", out]
