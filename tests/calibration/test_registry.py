# SPDX-License-Identifier: Apache-2.0
"""Solvers by name: what a plan asks for is there, and what was measured reaches who needs it."""

from pathlib import Path

import pytest
import torch

from mossquant.calibration import registry
from mossquant.calibration.nearest import nearest
from mossquant.calibration.quantize import quantize
from mossquant.calibration.solver import Solve, Solver, Statistics
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.formats import NumberFormat

RECIPE = """version: 1
name: weighed
targets: [torch]
weights:
  - {role: "ssm.out_proj", format: int4_g32, solver: SOLVER}
  - {role: "*", keep: stored, why: a test}
activations:
  - {role: "*", format: fp32}
state:
  - {role: "*", format: fp32}
"""


def recipe(folder: Path, solver: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("SOLVER", solver))
    return path


def prepare(number_format: NumberFormat, statistics: Statistics) -> Solve:
    """Rounds what it is given after adding what was measured."""
    gram: torch.Tensor = statistics["gram"]
    return lambda rows: nearest(number_format, rows + gram)


def test_a_solver_is_handed_what_it_needs(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.SOLVERS, "weighed", Solver("weighed", ("gram",), prepare))
    asked: list[str] = []

    def measured(name: str) -> Statistics:
        asked.append(name)
        return {"gram": torch.full((128,), 2.0)}

    ledger = quantize(checkpoint_folder, tmp_path / "out", recipe=recipe(tmp_path, "weighed"), measured=measured)
    solved = [entry.name for entry in ledger.tensors if entry.solver == "weighed"]
    assert asked == solved
    assert len(solved) == 2
    assert float(QuantizedCheckpoint.open(tmp_path / "out").quantized(solved[0]).dequantize().mean()) > 1.5


def test_what_no_solver_can_do_is_said(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.SOLVERS, "weighed", Solver("weighed", ("gram",), prepare))
    with pytest.raises(InputError, match=r"weighed needs gram \(--stats FOLDER"):
        quantize(checkpoint_folder, tmp_path / "out", recipe=recipe(tmp_path, "weighed"))
    unknown = recipe(tmp_path, "dice")
    unknown.write_text(unknown.read_text().replace("weights:", "solver: nearst\nweights:"))
    message = r"recipe\.yaml is not .* line 4: .* 'nearst'; line 6: .* 'dice'\. Known solvers: nearest, nearest-mse"
    with pytest.raises(InputError, match=message):
        quantize(checkpoint_folder, tmp_path / "out", recipe=unknown, dry_run=True)
    with pytest.raises(InputError, match="weighed needs gram of backbone"):
        quantize(checkpoint_folder, tmp_path / "out", recipe=recipe(tmp_path, "weighed"), measured=lambda name: {})
    assert not (tmp_path / "out").exists()
