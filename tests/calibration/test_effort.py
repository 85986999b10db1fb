# SPDX-License-Identifier: Apache-2.0
"""What is told before work begins, and that too little room for it is refused before any of it is done."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
import torch
from memory import grown
from small import CONFIGS, random_model, write_model

from mossquant.calibration import meter
from mossquant.calibration.effort import Pace, choosing, distilling, judging
from mossquant.calibration.meter import Meter, metering_bytes
from mossquant.calibration.quantize import quantize
from mossquant.calibration.sensitivity import sensitivity
from mossquant.checkpoint.open import open_weights
from mossquant.errors import InputError
from mossquant.files import space
from mossquant.text.text import Text

IDS = np.random.default_rng(0).integers(0, 53, 3000)
TEXT = replace(Text.of("random ids", IDS.tobytes()), ids=IDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effort") / "model"
    write_model(folder, random_model(CONFIGS["mamba"], dtype=torch.float32), dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("verb", ["quantize", "sensitivity"])
def test_it_is_told_first_and_refused_where_there_is_no_room(
    verb: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def run() -> None:
        if verb == "quantize":
            quantize(model, tmp_path / "out", text=[TEXT], said=said.append)
        else:
            sensitivity(model, tmp_path / "out.json", text=[TEXT], tokens=256, said=said.append)

    def too_early(*arguments: Any, **more: Any) -> None:
        raise AssertionError("work had begun")

    run()
    assert any(unit in said[0] for unit in ("seconds", "minute"))
    assert "MB of disk" in said[0]
    assert "MB of memory" in said[0]
    monkeypatch.setattr(space, "_available_memory", lambda: 1_000_000)
    monkeypatch.setattr(meter, "load_model", too_early)
    (tmp_path / "out").rename(tmp_path / "before") if verb == "quantize" else (tmp_path / "out.json").unlink()
    with pytest.raises(InputError, match="too little room"):
        run()


def test_more_work_takes_longer(model: Path) -> None:
    pace = Pace(open_weights(model, verb="test"))
    jobs = [(1000, "int4_g32"), (500, "int8")]
    windows = torch.zeros((8, 128), dtype=torch.int64)
    assert (
        0 < choosing(pace, jobs, 1000, windows=None, levels=6) < choosing(pace, 2 * jobs, 1000, windows=None, levels=6)
    )
    assert choosing(pace, jobs, 1000, windows=windows, levels=6) < choosing(pace, jobs, 2000, windows=windows, levels=6)
    assert 0 < judging(pace, 1000, 1) < judging(pace, 1000, 2)
    assert distilling(pace, 1000) > 0
    assert pace.gptq(100, 64) < pace.gptq(100_000, 64)


@pytest.mark.parametrize("from_start", [True, False])
def test_a_meter_takes_what_was_said(from_start: bool, tmp_path: Path) -> None:
    """More tokens than go through a block at once, a vocabulary of which not all logits exist at once."""
    config = replace(CONFIGS["mamba"], hidden_size=128, vocab_size=2048, state_size=16, num_hidden_layers=3)
    weights = open_weights(write_model(tmp_path / "model", random_model(config, dtype=torch.float32)), verb="test")
    windows = torch.from_numpy(IDS[:2560]).repeat(4).view(40, 256)
    said = metering_bytes(weights, windows.numel(), from_start=from_start) + 8 * weights.origin.parameters

    def run() -> None:
        judge = Meter(weights, windows, from_start=from_start)
        judge.kl({spec: 1.01 * judge.model.parameter_of(spec) for spec in weights.specs.values()})

    # No lower bound: what other tests of this process left free in the heap is taken first, and does not show.
    assert grown(run) <= bounds.MEMORY_SAID * said


def test_passes_change_nothing_but_roundings(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = open_weights(model, verb="test")
    windows = torch.from_numpy(IDS[:2000]).view(8, 250)
    found = []
    for values in (1 << 21, 3 * 250 * 40):
        monkeypatch.setattr(meter, "_PASS_VALUES", values)
        judge = Meter(weights, windows)
        changed = {spec: 1.1 * judge.model.parameter_of(spec) for spec in weights.specs.values() if spec.layer == 1}
        found.append(judge.kl(changed))
    assert found[0] == pytest.approx(found[1], rel=bounds.KL_OF_PASSES)


def test_what_is_not_kept_is_computed_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks whose inputs are not kept are reached from an earlier one: the same KL to the bit."""
    weights = open_weights(model, verb="test")
    windows = torch.from_numpy(IDS[:100]).view(2, 50)
    spec = next(spec for spec in reversed(weights.specs.values()) if spec.is_matrix and spec.layer is not None)
    every = Meter(weights, windows)
    changed = {spec: every.model.parameter_of(spec) * 1.1}
    monkeypatch.setattr(meter, "_ENTERING_BYTES", 2 * 4 * windows.numel() * weights.config.hidden_size)
    monkeypatch.setattr(meter, "_LOGITS", 300)
    monkeypatch.setattr(meter, "_COMPARED", 100)
    expected = every.kl(changed)
    assert expected.min() > 0
    for few in (Meter(weights, windows), Meter(weights, windows, from_start=True)):
        assert np.array_equal(few.kl(changed), expected)
