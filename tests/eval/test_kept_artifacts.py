# SPDX-License-Identifier: Apache-2.0
"""Artifacts that an earlier commit wrote open, verify and run: people keep last month's to compare with."""

from pathlib import Path

import numpy as np
import pytest

from mossquant.eval.info import info
from mossquant.eval.open import open_runner
from mossquant.eval.verify import verify
from mossquant.text.text import Text

KEPT = Path(__file__).parents[1] / "fixtures" / "94c55b8"
TEXT = Text.of("text", b"def first(value):\n    return value + 1\n\n\n" * 20)


@pytest.mark.parametrize("name", ["model.onnx", "model.pte"])
def test_a_kept_artifact_opens_verifies_and_runs(name: str) -> None:
    program = KEPT / "artifact" / name
    assert info(program).weights == "int4"
    assert verify(KEPT / "int4", [program], weights_only=True).failures() == []
    assert verify(KEPT / "int4", [program], text=TEXT, positions=20, stream=128, threads=1).failures() == []
    runner = open_runner(program, threads=1)
    logits, _ = runner(np.arange(5)[None], runner.initial_state(), logits="all")
    assert np.isfinite(logits).all()
