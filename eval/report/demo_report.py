# SPDX-License-Identifier: Apache-2.0
"""What the demo found: the original, and what recipes made of it, as a checkpoint in PyTorch, .onnx, .pte and .moss."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mossquant.eval.bench import BenchReport, Timing
from mossquant.eval.compare import Candidate, ComparisonReport
from mossquant.eval.generate import Generation
from mossquant.eval.report.grid import DASH, grid, left, right
from mossquant.eval.report.tables import scaled, scientific
from mossquant.formats.dtypes import SHORT_NAMES


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        model: "original, bf16", or the recipe; empty where it is the one of the line above.
        form: what was run: "checkpoint" (in PyTorch), ".onnx", ".pte" or ".moss".
        perplexity: on the held-out tokens.
        candidate: how it compares with the original; None for the original itself.
        file_bytes: on disk, without the tokenizer.
        bits_per_weight: 8 · bytes stored for the weights ÷ parameters.
        timing: its speed.
    """

    model: str
    form: str
    perplexity: float
    candidate: Candidate | None
    file_bytes: int
    bits_per_weight: float
    timing: Timing


@dataclass(frozen=True)
class DemoReport:
    """What `demo` found.

    Attributes:
        comparison: the original against every quantized checkpoint and every program.
        bench: the same, timed, the original first.
        original_bytes: bytes of the original's tensor file.
        checkpoints: folders of the quantized checkpoints, by recipe.
        artifacts: programs by recipe, then by target; "original" is the full-precision one.
        prompt: what was continued.
        generation: the continuation by the last recipe's .onnx.
        picture: the table as a picture.
    """

    comparison: ComparisonReport
    bench: BenchReport
    original_bytes: int
    checkpoints: dict[str, Path]
    artifacts: dict[str, dict[str, Path]]
    prompt: str
    generation: Generation
    picture: Path

    def rows(self) -> list[DemoRow]:
        """The table's lines: for each model the checkpoint, then its programs."""
        base = self.comparison.baseline
        candidates = {candidate.path: candidate for candidate in self.comparison.candidates}
        timed = {timing.path: timing for timing in self.bench.artifacts}
        rows = []
        for model, programs in self.artifacts.items():
            if model in self.checkpoints:
                rows.append(_row(model, "checkpoint", candidates[str(self.checkpoints[model])], timed))
            else:
                name = f"{model}, {SHORT_NAMES.get(base.weights, base.weights)}"
                timing, bits = timed[base.path], base.bits_per_weight
                rows.append(DemoRow(name, "checkpoint", base.perplexity, None, self.original_bytes, bits, timing))
            rows += [_row("", program.suffix, candidates[str(program)], timed) for program in programs.values()]
        return rows

    def closing(self) -> list[str]:
        """What stands below the table: paths, what the smallest artifact writes, what to try next."""
        recipe = list(self.checkpoints)[-1]
        checkpoint, smallest = self.checkpoints[recipe], self.artifacts[recipe]
        program, command = smallest["onnx"], _command()
        programs = [path for of_model in self.artifacts.values() for path in of_model.values()]
        return [
            "",
            f"The {recipe} .onnx continues {self.prompt!r}:",
            "",
            *(f"    {line}" for line in (self.prompt + self.generation.text).splitlines()),
            "",
            "Written:",
            *(f"    {path}" for path in [*self.checkpoints.values(), *programs, self.picture]),
            "",
            "Try next:",
            f'    {command} generate {program} "def main(" --temperature 0.8 --max-tokens 64',
            f"    {command} info {program}",
            f"    {command} verify {checkpoint} {' '.join(map(str, smallest.values()))}",
            f"    {command} quantize YOUR-MODEL --recipe {recipe} --text YOUR-TEXT -o YOUR-MODEL-int4",
        ]

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "version": 1,
            "comparison": self.comparison.to_json(),
            "bench": self.bench.to_json(),
            "prompt": self.prompt,
            "continuation": self.generation.text,
        }


def demo_table(report: DemoReport) -> Table:
    """What the demo ends with: the original and what each recipe made of it, as checkpoint, .onnx, .pte and .moss."""
    rows = [
        (
            row.model,
            row.form,
            f"{row.perplexity:.3f}",
            DASH if row.candidate is None else _with_margin(row.candidate),
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.timing.prefill_tok_s.median:.0f}/{row.timing.decode_tok_s.median:.0f}",
        )
        for row in report.rows()
    ]
    machine = report.bench.machine
    caption = (
        f"{report.comparison.tokens:,} held-out tokens in one stream. KL to the original in nats a token, ± half of "
        "its 95 % interval; bits a weight; tokens/s of prefill/decode "
        f"on {report.bench.threads} of {machine['cores']} cores, {machine['cpu']}. "
        "Checkpoints run in PyTorch with fp32 activations, quantized programs with int8 ones."
    )
    return grid([*left("", ""), *right("perplexity", "KL", "MB", "bits", "tokens/s")], rows, caption=caption)


def _with_margin(candidate: Candidate) -> str:
    """Mean ± half of its interval: 1.31±0.07e-3."""
    if candidate.kl_ci95 is None or candidate.kl_mean <= 0:
        return scientific(candidate.kl_mean)
    (mean, margin), exponent = scaled(candidate.kl_mean, (candidate.kl_ci95.high - candidate.kl_ci95.low) / 2)
    return f"{mean:.2f}±{margin:.2f}e{exponent}"


def _command() -> str:
    """How this command is called: by its name, or by its path where the name is not found (`make demo`)."""
    called = Path(sys.argv[0])
    return "mossquant" if shutil.which("mossquant") or called.name != "mossquant" else str(called)


def _row(model: str, form: str, candidate: Candidate, timed: Mapping[str, Timing]) -> DemoRow:
    size, bits = candidate.file_bytes, candidate.bits_per_weight
    return DemoRow(model, form, candidate.perplexity, candidate, size, bits, timed[candidate.path])
