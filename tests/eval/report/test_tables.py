# SPDX-License-Identifier: Apache-2.0
"""Tables show the figures of their reports and break no figure in eighty columns."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mossquant.calibration.quantize import quantize
from mossquant.eval.bench import BenchReport, Speed, Timing
from mossquant.eval.compare import compare
from mossquant.eval.info import info
from mossquant.eval.parity import Check, ParityReport
from mossquant.eval.perplexity import perplexity
from mossquant.eval.report import tables
from mossquant.eval.report.plan_tables import plan_tables, recipe_tables
from mossquant.eval.verify import ArtifactVerdict, VerifyReport
from mossquant.targets.weights_report import WeightsReport


def _text(*parts: Any) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    for part in parts:
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    return text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.314e-3, "1.31e-3"), (9.999e-3, "1.00e-2"), (0.0, "0"), (12.0, "1.20e1"), (-2e-16, "-2.00e-16")],
)
def test_scientific(value: float, text: str) -> None:
    assert tables.scientific(value) == text


def test_perplexity(byte_model: Path, text_file: Path) -> None:
    report = perplexity(byte_model, text=text_file)
    text = _text(tables.perplexity_table(report))
    assert f"{report.perplexity:.4f}" in text
    assert f"{report.bits_per_byte:.4f}" in text
    assert "2,999 in one stream" in text
    lost = _text(tables.perplexity_table(replace(report, perplexity=2.7e17)))
    assert "> 10^6; a perplexity above 10^6 is as good as no prediction" in " ".join(lost.split())


def test_routing(byte_model: Path, other_byte_model: Path, text_file: Path) -> None:
    report = compare(byte_model, [other_byte_model, byte_model], text=text_file, routing=True)
    text = _text(*tables.comparison_tables(report))
    assert report.routing is not None
    shift = report.routing[0]
    assert f"{100 * shift.routers[1].overlap:.2f}" in text
    assert text.count("layers.1.mlp.router") == text.count("mean of 2") / 2 == 2
    assert shift.chosen.explained is not None
    assert f"{100 * shift.chosen.explained:.1f}" in text


def test_comparison(byte_model: Path, other_byte_model: Path, text_file: Path) -> None:
    report = compare(byte_model, [other_byte_model, byte_model], text=text_file, max_ppl_increase=-100)
    text = _text(tables.comparison_table(report))
    assert f"{report.baseline.perplexity:.3f}" in text
    assert text.count("above the gate") == 2
    assert f"{report.candidates[0].ppl_increase_pct:+.2f}" in text
    assert "—" in text
    assert "no prediction" not in text
    assert len(tables.comparison_tables(report)) == 1
    lost = replace(report, baseline=replace(report.baseline, perplexity=2.7e17))
    assert "no prediction" in " ".join(_text(tables.comparison_table(lost)).split())


def test_parity() -> None:
    checks = (
        Check("one step: median KL", 3e-13, 1e-7),
        Check("free run: mean KL", 1e-3, 1e-4),
        Check("a figure", 1, None),
        Check("another", 2.7e17, note="not judged: 8 of 16 windows"),
    )
    parity = ParityReport("int4", "onnx", "int8_block", "0" * 64, 1, 1, checks)
    good = ArtifactVerdict("good [red]", WeightsReport("good", 138, 1, ()), None)
    bad = ArtifactVerdict("bad", WeightsReport("bad", 138, 1, ()), parity)
    report = VerifyReport("int4", (good, bad))
    text = _text(tables.parity_table(report))
    assert text.count("FAILED") == 1
    assert "(not judged: 8 of 16" in text
    assert "> 10^6" in text
    assert "good [red]" in text
    assert "not compared: nothing was run" in text
    assert not report.passed
    assert report.failures() == ["bad: free run: mean KL: 0.001, at most 0.0001 is allowed"]
    changed = VerifyReport(
        "int4", (ArtifactVerdict("x", WeightsReport("x", 138, 1, ("w[0, 3] is 5, must be 6",)), None),)
    )
    assert changed.failures() == ["x: w[0, 3] is 5, must be 6"]


def test_bench() -> None:
    speed = Speed(1234.4, 1000.0, 2000.0)
    timing = Timing("tiny", "checkpoint", "bfloat16", "fp32", speed, speed, 12.3, 300.0, 200.0, 8_380_000)
    report = BenchReport({"cpu": "a cpu", "cores": 2}, 1, 20.0, 512, 64, 5, (timing,))
    text = _text(tables.bench_table(report))
    assert "(1000–2000)" in text
    assert "8.38" in text
    assert tables.bandwidth_tables(report) == []
    read = Timing(
        "own", "native", "int4", "int8_block", speed, speed, 1.0, 2.0, 1.0, 7, 73.2, speed, Speed(0.5, 0.4, 0.6)
    )
    text = _text(*tables.bandwidth_tables(replace(report, artifacts=(timing, read))))
    assert "tiny" not in text
    assert all(word in text for word in ("own", "mapped", "73.2", "1234.4", "50"))


def test_info_and_plan(byte_model: Path, tmp_path: Path) -> None:
    ledger = quantize(byte_model, tmp_path / "int4", recipe="int4-uniform")
    text = _text(*tables.info_tables(info(tmp_path / "int4")))
    assert "ssm.expert.dt_proj" in text
    assert "model.safetensors" in text
    text = _text(*plan_tables(ledger))
    assert f"{ledger.predicted_bytes:,}" in text
    assert "kept in float32" in text
    assert _text(*plan_tables(quantize(byte_model, tmp_path / "none", recipe="int4-uniform", dry_run=True)))


def test_recipes() -> None:
    text = _text(*recipe_tables())
    assert "Recipe int4:" in text
    assert "Recipe int8:" in text
