# SPDX-License-Identifier: Apache-2.0
"""A program that crashes, hangs or takes all memory does so in the child process, and is refused in one line."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.targets import trial
from mossquant.targets.trial import try_apart

_RUN = "runpy:run_path"  # programs of these tests are scripts

Try = Callable[..., None]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Try]:
    """Tries a script, in a child process of this test's own."""
    monkeypatch.setattr(trial, "_child", None)

    def tried(script: str, name: str = "model", seconds: float = 20, extra_bytes: int = 1 << 28) -> None:
        path = tmp_path / name
        path.write_text(script)
        try_apart(path, script, _RUN, seconds=seconds, extra_bytes=extra_bytes)

    yield tried
    if trial._child is not None:
        trial._child.close()


FAULTS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "the runtime was ended by SIGSEGV",
    "import os; os._exit(3)": "the runtime ended with status 3",
    "1 / 0": "ZeroDivisionError: division by zero",
    "bytearray(1 << 29)": "MemoryError:",
    "import time; time.sleep(60)": "it did not end within 0.5 seconds",
}


def test_a_fault_is_an_error_of_the_input_and_the_next_program_runs(attempt: Try, tmp_path: Path) -> None:
    for script, message in FAULTS.items():
        with pytest.raises(InputError, match=rf"{tmp_path}/model cannot be run \({message}.*; copy the artifact's"):
            attempt(script, seconds=0.5 if "sleep" in script else 20)
        attempt(f"# after {message}")


def test_what_a_reader_refuses_is_said_as_it_is_and_one_process_serves_all(attempt: Try, tmp_path: Path) -> None:
    attempt(f"import os; open({str(tmp_path / 'first')!r}, 'w').write(str(os.getpid()))")
    with pytest.raises(InputError, match=r"^it is damaged$"):
        attempt("from mossquant.errors import InputError\nraise InputError('it is damaged')")
    attempt(f"import os; open({str(tmp_path / 'second')!r}, 'w').write(str(os.getpid()))")
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()
    attempt("bytearray(1 << 29)", extra_bytes=1 << 30)  # limits are a program's own


def test_a_process_that_ends_after_an_error_is_not_held_against_the_next_program(attempt: Try, tmp_path: Path) -> None:
    """Its native code may be in any state; the program is tried again in a new one."""
    once = f"import os; os.mkdir({str(tmp_path / 'once')!r})"
    with pytest.raises(InputError, match="ZeroDivisionError"):
        attempt("1 / 0")
    attempt(f"try:\n    {once}\n    os._exit(3)\nexcept FileExistsError:\n    pass")


def test_what_passed_is_not_tried_again_and_what_did_not_is(attempt: Try, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    for script, times in ((count, 1), (count + "1 / 0", 3)):
        for _ in range(2):
            try:
                attempt(script)
            except InputError:
                assert "/ 0" in script
        assert len((tmp_path / "count").read_text()) == times


def test_a_program_with_odd_characters_that_prints(attempt: Try) -> None:
    attempt("print('{}')", name='a "name"\nof two lines é')


def test_an_interrupted_question_leaves_no_answer_behind(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one program's answer would be taken for that of the next one."""
    attempt("# the child is there")

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    assert trial._child is not None
    with monkeypatch.context() as patched:
        patched.setattr(trial._child._process.stdout, "readline", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            attempt("# good")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        attempt("1 / 0")


def test_a_process_that_does_not_start_is_no_fault_of_the_input(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="does not start"):
        attempt("# good")
