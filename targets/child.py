# SPDX-License-Identifier: Apache-2.0
"""A Python process that answers lines of JSON: for what may bring a process down, or is to be measured alone."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from mossquant.errors import InputError

Answer = dict[str, Any]


class Child:
    """The process, from the side of whoever asks.

    Args:
        module: what runs there; it calls `serve`.
        words: its arguments.
        quiet: whether nothing that it prints is shown.

    Attributes:
        status: its exit status, None until it ended.
        had_errors: whether an answer of it was of "failed".
    """

    def __init__(self, module: str, *words: str, quiet: bool = False) -> None:
        # -P: the folder that the user stands in must not hide the installed package.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            encoding="utf-8",
        )
        self._module = module
        self._ready = self.had_errors = False
        self.status: int | None = None

    def ask(self, order: Mapping[str, Any]) -> Answer | None:
        """Send an order and wait for its answer, None where the process ended over it.

        Raises:
            InputError: the answer is one.
            RuntimeError: the process does not start.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if not self._ready and not self._process.stdout.readline():
                raise RuntimeError(f"the process of {self._module} does not start")
            self._ready = True
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BaseException:
            # Whoever is interrupted leaves an answer behind, which must not be taken for that of the next order.
            self.close()
            raise
        if not line:
            self._process.wait()
            self.close()
            return None
        answer: Answer = json.loads(line)
        if "refused" in answer:
            raise InputError(answer["refused"])
        self.had_errors = self.had_errors or "failed" in answer
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with suppress(BrokenPipeError), self._process:
            self._process.kill()
        self.status = self._process.returncode


def serve(answer: Callable[[Answer], Answer], prepare: Callable[[], object] = lambda: None) -> None:
    """Answer orders until there are no more, a user's mistake with "refused"; any other error ends the process.

    Args:
        answer: makes the answer to an order.
        prepare: called before the first one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for whoever asks, and ends this process
    # Answers have a file of their own, so that nothing that a runtime prints can come between them.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        prepare()
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            try:
                reply = answer(json.loads(line))
            except InputError as error:
                reply = {"refused": str(error)}
            print(json.dumps(reply), file=answers, flush=True)
