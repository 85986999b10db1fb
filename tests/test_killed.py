# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of quantize and export: nothing at the output path, or what was there before; the next run mends it all.

The child kills itself at a chosen one of its own file operations beside the output, as Python's audit hooks tell them:
every operation is such a point, and the tests go through all of them.
"""

import os
import random
import shutil
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from commands import command, die_at, forked
from small import CONFIGS, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.files.outputs import file_sha256
from mossquant.plan.recipe import Recipe

RECOVERED = 150 * 128
"""A step of recovery is one window of 128 tokens here, and each hundredth is kept."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few and small tensors: each test runs it some dozens of times."""
    return write_model(tmp_path_factory.mktemp("models") / "mamba", random_model(CONFIGS["mamba"], dtype=torch.float32))


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    folder = source.with_name("quantized")
    quantize(source, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_killed_at_every_operation(verb: str, source: Path, quantized: Path, tmp_path: Path) -> None:
    words = [verb, source if verb == "quantize" else quantized]
    assert command(*words, "-o", tmp_path / "whole").status == 0
    whole, place = digests(tmp_path / "whole"), tmp_path / "place"
    place.mkdir()
    out, left = place / "out", 0
    for operation in count(1):
        if not os.WIFSIGNALED(forked(*words, "-o", out, before=die_at(operation, place))):
            break
        if out.exists():
            assert digests(out) == whole, f"operation {operation} left a part"
            shutil.rmtree(out)
        left = max(left, len(list(place.iterdir())))
    assert operation > 10
    assert left == 1, "the killed runs should have got as far as their hidden folder, and leftovers do not pile up"
    assert [path.name for path in place.iterdir()] == ["out"], "the next run removes what was left"
    assert digests(out) == whole


def test_killed_while_it_replaces(source: Path, quantized: Path, tmp_path: Path) -> None:
    """With --force what was there before stays whole, or is gone when the new one is about to stand in its place."""
    assert command("export", quantized, "-o", tmp_path / "whole").status == 0
    assert command("export", source, "-o", tmp_path / "other").status == 0
    whole, before = digests(tmp_path / "whole"), digests(tmp_path / "other")
    out, seen = tmp_path / "place" / "out", []
    for operation in count(1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "other", out)
        status = forked("export", quantized, "-o", out, "--force", before=die_at(operation, out.parent))
        stored = digests(out) if out.exists() else {}
        assert stored in (before, whole, {}), f"operation {operation} left a part"
        seen.append(stored)
        if not os.WIFSIGNALED(status):
            break
    assert seen.count({}) == 1, "between two renamings, and no longer"
    assert stored == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_quantize_on_text_is_killed_at_25_random_times_and_resumed(tmp_path: Path) -> None:
    """Losses, a walk with gptq, and recovery with its snapshots: the same bytes, and nothing else is left."""
    config = replace(CONFIGS["experts"], vocab_size=256, hidden_size=32)
    model = write_model(tmp_path / "model", random_model(config, dtype=torch.float32), dtype=torch.bfloat16)
    chosen = random.Random(17)
    (tmp_path / "a.txt").write_bytes(bytes(chosen.choices(b"abcdefgh \n", k=6000)))
    recipe = Recipe.named("int4-best").text.replace("recover: 1000000", f"recover: {RECOVERED}")
    (tmp_path / "best.yaml").write_text(recipe)
    words = ["quantize", model, "-r", tmp_path / "best.yaml", "--budget", "9bpw", "--text", tmp_path / "a.txt"]
    words += ["--threads", 1, "--force", "-o"]
    began = time.monotonic()
    assert command(*words, tmp_path / "whole").status == 0
    seconds, whole = time.monotonic() - began, digests(tmp_path / "whole")
    assert QuantizedCheckpoint.open(tmp_path / "whole").plan.calibrated.recovered_tokens == RECOVERED  # type: ignore[union-attr]
    (place := tmp_path / "place").mkdir()
    kills = resumed = 0
    while kills < 25:
        killed = os.WIFSIGNALED(
            forked(*words, place / "out", before=lambda: None, killed_after=chosen.uniform(0, seconds))
        )
        kills += killed
        resumed += (place / "out.recovering.safetensors").exists()
        if killed:
            assert command(*words, place / "out").status == 0
        assert digests(place / "out") == whole
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place / "out")
    assert resumed > 0, "some runs should have been killed after a snapshot"
