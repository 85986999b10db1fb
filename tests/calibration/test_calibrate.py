# SPDX-License-Identifier: Apache-2.0
"""Statistics against their definition, token by token; rounds, resuming, processes; and what is refused."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from commands import command, die_at, forked, refused
from small import CONFIGS, SMALL, random_model, write_model
from torch import Tensor

from mossquant.calibration.calibrate import HELD_OUT, calibrate
from mossquant.calibration.quantize import quantize
from mossquant.calibration.statistics import Statistics, symmetric, triangle
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.routing import Routing
from mossquant.plan.recipe import Recipe
from mossquant.text.text import Text

WINDOW = 24
RECIPE = Recipe.named("int4-uniform").text.replace("solver: nearest-mse", "solver: gptq")


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 tokens, three at a time, five in the first round; child processes that are forked have them too."""
    for name, size in (("WINDOW", WINDOW), ("PASS_WINDOWS", 3), ("FIRST_ROUND", 5)):
        monkeypatch.setattr(f"mossquant.calibration.calibrate.{name}", size)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts of both kinds. Not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    return write_model(folder, random_model(CONFIGS["experts"], dtype=torch.float32))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of thirteen windows and a half."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(5).integers(0, SMALL.vocab_size, 13 * WINDOW + WINDOW // 2))
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def reading_order(ids: Path) -> list[Tensor]:
    """The windows in the order in which they are read."""
    tokens = torch.from_numpy(np.load(ids))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).tolist()
    return [tokens[WINDOW * i : WINDOW * (i + 1)] for i in order]


class Defined:
    """Σ g² x xᵀ by the definition, for every linear of a float64 model, one token after the other."""

    def __init__(self, model: MossNet) -> None:
        self._model = model
        self.moments: dict[str, Tensor] = {}
        self.gates: dict[str, list[float]] = {}
        self._routing: dict[str, Routing] = {}

    def reroute(self, name: str, routing: Routing) -> Routing:
        self._routing[name.removesuffix(".router")] = routing
        return routing

    def observe(self, names: Sequence[str], x: Tensor, rows: Tensor | None, gates: Tensor | None, out: Tensor) -> None:
        (name,) = names
        gate_of = torch.ones(len(x), dtype=x.dtype)
        if rows is not None:
            block = ".".join(name.split(".")[1:4])
            expert = int(name.split(".")[5]) if ".experts." in name else 0
            gate_of = self._routing[block].dense()[rows, expert]
        for row, gate in zip(x, gate_of, strict=True):
            assert float(gate) > 0
            # The input of dt_proj holds the gate already.
            acted = row if name.endswith("dt_proj.weight") else row * gate
            self.moments[name] = self.moments.get(name, 0) + torch.outer(acted, acted)
            self.gates.setdefault(name, []).append(float(gate))

    def read(self, windows: Sequence[Tensor]) -> None:
        for window in windows:
            self._model(window[None], run=Forward(scan="sequential", observe=self.observe, reroute=self.reroute))


@pytest.mark.parametrize("kind", CONFIGS)
def test_moments_are_those_of_the_definition(kind: str, ids: Path, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind])
    source = write_model(tmp_path / "model", model)
    found = calibrate(source, tmp_path / "out", text=[Text.from_ids(ids)], quota=1e6)
    assert found.manifest.tokens == 13 * WINDOW
    windows, defined, held = reading_order(ids), Defined(model), Defined(model)
    defined.read([window for i, window in enumerate(windows) if i % HELD_OUT != 1])
    held.read([window for i, window in enumerate(windows) if i % HELD_OUT == 1])
    readers = dict(found._inputs)
    linears = [name for name, spec in open_weights(source, verb="look").specs.items() if spec.site is not None]
    assert readers.keys() == set(linears)
    for name in linears:
        record, hessian = found.records[readers[name].name], found.measured(name)["hessian"]
        gates = torch.tensor(defined.gates.get(name, []), dtype=torch.float64)
        assert record.tokens == len(gates)
        squares = float(gates.square().sum())
        assert record.squares == pytest.approx(squares, rel=bounds.STATISTICS_FLOAT32)
        assert hessian.effective == record.effective
        assert record.effective * float((gates**4).sum()) == pytest.approx(squares**2, rel=bounds.STATISTICS_FLOAT32)
        if len(gates) == 0:
            assert not hessian.mean.any()
            continue
        exact = defined.moments[name]
        scale = float(exact.abs().max())
        difference = float((hessian.mean * record.squares - exact).abs().max())
        assert difference <= bounds.STATISTICS_FLOAT32 * scale, name
        # The sketch has as many rows as columns here, each of them with the length of the held-out inputs on average.
        length = float(held.moments[name].trace()) if name in held.moments else 0.0
        rows = len(hessian.sketch)
        assert float(hessian.sketch.square().sum()) == pytest.approx(rows * length, rel=0.7), name


def test_the_sum_does_not_depend_on_passes_and_rounds(
    experts: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = calibrate(experts, tmp_path / "few", text=[Text.from_ids(ids)], memory=0)
    monkeypatch.setattr("mossquant.calibration.calibrate.PASS_WINDOWS", 1)
    monkeypatch.setattr("mossquant.calibration.calibrate.FIRST_ROUND", 100)
    once = calibrate(experts, tmp_path / "once", text=[Text.from_ids(ids)])
    for name in few._inputs:
        one, two = (found.measured(name)["hessian"].mean for found in (few, once))
        assert float((one - two).abs().max()) <= bounds.STATISTICS_FLOAT32 * float(one.abs().max())


def test_reading_ends_with_the_quota(experts: Path, ids: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = calibrate(experts, tmp_path / "out", text=[Text.from_ids(ids)], quota=0.1, said=lines.append)
    assert found.manifest.tokens == 5 * WINDOW
    assert not found.shortfalls
    assert "MB of disk" in lines[0]
    assert not (tmp_path / "out.calibrating").exists()
    more = calibrate(experts, tmp_path / "more", text=[Text.from_ids(ids)], quota=1e6, tokens=7 * WINDOW + 3)
    assert more.manifest.tokens == 7 * WINDOW
    assert len(more.shortfalls) == len(more.manifest.inputs)


def test_one_token(experts: Path, ids: Path, tmp_path: Path) -> None:
    """Every expert is starved or was never chosen: nothing fails, and the ledger names it."""
    found = calibrate(experts, tmp_path / "out", text=[Text.from_ids(ids)], tokens=1)
    assert found.manifest.tokens == 1
    (tmp_path / "gptq.yaml").write_text(RECIPE)
    ledger = quantize(experts, tmp_path / "quantized", recipe=tmp_path / "gptq.yaml", stats=tmp_path / "out")
    notes = {entry.name: entry.note or "" for entry in ledger.tensors if entry.solver == "gptq"}
    assert all(notes.values())
    # Of either kind two of four experts in two layers: x_proj (dt_proj is kept: 3 columns fill no group), w1, w3, w2.
    assert sum("no calibration text reached it" in note for note in notes.values()) == 2 * (2 * 1 + 2 * 3)
    assert sum("1 of " in note for note in notes.values()) >= 2
    opened = QuantizedCheckpoint.open(tmp_path / "quantized")
    assert opened.plan == ledger
    assert opened.manifest.text.calibration == found.manifest.text
    outcome = command(
        "quantize", experts, "-o", tmp_path / "cli", "-r", tmp_path / "gptq.yaml", "--stats", found.folder
    )
    assert outcome.status == 0
    assert "no calibration text reached it: nearest-mse" in outcome.out
    assert digests(tmp_path / "cli") == digests(tmp_path / "quantized")


def test_a_model_in_fp16_with_outliers(ids: Path, tmp_path: Path) -> None:
    model = random_model(CONFIGS["experts"], dtype=torch.float32)
    layer = next(model.blocks)
    layer.norm[3] = 1e4
    source = write_model(tmp_path / "model", model, dtype=torch.float16)
    found = calibrate(source, tmp_path / "out", text=[Text.from_ids(ids)])
    assert all(bool(found.measured(name)["hessian"].mean.isfinite().all()) for name in found._inputs)
    (tmp_path / "gptq.yaml").write_text(RECIPE)
    ledger = quantize(source, tmp_path / "quantized", recipe=tmp_path / "gptq.yaml", stats=tmp_path / "out")
    assert all((entry.relative_error or 0) < 0.3 for entry in ledger.tensors)


def test_the_verb(experts: Path, ids: Path, tmp_path: Path) -> None:
    model = shutil.copytree(experts, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "a.txt").write_text("abc" * 100)
    said = refused(tmp_path, "calibrate", model, "-o", tmp_path / "out", "--text", tmp_path / "a.txt")
    assert "has no tokenizer" in said
    assert config["vocab_size"] == SMALL.vocab_size
    byte_level = replace(SMALL, vocab_size=256)
    model = write_model(tmp_path / "bytes", random_model(byte_level, dtype=torch.float32))
    report = tmp_path / "report.json"
    words = ["calibrate", model, "-o", tmp_path / "out", "--text", tmp_path / "a.txt", "--json", report]
    outcome = command(*words, "--tokens", 100, "--memory", 1, "--threads", 1)
    assert outcome.status == 0
    assert "want more, and the text or --tokens is used up" in outcome.err
    assert "layers.1.mixer.x_proj.input" in outcome.out
    assert "lacks text" in outcome.out
    assert json.loads(report.read_text())["tokens"] == 96
    shown = command("info", tmp_path / "out", "--json", report)
    assert (shown.status, shown.err) == (0, "")
    tables, (use,) = outcome.out.splitlines()[:-1], outcome.out.splitlines()[-1:]
    assert shown.out.splitlines()[-len(tables) :] == tables
    assert use.startswith(f"{tmp_path / 'out'}: use it")
    facts, stored = shown.out[: -len("\n".join(tables))], json.loads(report.read_text())
    assert stored["kind"] == "statistics"
    for name in ("config.json", "model.safetensors"):
        assert f"{name} {file_sha256(model / name)[:12]}" in facts
    assert f"SHA-256 {file_sha256(tmp_path / 'a.txt')}" in facts
    assert f"{(tmp_path / 'out' / 'statistics.safetensors').stat().st_size:,} bytes" in facts
    lacking = [entry for entry in stored["inputs"] if entry["effective"] < entry["needed"]]
    assert re.search(rf"lacking text +{len(lacking)}\b", facts)
    assert "holds statistics and no model" in refused(tmp_path, "perplexity", tmp_path / "out")
    assert command(*words, "--force").status == 0
    assert "exists already" in refused(tmp_path, *words)


def test_refusals(experts: Path, ids: Path, tmp_path: Path) -> None:
    text = [Text.from_ids(ids)]
    found = calibrate(experts, tmp_path / "out", text=text, quota=0)
    other = write_model(tmp_path / "other", random_model(CONFIGS["experts"], seed=3, dtype=torch.float32))
    (tmp_path / "gptq.yaml").write_text(RECIPE)
    words = ["quantize", "-r", tmp_path / "gptq.yaml", "-o", tmp_path / "quantized"]
    assert "statistics of another model than" in refused(tmp_path, *words, other, "--stats", found.folder)
    assert "gptq needs hessian and rows (--stats FOLDER" in refused(tmp_path, *words, experts)
    (tmp_path / "empty").mkdir()
    assert "holds no statistics" in refused(tmp_path, *words, experts, "--stats", tmp_path / "empty")
    quantize(experts, tmp_path / "int4")
    assert "not statistics" in refused(tmp_path, *words, experts, "--stats", tmp_path / "int4")
    with pytest.raises(InputError, match="is quantized; give the full-precision model"):
        calibrate(open_weights(tmp_path / "int4", verb="look"), tmp_path / "again", text=text)
    damaged = shutil.copytree(found.folder, tmp_path / "damaged")
    content = bytearray((damaged / "statistics.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "statistics.safetensors").write_bytes(content)
    assert "another SHA-256" in refused(tmp_path, *words, experts, "--stats", damaged)
    (tmp_path / "again.calibrating").mkdir()
    (tmp_path / "again.calibrating" / "mine").touch()
    with pytest.raises(InputError, match="was left by another run, or is none of ours"):
        calibrate(experts, tmp_path / "again", text=text)
    with pytest.raises(InputError, match="tokens must be at least 1"):
        calibrate(experts, tmp_path / "again", text=text, tokens=0)


def test_triangles() -> None:
    matrix = torch.randn(7, 7, dtype=torch.float64)
    matrix += matrix.T.clone()
    assert torch.equal(symmetric(triangle(matrix), 7), matrix)
    assert triangle(matrix).shape == (28,)


def killed_and_resumed(points: Sequence[float], tmp_path: Path) -> None:
    """Calibrate, killed at these shares of its file operations, one after the other; then to the end."""
    config: MossNetConfig = replace(SMALL, vocab_size=256)
    model = write_model(tmp_path / "model", random_model(config, dtype=torch.float32))
    (tmp_path / "a.txt").write_bytes(bytes(random.Random(1).choices(range(32, 127), k=20 * WINDOW)))
    words = ["calibrate", model, "--text", tmp_path / "a.txt", "--threads", 1, "-o"]
    assert command(*words, tmp_path / "whole").status == 0
    place = tmp_path / "place"
    place.mkdir()
    out, every = place / "out", 0
    while os.WIFSIGNALED(forked(*words, out, before=die_at(every + 40, place))):
        every += 40  # how many there are, by steps of forty; what is left is gone on from
    assert every > 40
    for point in points:
        for left in place.iterdir():
            shutil.rmtree(left)
        at = 1 + int(point * every)
        assert os.WIFSIGNALED(forked(*words, out, before=die_at(at, place)))
        assert not out.exists()
        outcome = command(*words, out)
        assert outcome.status == 0, outcome
        assert digests(out) == digests(tmp_path / "whole"), f"killed at operation {at}"
        assert [path.name for path in place.iterdir()] == ["out"]


def test_killed_and_resumed(tmp_path: Path) -> None:
    killed_and_resumed((0.1, 0.5, 0.9), tmp_path)


@pytest.mark.slow
def test_killed_at_25_points_and_resumed(tmp_path: Path) -> None:
    chosen = random.Random(17)
    killed_and_resumed([chosen.random() for _ in range(25)], tmp_path)


_WORKER = """import sys
from mossquant.calibration import calibrate as module
from mossquant.text.text import Text
module.WINDOW, module.PASS_WINDOWS, module.FIRST_ROUND = 24, 3, 5
module.calibrate(sys.argv[1], sys.argv[2], text=[Text.from_ids(sys.argv[3])], threads=1)
"""


@pytest.mark.slow
def test_two_processes_equal_one(experts: Path, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(_WORKER)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, tmp_path / "worker.py", experts, tmp_path / "two", ids], check=True)
    one = calibrate(experts, tmp_path / "one", text=[Text.from_ids(ids)], threads=1)
    two = Statistics.open(tmp_path / "two", open_weights(experts, verb="look"))
    assert not (tmp_path / "two.calibrating").exists()
    for record, other in zip(one.manifest.inputs, two.manifest.inputs, strict=True):
        assert (record.name, record.tokens) == (other.name, other.tokens)
        assert other.effective == pytest.approx(record.effective, rel=bounds.PROCESSES_FLOAT64)
    for name in one._inputs:
        first, second = (found.measured(name)["hessian"] for found in (one, two))
        for a, b in ((first.mean, second.mean), (first.sketch, second.sketch)):
            assert float((a - b).abs().max()) <= bounds.PROCESSES_FLOAT64 * max(float(a.abs().max()), 1e-30)
    (tmp_path / "gptq.yaml").write_text(RECIPE)
    for name in ("one", "two"):
        quantize(experts, tmp_path / f"q-{name}", recipe=tmp_path / "gptq.yaml", stats=tmp_path / name)
    left, right = (QuantizedCheckpoint.open(tmp_path / f"q-{name}") for name in ("one", "two"))
    for entry in left.plan.tensors:
        if entry.format is not None:
            assert torch.equal(left.quantized(entry.name).codes, right.quantized(entry.name).codes)
