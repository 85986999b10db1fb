# SPDX-License-Identifier: Apache-2.0
"""Models much larger than the memory that working on them may take; disks that fill up on the way."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import bounds
import pytest
import torch
from commands import forked, refused
from lowered import read_back as verify
from memory import grown
from small import random_model, write_model

from mossquant.calibration.calibrate import calibrate
from mossquant.calibration.quantize import memory_bytes, quantize
from mossquant.calibration.statistics import Statistics
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.info import info
from mossquant.model.config import MossNetConfig
from mossquant.plan.recipe import Recipe
from mossquant.targets.export import export, export_needs
from mossquant.targets.onnx import save

ROOT = Path(__file__).parents[1]
MANY = MossNetConfig(vocab_size=256, hidden_size=256, num_hidden_layers=40, time_step_rank=16)
"""68 MB in fp32, of tensors of 1 MB at most."""
WIDE = MossNetConfig(vocab_size=1 << 16, hidden_size=256, num_hidden_layers=1, time_step_rank=16)
"""A table of 67 MB in fp32, and little else."""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("large") / "many", random_model(MANY, dtype=torch.float32))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("large") / "wide", random_model(WIDE, dtype=torch.float32))


SLOW = pytest.mark.slow
RECIPES = [pytest.param("int8-uniform", marks=SLOW), "int4-uniform"]
"""What recipes share is in `make test` once."""


@pytest.fixture(params=["shards", pytest.param("one file", marks=SLOW)])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tensor files are written; sizes that would take a large model are made small."""
    if request.param == "shards":
        for module in ("mossquant.checkpoint.tensorfiles", "mossquant.calibration.quantize"):
            monkeypatch.setattr(f"{module}.ONE_FILE_BYTES", 1 << 20)
            monkeypatch.setattr(f"{module}.SHARD_BYTES", 1 << 20)
    return str(request.param)


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantizing_takes_what_was_said(many: Path, tmp_path: Path, layout: str, recipe: str) -> None:
    plan = quantize(many, tmp_path / "out", recipe=recipe, dry_run=True)
    said = memory_bytes(plan)
    if layout == "shards":
        assert said < plan.stored_bytes / 2, "a bound that the whole model would keep is none"
    assert grown(lambda: quantize(many, tmp_path / "out", recipe=recipe)) <= said
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (layout == "shards")


@SLOW
def test_calibrating_takes_what_was_said(many: Path, tmp_path: Path) -> None:
    """However deep the model is; what waits lies on disk here."""
    shallow = write_model(tmp_path / "shallow", random_model(replace(MANY, num_hidden_layers=2), dtype=torch.float32))
    text, lines, peaks = tmp_path / "text.txt", tmp_path / "lines", []
    text.write_bytes(bytes(range(32, 127)) * 50)

    def said(line: str) -> None:
        with lines.open("a") as file:
            file.write(line + "\n")

    for model in (shallow, many):
        lines.unlink(missing_ok=True)
        output = tmp_path / f"statistics-{model.name}"
        peaks.append(grown(partial(calibrate, model, output, text=[text], tokens=4096, memory=0, said=said)))
        about = re.search(r"about ([0-9,]+) MB of memory", lines.read_text())
        assert about is not None
        assert peaks[-1] <= 1e6 * (int(about[1].replace(",", "")) + 1)
    assert peaks[1] <= 1.15 * peaks[0]
    recipe, stats = tmp_path / "gptq.yaml", tmp_path / "statistics-shallow"
    recipe.write_text(Recipe.named("int4-uniform").text.replace("solver: nearest-mse", "solver: gptq"))
    plan = quantize(shallow, tmp_path / "out", recipe=recipe, stats=stats, dry_run=True)
    room = memory_bytes(plan) + Statistics.open(stats, open_weights(shallow, verb="look")).memory_bytes
    assert grown(partial(quantize, shallow, tmp_path / "out", recipe=recipe, stats=stats)) <= room


@pytest.mark.parametrize("recipe", [pytest.param(None, marks=SLOW), *RECIPES])
def test_exporting_takes_what_was_said(
    many: Path, tmp_path: Path, recipe: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1 << 20)
    source = many
    if recipe is not None:
        source = tmp_path / "quantized"
        quantize(many, source, recipe=recipe)
    said = export_needs(source)
    peak = grown(lambda: export(source, tmp_path / "out"))
    assert (tmp_path / "out" / save.DATA).is_file()
    assert peak <= said.memory_bytes < 2 * 17e6 * 4 / 2, "about half of the model in fp32"


def test_exporting_to_native_takes_what_was_said(many: Path, tmp_path: Path) -> None:
    quantize(many, tmp_path / "quantized", recipe="int4-uniform")
    said = export_needs(tmp_path / "quantized", target="native")
    peak = grown(lambda: export(tmp_path / "quantized", tmp_path / "out", target="native"))
    assert peak <= said.memory_bytes < 2 * 17e6 * 4 / 2, "about half of the model in fp32"
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= said.disk_bytes


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_large_tensor_is_looked_at_in_pieces(
    wide: Path, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1 << 20)
    quantized, artifact = tmp_path / "quantized", tmp_path / "artifact"
    quantize(wide, quantized, recipe=recipe)
    assert grown(lambda: QuantizedCheckpoint.open(quantized)) <= bounds.OPEN_BYTES
    assert grown(lambda: info(quantized)) <= bounds.OPEN_BYTES
    codes = WIDE.vocab_size * WIDE.hidden_size
    assert grown(lambda: export(quantized, artifact)) <= bounds.EXPORT_CODES * codes + bounds.OPEN_BYTES
    assert grown(lambda: verify(quantized, artifact)) <= bounds.VERIFY_CODES * codes + bounds.OPEN_BYTES
    native = tmp_path / "native"
    room = bounds.EXPORT_CODES * codes + bounds.OPEN_BYTES
    assert grown(lambda: export(quantized, native, target="native")) <= room
    assert grown(lambda: verify(quantized, native)) <= room


def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossquant.checkpoint.tensorfiles.ONE_FILE_BYTES", 10_000)
    monkeypatch.setattr("mossquant.checkpoint.tensorfiles.SHARD_BYTES", 20_000)
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 10_000)


@pytest.mark.parametrize("verb", [pytest.param("quantize", marks=SLOW), "export"])
def test_a_disk_that_fills_up_at_any_file(
    verb: str, checkpoint_folder: Path, quantized_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit on the size of a file stands in for it: shards, external weights and all other files."""
    small_files(monkeypatch)
    words = [verb, checkpoint_folder if verb == "quantize" else quantized_folder, "-o", place / "out"]
    assert forked(*words, before=lambda: None) == 0
    files = {path.name: path.stat().st_size for path in (place / "out").iterdir()}
    assert any(name.startswith("model-00002") or name == save.DATA for name in files)
    for path in (place / "out").iterdir():
        path.unlink()
    (place / "out").rmdir()
    for size in sorted(set(files.values())):
        status = forked(*words, before=lambda size=size: limit(size - 1))
        assert os.waitstatus_to_exitcode(status) == 2, (size, files)
        assert list(place.iterdir()) == []


def limit(size: int) -> None:
    """No file of this process may grow above it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_too_little_memory_is_said_before_work(
    verb: str, checkpoint_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mossquant.files.space._available_memory", lambda: 1_000_000)
    said = refused(place, verb, checkpoint_folder, "-o", place / "out")
    assert "MB of memory, and 1.0 MB are available" in said


@SLOW
def test_every_step_on_a_checkpoint_of_350_mb(tmp_path: Path) -> None:
    """In processes of their own, as `bench/large.py` measures the large one: under the same bar."""
    measured = tmp_path / "measured.json"
    words = ["--preset", "8x200m", "--gigabytes", "0.35", "--folder", tmp_path / "files", "--json", measured]
    subprocess.run([sys.executable, "-P", ROOT / "bench" / "large.py", *words], check=True)
    report = json.loads(measured.read_text())
    assert len(report["steps"]) == 12
    for step in report["steps"]:
        assert step["peak_bytes"] <= report["bound_bytes"], step
