# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: results to stdout, progress, notes and complaints to stderr.

Nothing is read as markup. Where stdout is no terminal, tables get the width that they need, so that nothing is broken
in a file or a pipe; `COLUMNS` says otherwise. Once the reader of a pipe has gone (`| head`) results go nowhere, and the
verb goes on: what it writes is whole, and its exit status is its own.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mossquant.errors import printable

_PIPED_WIDTH = 10_000
_SECONDS_A_LINE = 10
_NOISE = 2000
"""Bytes of what libraries printed that an error takes along."""


class ReaderGone(Exception):
    """Whoever read the text that is being generated has gone: there is no use in going on."""


class Terminal:
    """stdout and stderr as they are when it starts.

    Args:
        quiet: no progress and no notes.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.start(quiet=quiet)

    def start(self, *, quiet: bool) -> None:
        """Take stdout and stderr as they are now."""
        self._out, self._err, self._quiet = _Plain(stderr=False), _Plain(stderr=True), quiet

    def show(self, *parts: RenderableType) -> None:
        """Print results: tables, and lines of text, which are never broken."""
        for part in parts:
            if isinstance(part, str):
                self._out.print(printable(part), soft_wrap=True)
            else:
                self._out.print(part, crop=False)

    def say(self, line: str) -> None:
        """Print a note, unless quiet."""
        if not self._quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """Print a line that matters also where nothing else is wanted: why a gate failed."""
        self._err.print(printable(line), soft_wrap=True)

    def complain(self, message: str) -> None:
        """Print the one line of an error."""
        sys.stderr.write(f"mossquant: {printable(message)}\n")

    def write(self, piece: str) -> None:
        """Print a piece of a text that is being generated. Raises `ReaderGone`."""
        try:
            sys.stdout.write(piece)
            sys.stdout.flush()
        except BrokenPipeError:
            drop_stdout()
            raise ReaderGone from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep what libraries print to the standard error, C++ included, from the screen; an error takes it along.

        It concerns the whole process. What this terminal prints goes where it went before.
        """
        with ExitStack() as until_done:
            try:
                before = os.dup(2)
                until_done.callback(os.close, before)
                noise = until_done.enter_context(tempfile.TemporaryFile())
            except OSError:  # there is no standard error, or no room: nothing is kept from it
                yield
                return
            if _descriptor(sys.stderr) == 2:
                self._err.file = until_done.enter_context(
                    os.fdopen(os.dup(before), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors)
                )
            os.dup2(noise.fileno(), 2)
            try:
                yield
            except Exception as error:
                noise.seek(max(0, noise.seek(0, os.SEEK_END) - _NOISE))
                if said := noise.read().decode(errors="replace").strip():
                    error.add_note(said)
                raise
            finally:
                os.dup2(before, 2)
                self._err.file = sys.stderr

    @contextmanager
    def bar(self, what: str = "") -> Iterator[Callable[[str, int, int], None]]:
        """Progress, as a function of (name of what is being worked on, done, all): a bar on a terminal, a line now and
        then elsewhere.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = self._quiet or not self._err.is_terminal
        with Progress(*columns, console=self._err, transient=True, disable=hidden) as progress:
            task = progress.add_task(what, total=None)
            told = time.monotonic()

            def shown(name: str, done: int, total: int) -> None:
                nonlocal told
                text = f"{what} {name}".strip()
                progress.update(task, completed=done, total=total, description=text)
                if not self._err.is_terminal and time.monotonic() - told >= _SECONDS_A_LINE:
                    told = time.monotonic()
                    self.say(f"{text}: {done} of {total}")

            yield shown


class _Plain(Console):
    """A console for plain text."""

    def __init__(self, *, stderr: bool) -> None:
        stream = sys.stderr if stderr else sys.stdout
        known = "COLUMNS" in os.environ or (stream is not None and stream.isatty())
        width = None if known else _PIPED_WIDTH
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)

    def on_broken_pipe(self) -> None:
        """Be silent from now on."""
        self.quiet = True
        drop_stdout()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # what stands in its place has none
        return None


def drop_stdout() -> None:
    """Send what is still to be printed nowhere: else Python complains about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line(*words: str | Path) -> str:
    """A command to try next, for a shell."""
    return shlex.join(["mossquant", *map(str, words)])


terminal = Terminal()
"""Where all verbs print."""
