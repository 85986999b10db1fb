# SPDX-License-Identifier: Apache-2.0
"""Artifacts that an earlier commit wrote open, verify and run: people keep last month's to compare with."""

from pathlib import Path

import numpy as np
import pytest
from kept import KEPT, KEPT_ONNX, KEPT_PTE

from mossquant.eval.info import info
from mossquant.eval.open import open_runner
from mossquant.eval.verify import verify
from mossquant.text.text import Text

TEXT = Text.of("text", b"def first(value):\n    return value + 1\n\n\n" * 20)


@pytest.mark.parametrize("program", [KEPT_ONNX, KEPT_PTE], ids=["onnx", "executorch"])
def test_a_kept_artifact_opens_verifies_and_runs(program: Path) -> None:
    assert info(program).weights == "int4"
    assert verify(KEPT / "int4", [program], weights_only=True).failures() == []
    assert verify(KEPT / "int4", [program], text=TEXT, positions=20, stream=128, threads=1).failures() == []
    runner = open_runner(program, threads=1)
    logits, _ = runner(np.arange(5)[None], runner.initial_state(), logits="all")
    assert np.isfinite(logits).all()
