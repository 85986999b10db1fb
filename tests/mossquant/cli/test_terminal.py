# SPDX-License-Identifier: Apache-2.0
"""What is shown of long work where stderr is no terminal."""

import subprocess
import sys

import pytest

from mossquant.cli import terminal
from mossquant.cli.terminal import Terminal


def _told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, quiet: bool) -> tuple[str, str]:
    """What 100 units of work print that take a second each."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Terminal(quiet=quiet).bar("lowering") as shown:
        for done in range(1, 101):
            now += 1
            shown("model.pte", done, 100)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_long_work_says_where_it_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = _told(monkeypatch, capsys, quiet=False)
    assert err.splitlines() == [f"lowering model.pte: {done} of 100" for done in range(10, 101, 10)]
    assert out == ""


def test_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _told(monkeypatch, capsys, quiet=True) == ("", "")


def test_what_libraries_print_is_kept_from_the_screen_and_shown_with_an_error() -> None:
    """C++ writes to the descriptor; our own lines are seen meanwhile, and everything is afterwards."""
    script = """
import os, sys, warnings
from mossquant.cli.terminal import Terminal
terminal = Terminal(quiet=False)
with terminal.alone():
    os.write(2, b"noise of a library\\n")
    warnings.warn("noise of Python")
    terminal.say("ours")
try:
    with terminal.alone():
        os.write(2, b"what went before\\n")
        raise RuntimeError("wrong")
except RuntimeError as error:
    assert error.__notes__ == ["what went before"], error.__notes__
os.write(2, b"after\\n")
terminal.say("ours again")
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == "ours\nafter\nours again\n"
