# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/accuracy.md`: what every step of compressing the bundled model costs, on its held-out text.

    python bench/accuracy.py [TOKENS]          65,536 tokens by default; about 12 minutes on two cores

All rows are measured in one run, on the same tokens, in one stream with carried state. Intervals are paired bootstrap
intervals over windows of the text (95 %).
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mossquant import compare, export, quantize
from mossquant.checkpoint.locate import asset_folder
from mossquant.eval.compare import ComparisonReport, PairedDifference, paired_difference
from mossquant.eval.machine import machine
from mossquant.release import release

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
SOLVERS = ("nearest-mse", "nearest")
RECIPES = ("int8", "int4")


def made(folder: Path) -> list[Path]:
    """Quantized checkpoints with both solvers, and the artifacts of the default solver with both activation formats."""
    recipes = asset_folder("..") / "recipes"
    out = []
    for name in RECIPES:
        text = (recipes / f"{name}.yaml").read_text()
        assert "solver: nearest-mse" in text
        for solver in SOLVERS:
            recipe = folder / f"{name}-{solver}.yaml"
            recipe.write_text(text.replace("solver: nearest-mse", f"solver: {solver}"))
            checkpoint = folder / f"{name} {solver}"
            quantize("tiny", checkpoint, recipe=recipe)
            out.append(checkpoint)
        for activations in ("fp32", "int8"):
            artifact = folder / f"{name} .onnx {activations}"
            export(folder / f"{name} nearest-mse", artifact, activations="fp32" if activations == "fp32" else "int8")
            out.append(artifact)
        program = folder / f"{name} .pte int8"
        export(folder / f"{name} nearest-mse", program, target="executorch")
        out.append(program)
    return out


def difference(report: ComparisonReport, names: Sequence[str], a: str, b: str) -> PairedDifference:
    """Mean KL of a less that of b, on the same tokens."""
    scores = dict(zip(names, report.scores[1:], strict=True))
    return paired_difference(scores[a].kl, scores[b].kl)


def shown(found: PairedDifference) -> str:
    if found.interval is None:
        return f"{found.mean:+.2e}"
    return f"{found.mean:+.2e} [{found.interval.low:+.2e}, {found.interval.high:+.2e}]"


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
    with tempfile.TemporaryDirectory() as temporary:
        paths = made(Path(temporary))
        names = [path.name for path in paths]
        report = compare("tiny", paths, tokens=tokens)
    described = machine()
    lines = [
        "# Accuracy",
        "",
        f"Written by `python bench/accuracy.py {tokens}` with mossquant {release()}, PyTorch {torch.__version__}, on "
        f"{described['cpu']}. Text: the bundled held-out text, SHA-256 `{report.text_sha256}`, "
        f"{report.tokens:,} predicted tokens in one stream. KL is KL(original ‖ candidate) in nats a token, mean over "
        "tokens; intervals are 95 %, paired bootstrap over windows.",
        "",
        f"Original, as stored: perplexity {report.baseline.perplexity:.4f}.",
        "",
        "| candidate | solver | activations | bits a weight | perplexity | increase, % | KL mean | KL median "
        "| same top, % |",
        "| --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for name, found in zip(names, report.candidates, strict=True):
        recipe, kind = name.split(" ", 1)
        artifact = kind.startswith(".")
        rise, kl = found.ppl_increase_ci95, found.kl_ci95
        lines.append(
            f"| {recipe} {kind.split()[0] if artifact else 'checkpoint'} | {'nearest-mse' if artifact else kind} "
            f"| {found.activations} | {found.bits_per_weight:.3f} | {found.perplexity:.4f} "
            f"| {found.ppl_increase_pct:+.3f} [{rise.low:+.3f}, {rise.high:+.3f}] "
            f"| {found.kl_mean:.2e} [{kl.low:.2e}, {kl.high:.2e}] | {found.kl_median:.1e} "
            f"| {100 * found.top1_agreement:.2f} |"
        )
    lines += [
        "",
        "## Differences, on the same tokens",
        "",
        "| | mean KL, difference |",
        "| --- | --- |",
    ]
    for recipe in RECIPES:
        lines.append(
            f"| {recipe}: `nearest-mse` less `nearest` "
            f"| {shown(difference(report, names, f'{recipe} nearest-mse', f'{recipe} nearest'))} |"
        )
    for recipe in RECIPES:
        lines.append(
            f"| {recipe}: what int8 activations cost against fp32 ones, in the .onnx "
            f"| {shown(difference(report, names, f'{recipe} .onnx int8', f'{recipe} .onnx fp32'))} |"
        )
    for recipe in RECIPES:
        lines.append(
            f"| {recipe}: the .pte less the .onnx with int8 activations "
            f"| {shown(difference(report, names, f'{recipe} .pte int8', f'{recipe} .onnx int8'))} |"
        )
    OUTPUT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
