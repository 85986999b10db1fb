# SPDX-License-Identifier: Apache-2.0
"""A program that brings the runtime down or gives nonsense does so in a child process, and is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept import KEPT_PTE

from mossquant.errors import InputError
from mossquant.targets.executorch import first_run
from mossquant.targets.executorch.lower import CHUNK
from mossquant.targets.executorch.open import open_program
from mossquant.targets.executorch.program_file import ProgramFile
from mossquant.targets.executorch.runner import ExecutorchRunner
from mossquant.targets.program import METHODS

CRASH_AT, CRASH_BITS = 48124, 120
"""One changed byte that passes our reader and ends ExecuTorch 1.4.1; one in some hundreds does."""


def test_a_program_that_ends_the_runtime(tmp_path: Path) -> None:
    """It is a user's error here, and the next program runs."""
    data, path = bytearray(KEPT_PTE.read_bytes()), tmp_path / "model.pte"
    data[CRASH_AT] ^= CRASH_BITS
    path.write_bytes(data)
    open_program(path)
    with pytest.raises(InputError, match=r"model\.pte cannot be run \(the runtime was ended by SIG.*export again$"):
        ExecutorchRunner(path)
    runner = ExecutorchRunner(KEPT_PTE)
    runner(np.zeros((1, 3), np.int64), runner.initial_state(1))


def test_every_method_is_tried_short_and_long_with_the_first_and_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[list[int]]] = {name: [] for name in METHODS}
    load = first_run.load_method

    def spied(program: Any, name: str) -> Any:
        method = load(program, name)

        class Spy:
            method_meta = method.method_meta

            def __call__(self, arrays: list[torch.Tensor]) -> Any:
                calls[name].append(arrays[0][0].tolist())
                return method(arrays)

        return Spy()

    monkeypatch.setattr(first_run, "load_method", spied)
    first_run.run(KEPT_PTE, METHODS)
    lengths = {name: [len(tokens) for tokens in given] for name, given in calls.items()}
    assert lengths == {"prefill": [3, CHUNK], "score": [3, CHUNK], "decode": [1]}
    assert calls["decode"] == [[287]]
    assert all((tokens[0], tokens[-1]) == (287, 0) for tokens in calls["prefill"] + calls["score"])


def test_a_program_that_gives_no_numbers(tmp_path: Path) -> None:
    data, path = bytearray(KEPT_PTE.read_bytes()), tmp_path / "model.pte"
    norm = next(one for one in ProgramFile(KEPT_PTE).methods["decode"].constants if one.shape == (32,)).tobytes()
    data[data.find(norm) : data.find(norm) + len(norm)] = np.full(32, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match="gives values that are not finite"):
        first_run.run(path, METHODS)
