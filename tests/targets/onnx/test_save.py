# SPDX-License-Identifier: Apache-2.0
"""How a program reaches the disk: the library's bytes, and never more room than was said before."""

import re
import shutil
from pathlib import Path

import pytest
from lowered import Workshop

from mossquant.errors import InputError
from mossquant.files import space
from mossquant.targets.export import export, export_needs
from mossquant.targets.onnx import save as saving
from mossquant.targets.onnx.open import open_program


@pytest.mark.parametrize("recipe", [None, "int8", "int4"])
@pytest.mark.parametrize("above", [0, 10**9], ids=["weights beside", "weights inside"])
@pytest.mark.parametrize("model", ["wide", "mamba48"])
def test_room_and_bytes(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, above: int, recipe: str | None
) -> None:
    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", above)
    checkpoint = workshop.checkpoint(model, recipe)
    program = export(checkpoint, tmp_path / "out").program("onnx")
    assert sum(path.stat().st_size for path in program.parent.iterdir()) <= export_needs(checkpoint).disk_bytes
    assert program.read_bytes() == open_program(program).proto.SerializeToString()


def test_too_little_room_is_said_before_work(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, checkpoint = shutil.disk_usage(tmp_path), workshop.checkpoint("wide", "int4")
    done: list[object] = []
    monkeypatch.setattr(space, "_available_memory", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = f"{re.escape(str(tmp_path))} has 0.0 MB free; making it takes"
    with pytest.raises(InputError, match=said):
        export(checkpoint, tmp_path / "out", progress=lambda *step: done.append(step))
    assert done == []
    assert list(tmp_path.iterdir()) == []
