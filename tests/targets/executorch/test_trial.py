# SPDX-License-Identifier: Apache-2.0
"""A program that brings the runtime down, hangs or gives nonsense does so apart, and is refused in one line."""

import os
import shutil
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowered import Lowered

from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.release import release
from mossquant.targets.executorch import ExecutorchRunner, trial
from mossquant.targets.executorch.flatbuffer import Budget, root
from mossquant.targets.executorch.lower import CHUNK
from mossquant.targets.executorch.metadata import read_metadata
from mossquant.targets.executorch.packages import EXECUTORCH
from mossquant.targets.executorch.program_file import ProgramFile
from mossquant.targets.executorch.trial import try_apart
from mossquant.targets.program import METHODS

SEEDS = 600
"""Single bytes that are changed until one passes our checks and ends the runtime; about one in a hundred does."""


@pytest.fixture
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process and a cache of this test's own."""
    found = trial._Process()
    monkeypatch.setattr(trial, "_process", lambda: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield found
    found.close()


def test_a_faithful_program_passes_and_is_tried_once(int4: Lowered, own_process: Any, tmp_path: Path) -> None:
    sha256 = file_sha256(int4.program)
    try_apart(int4.program, sha256)
    assert [path.name for path in (tmp_path / "cache/mossquant/ran").iterdir()] == [
        f"{sha256}-executorch-{EXECUTORCH}-mossquant-{release()}"
    ]
    own_process.close()
    try_apart(int4.program, sha256)


def test_a_cache_that_cannot_be_written(int4: Lowered, own_process: Any, tmp_path: Path) -> None:
    """The program is tried every time, and that is all."""
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        try_apart(int4.program, file_sha256(int4.program))


def test_a_program_that_ends_the_runtime(int4: Lowered, tmp_path: Path) -> None:
    """Found by trying; it is a user's error here, and the next program runs."""
    whole, path = int4.program.read_bytes(), tmp_path / "model.pte"
    methods = ProgramFile(int4.program).program_bytes
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        data = bytearray(whole)
        data[random.integers(methods)] ^= int(random.integers(1, 256))
        path.write_bytes(data)
        try:
            file = ProgramFile(path)
            read_metadata(file)
            assert file.methods.keys()
        except InputError:
            continue
        message = ""
        try:
            ExecutorchRunner(path)
        except InputError as error:
            message = str(error)
        if "the runtime was ended by SIG" in message:
            break
    assert message.startswith(f"{path} cannot be run (the runtime was ended by SIG")
    assert message.endswith("copy the artifact's folder again, or export again")
    runner = ExecutorchRunner(int4.program)
    runner(int4.tokens(1, 3), runner.initial_state(1))


def test_every_method_is_tried_short_and_long_with_the_first_and_last_row(
    int4: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, list[list[int]]] = {name: [] for name in METHODS}
    load = trial.load_method

    def spied(program: Any, name: str) -> Any:
        method = load(program, name)

        class Spy:
            method_meta = method.method_meta

            def __call__(self, arrays: list[torch.Tensor]) -> Any:
                given[name].append(arrays[0][0].tolist())
                return method(arrays)

        return Spy()

    monkeypatch.setattr(trial, "load_method", spied)
    monkeypatch.setattr("resource.setrlimit", lambda *limit: None)
    trial._run(str(int4.program))
    lengths = {name: [len(tokens) for tokens in calls] for name, calls in given.items()}
    assert lengths == {"prefill": [3, CHUNK], "score": [3, CHUNK], "decode": [1]}
    last = int4.config.vocab_size - 1
    assert given["decode"] == [[last]]
    assert all((tokens[0], tokens[-1]) == (last, 0) for tokens in given["prefill"] + given["score"])


def test_a_table_of_one_row(int4: Lowered, tmp_path: Path) -> None:
    """The runtime would look behind it."""
    data, path, rows = bytearray(int4.program.read_bytes()), tmp_path / "model.pte", int4.config.vocab_size
    changed = 0
    for plan in root(memoryview(bytes(data)), b"ET12", Budget()).tables(1):
        for value in plan.tables(2):
            kind, tensor = value.union(1)
            sizes = tensor.numbers(2, "<i4") if kind == 5 and tensor is not None else np.empty(0)
            if len(sizes) == 2 and sizes[0] == rows and tensor is not None and tensor.number(5):
                place = tensor._at(2)
                assert place is not None
                struct.pack_into("<i", data, place + struct.unpack_from("<I", data, place)[0] + 4, 1)
                changed += 1
    assert changed == 3 * 2, "codes and scales, in three methods"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"decode has no table of {rows} rows"):
        ExecutorchRunner(path)


def test_a_program_that_gives_no_numbers(int4: Lowered, tmp_path: Path) -> None:
    data, path = bytearray(int4.program.read_bytes()), tmp_path / "model.pte"
    norm = next(one for one in ProgramFile(int4.program).methods["decode"].constants if one.shape == (64,)).tobytes()
    data[data.find(norm) : data.find(norm) + len(norm)] = np.full(64, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"cannot be run .*gives values that are not finite"):
        ExecutorchRunner(path)


def test_a_program_that_does_not_end(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.2)
    monkeypatch.setattr(trial, "_run", lambda path: time.sleep(60))
    before = time.monotonic()
    found = trial._in_a_fork(str(int4.program))
    assert found == "it did not end within 0.2 seconds"
    assert time.monotonic() - before < 30


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: os.kill(os.getpid(), signal.SIGKILL), "the runtime was ended by SIGKILL"),
        (lambda path: os._exit(3), "the runtime ended with status 3"),
        (lambda path: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda path: bytearray(1 << 50), "MemoryError:"),
        (lambda path: None, None),
    ],
)
def test_what_a_fork_says(monkeypatch: pytest.MonkeyPatch, fault: object, message: str | None) -> None:
    monkeypatch.setattr(trial, "_run", fault)
    assert trial._in_a_fork("model.pte") == message


def test_a_process_that_was_killed_is_noticed(int4: Lowered, own_process: Any) -> None:
    """Nothing is loaded untried because nobody answers."""
    own_process._process.kill()
    own_process._process.wait()
    with pytest.raises(RuntimeError, match=r"the process that tries \.pte programs ended by itself"):
        try_apart(int4.program, file_sha256(int4.program))


def test_a_path_with_odd_characters(int4: Lowered, own_process: Any, tmp_path: Path) -> None:
    path = tmp_path / 'a "name"\nof two lines é.pte'
    shutil.copy(int4.program, path)
    try_apart(path, file_sha256(path))


def test_an_interrupted_question_leaves_no_answer_behind(
    int4: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the good program's answer would be taken for that of the next one, which is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    process = trial._Process()
    monkeypatch.setattr(trial, "_process", lambda: process)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(process._process.stdout, "readline", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            try_apart(int4.program, file_sha256(int4.program))
    nonsense = tmp_path / "nonsense.pte"
    nonsense.write_bytes(b"nonsense")
    process = trial._Process()
    with pytest.raises(InputError, match="cannot be run"):
        try_apart(nonsense, file_sha256(nonsense))
    process.close()
