# SPDX-License-Identifier: Apache-2.0
"""What is done with a damaged folder: the public functions, and what must hold where one accepts it."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mossquant
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.generate import continue_text
from mossquant.eval.open import open_model
from mossquant.eval.report.tables import info_tables
from mossquant.files.outputs import json_bytes

_TOKENS = 24


@dataclass(frozen=True)
class Place:
    """Where a case runs: the damaged folder (or recipe), the good ones, and where outputs may be written."""

    damaged: Path
    samples: Path
    outputs: Path

    @property
    def text(self) -> Path:
        return self.samples / "text.txt"

    @property
    def out(self) -> Path:
        return self.outputs / "out"


Action = Callable[[Place], None]


def info(place: Place) -> None:
    report = mossquant.info(place.damaged)
    json_bytes(report.to_json())
    assert info_tables(report)


def run(place: Place) -> None:
    runner = mossquant.open_runner(place.damaged, threads=1)
    vocabulary = runner.info.vocab_size
    state = runner.initial_state(2)
    logits, state = runner(np.arange(10).reshape(2, 5) % vocabulary, state, logits="all")
    assert logits.shape == (2, 5, vocabulary)
    logits, state = runner(np.zeros((2, 1), np.int64), state)
    assert logits.shape == (2, 1, vocabulary)


def run_one(place: Place) -> None:
    """One stream, which is all that some programs take: a step, a piece, and a piece longer than one call."""
    runner = mossquant.open_runner(place.damaged, threads=1)
    vocabulary, state = runner.info.vocab_size, runner.initial_state(1)
    for length in (1, 5, 150):
        logits, state = runner(np.arange(length)[None] % vocabulary, state, logits="all")
        assert logits.shape == (1, length, vocabulary)


def perplexity(place: Place) -> None:
    report = mossquant.perplexity(place.damaged, text=place.text, tokens=_TOKENS, threads=1)
    assert math.isfinite(report.nats_per_token)
    json_bytes(report.to_json())


def perplexity_planned(place: Place) -> None:
    report = mossquant.perplexity(place.damaged, text=place.text, tokens=_TOKENS, threads=1, activations="planned")
    assert math.isfinite(report.nats_per_token)


def compare(place: Place) -> None:
    good = place.samples / "checkpoint"
    report = mossquant.compare(good, [place.damaged], text=place.text, tokens=_TOKENS, threads=1)
    json_bytes(report.to_json())


def compare_base(place: Place) -> None:
    report = mossquant.compare(place.damaged, [place.samples / "quantized"], text=place.text, tokens=_TOKENS, threads=1)
    json_bytes(report.to_json())


def write_text(place: Place) -> None:
    model = open_model(place.damaged, threads=1)
    for prompt in ("def größe(", ""):
        found = continue_text(model.runner, model.tokenizer, prompt, max_tokens=4, temperature=0.7)
        assert len(found.tokens) <= 4
        found.text.encode()


def dry_run(place: Place) -> None:
    mossquant.quantize(place.damaged, place.out, dry_run=True)


def quantize(place: Place) -> None:
    mossquant.quantize(place.damaged, place.out, recipe="int4-uniform")
    QuantizedCheckpoint.open(place.out)
    shutil.rmtree(place.out)


def export(place: Place) -> None:
    artifact = mossquant.export(place.damaged, place.out)
    runner = mossquant.open_runner(artifact.folder, threads=1)
    runner(np.zeros((1, 3), np.int64), runner.initial_state(1))
    shutil.rmtree(place.out)


def import_mamba(place: Place) -> None:
    mossquant.import_mamba(place.damaged, place.out)
    assert Checkpoint.open(place.out).origin
    shutil.rmtree(place.out)


def verify_artifact(place: Place) -> None:
    """Against the checkpoint that it was made from."""
    source = place.samples / ("quantized" if place.damaged.name.startswith("artifact") else "checkpoint")
    json_bytes(mossquant.verify(source, [place.damaged], weights_only=True).to_json())


def verify_source(place: Place) -> None:
    """The damaged checkpoint against the good artifact."""
    artifact = place.samples / ("artifact" if place.damaged.name.startswith("quantized") else "external")
    json_bytes(mossquant.verify(place.damaged, [artifact], weights_only=True).to_json())


def recipe_dry_run(place: Place) -> None:
    plan = mossquant.quantize(
        place.samples / "checkpoint", place.out, recipe=place.damaged / "recipe.yaml", dry_run=True
    )
    json_bytes(plan.to_json())


def recipe_quantize(place: Place) -> None:
    mossquant.quantize(place.samples / "checkpoint", place.out, recipe=place.damaged / "recipe.yaml")
    QuantizedCheckpoint.open(place.out)
    shutil.rmtree(place.out)


def use_statistics(place: Place) -> None:
    good, recipe = place.samples / "checkpoint", place.samples / "gptq.yaml"
    mossquant.quantize(good, place.out, recipe=recipe, stats=place.damaged)
    QuantizedCheckpoint.open(place.out)
    shutil.rmtree(place.out)


ACTIONS: dict[str, tuple[Action, ...]] = {
    "checkpoint": (
        info, run, perplexity, compare, compare_base, write_text, dry_run, quantize, export, import_mamba,
        verify_source,
    ),
    "quantized": (
        info, run, perplexity, perplexity_planned, compare, compare_base, write_text, export, verify_source,
    ),
    "program": (info, run, perplexity, compare, compare_base, write_text, verify_artifact),
    "stream": (info, run_one, perplexity, compare, compare_base, write_text, verify_artifact),
    "source": (import_mamba,),
    "recipe": (recipe_dry_run, recipe_quantize),
    "statistics": (use_statistics,),
}  # fmt: skip
"""What can be done with each kind of folder."""
