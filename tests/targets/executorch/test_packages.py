# SPDX-License-Identifier: Apache-2.0
"""What libraries print is kept from the terminal, and nothing else is."""

import os
import threading
from pathlib import Path

import pytest

from mossquant.targets.executorch.packages import quiet


def _standard_error() -> tuple[int, int]:
    found = os.fstat(2)
    return found.st_dev, found.st_ino


def test_noise_is_shown_with_an_error_and_only_then(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        os.write(2, b"noise of a library\n")

    def wrong() -> None:
        with quiet():
            os.write(2, b"what went before\n")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as caught:
        wrong()
    assert capfd.readouterr().err == ""
    assert caught.value.__notes__ == ["what went before"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_quiet_parts_inside_one_another_and_in_threads(tmp_path: Path) -> None:
    before = _standard_error()
    first_in, second_in = threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            first_in.set()
            second_in.wait(10)

    def second() -> None:
        first_in.wait(10)
        with quiet(), quiet():
            second_in.set()
            thread.join(10)
            assert _standard_error() != before

    thread, other = threading.Thread(target=first), threading.Thread(target=second)
    thread.start()
    other.start()
    other.join(10)
    assert _standard_error() == before
