# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of quantize and export: nothing at the output path, or what was there before; the next run mends it all.

The child kills itself at a chosen one of its own file operations, as Python's audit hooks tell them: every operation
is such a point, and the tests go through all of them. Kills from outside fall between them, and inside one.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import COMMAND, command, forked, tree
from small import CONFIGS, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.files.outputs import file_sha256

Words = Callable[[Path], list[object]]

RANDOM_KILLS = 8

# Whatever changes the file system, or comes before a change of it.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlsym")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few and small tensors: each test runs it some dozens of times."""
    return write_model(tmp_path_factory.mktemp("models") / "mamba", random_model(CONFIGS["mamba"], dtype=torch.float32))


@pytest.fixture(scope="module", params=["quantize", "export", "export full precision"])
def words(request: pytest.FixtureRequest, source: Path) -> Words:
    """A command that writes to a path."""
    if request.param != "export":
        return lambda out: [request.param.split()[0], source, "-o", out]
    quantized = source.with_name("quantized")
    quantize(source, quantized)
    return lambda out: ["export", quantized, "-o", out]


@pytest.fixture(scope="module")
def whole(words: Words, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes. It also imports what the command needs, before anything is forked."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert command(*words(out)).status == 0
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def die_at(operation: int) -> Callable[[], None]:
    """In the child: be killed when that operation is about to begin."""

    def prepare() -> None:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return prepare


def operations(words: list[object], folder: Path) -> int:
    """How many operations an uninterrupted run of the command makes."""
    told = folder / "operations"

    def prepare() -> None:
        count = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and not told.exists():
                count += 1

        sys.addaudithook(watch)
        exit_now = os._exit

        def tell(status: int) -> None:
            told.write_text(str(count))
            exit_now(status)

        os._exit = tell  # type: ignore[assignment]

    assert forked(*words, before=prepare) == 0
    found = int(told.read_text())
    told.unlink()
    return found


def test_killed_at_every_operation(words: Words, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    count = operations(words(out), tmp_path)
    shutil.rmtree(out)
    assert count > 20
    left = 0
    for operation in range(1, count + 1):
        status = forked(*words(out), before=die_at(operation))
        assert os.WIFSIGNALED(status), f"the run ended before operation {operation} of {count}"
        if out.exists():
            assert digests(out) == whole, f"operation {operation} left a part"
            shutil.rmtree(out)
        left = max(left, len(list(tmp_path.iterdir())))
        assert left <= 2, "leftovers pile up"
    assert left >= 1, "the killed runs should have got as far as their hidden folder"
    assert command(*words(out)).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the next run removes what was left"
    assert digests(out) == whole


def test_killed_while_it_replaces(words: Words, whole: dict[str, str], source: Path, tmp_path: Path) -> None:
    """With --force what was there before stays, whole, until the new one stands in its place."""
    out, other = tmp_path / "out", tmp_path / "other"
    quantize(source, other, recipe="int8")
    before = digests(other)
    shutil.copytree(other, out)
    count = operations([*words(out), "--force"], tmp_path)
    assert digests(out) == whole
    random.seed(1)
    for operation in sorted(random.sample(range(1, count + 1), 8)) + list(range(count - 12, count + 1)):
        shutil.rmtree(out)
        shutil.copytree(other, out)
        status = forked(*words(out), "--force", before=die_at(operation))
        assert os.WIFSIGNALED(status)
        assert digests(out) in (before, whole), f"operation {operation} of {count} left a part"
    assert command(*words(out), "--force").status == 0
    assert digests(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_killed_at_random_moments(words: Words, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = time.perf_counter()
    assert forked(*words(out), before=lambda: None) == 0
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    random.seed(2)
    killed = 0
    for _ in range(RANDOM_KILLS):
        status = forked(*words(out), before=lambda: None, killed_after=random.uniform(0, seconds))
        killed += os.WIFSIGNALED(status)
        if out.exists():
            assert digests(out) == whole
            shutil.rmtree(out)
        assert len(list(tmp_path.iterdir())) <= 2
    assert killed >= 1
    assert command(*words(out)).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(out) == whole


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_a_process_that_is_killed(verb: str, source: Path, tmp_path: Path) -> None:
    """As a user would: a process of its own, killed as soon as its hidden folder is seen; then the same command."""
    words = [*COMMAND, verb, str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and all(path.name.endswith("-probe") for path in tmp_path.iterdir()):
            time.sleep(0.0005)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert tree(tmp_path), "the killed run should have got as far as its hidden folder"
    assert command(verb, source, "-o", tmp_path / "out").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert command(verb, source, "-o", tmp_path / "whole").status == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
