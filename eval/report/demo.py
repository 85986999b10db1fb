# SPDX-License-Identifier: Apache-2.0
"""The main job, start to end, on the bundled model: quantize, lower, read back, run what ships, compare, time.

A second run keeps every checkpoint and artifact whose hashes say that it would come out the same, and what was measured
on files of these hashes; it times again. What is written is read back at once; what is kept was read back when it was
written, and has the same hashes.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.bench import bench
from mossquant.eval.compare import ComparisonReport, compare
from mossquant.eval.generate import generate
from mossquant.eval.report.demo_report import DemoReport
from mossquant.eval.report.lowering import Lowering, lower_all
from mossquant.eval.report.picture import write_picture
from mossquant.files.json import LARGEST_SMALL, read_json
from mossquant.files.outputs import check_free, new_file, write_json
from mossquant.plan.recipe import Recipe
from mossquant.progress import Progress
from mossquant.release import release
from mossquant.targets.artifact import Artifact
from mossquant.targets.executorch.packages import check_packages
from mossquant.text.text import Tokenizer, bundled_text

RECIPES = {"int8": 0, "int4-best": 60_000}
"""What the bundled model is quantized by, and over how many tokens each is distilled: fewer than by the recipe."""
TARGETS = ("onnx", "executorch", "native")
"""What the quantized models are lowered to; the original, to compare with, to the first alone."""
TOKENS = 32_768
_PROMPT = "import os\n\ndef read_lines(path):\n"
_CONTINUED = 48
_PICTURE = "table.svg"
_MEASURED = "measured.json"
_ASKED = "asked.json"
"""By what each checkpoint was made: recipe → SHA-256 of its text, budget included, and the tokens of recovery."""
# Few turns: the demo is to be quick, and `mossquant bench` is there for more.
_REPEATS = 3


def demo(
    output: str | Path,
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    said: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> DemoReport:
    """Quantize the bundled model by every one of `RECIPES`, lower it to .onnx, .pte and .moss, and measure all of them.

    Args:
        output: folder for the checkpoints and artifacts; may be there from an earlier run.
        tokens: of the held-out text that are measured on.
        threads: CPU threads; None: all to measure with, one to time with.
        said: is given a line for every stage.
        progress: told what is done (quantizing, lowering, measuring, timing) and how far it is.

    Raises:
        InputError: the output cannot be written, holds something else under a name that is needed, or holds other
            things and nothing of an earlier run.
        RuntimeError: an artifact does not hold its checkpoint's weights.
    """
    say = said or (lambda line: None)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for what the demo writes")
    for name in (_PICTURE, _MEASURED, _ASKED):
        check_free(folder / name, force=True, as_file=True)
    check_packages()
    checkpoints = {recipe: folder / f"{BUNDLED}-{recipe}" for recipe in RECIPES}
    folders = {"original": folder / f"{BUNDLED}-app", **{r: folder / f"{BUNDLED}-{r}-app" for r in RECIPES}}
    _check_writable(folder, [*checkpoints.values(), *folders.values()])
    original = Checkpoint.open(asset_folder(BUNDLED))
    words = Tokenizer.for_folder(original.folder, original.config.vocab_size)
    held_out = len(words.encode(bundled_text("heldout").data))
    if not 2 <= tokens <= held_out:
        raise InputError(f"{tokens} tokens cannot be measured on; the held-out text has {held_out}")
    made = _asked(folder / _ASKED)
    for recipe, path in checkpoints.items():
        asked = {"recipe": hashlib.sha256(Recipe.named(recipe).text.encode()).hexdigest(), "recover": RECIPES[recipe]}
        if made.get(recipe) == asked and _is_current_checkpoint(path, recipe, original):
            say(f"{path}: kept, its hashes match")
        else:
            say(f"{path}: quantizing {BUNDLED} by {recipe}")
            shown = _stage(f"quantizing by {recipe}:", progress)
            tokens_asked = RECIPES[recipe]
            quantize(BUNDLED, path, recipe=recipe, recover=tokens_asked, force=path.exists(), said=said, progress=shown)
            made[recipe] = asked
            with new_file(folder / _ASKED, force=True) as partial:
                write_json(partial, made)
    works = [
        Lowering(str(checkpoints.get(name, BUNDLED)), str(path), ("onnx",) if name == "original" else TARGETS)
        for name, path in folders.items()
    ]
    sources = [original if work.source == BUNDLED else open_weights(work.source, verb="demo") for work in works]
    kept = [_current_artifact(work, source) for work, source in zip(works, sources, strict=True)]
    for work, artifact in zip(works, kept, strict=True):
        making = f"lowering {work.source} to {' and '.join(work.targets)}"
        say(f"{work.output}: {'kept, its hashes match' if artifact else making}")
    stale = [work for work, artifact in zip(works, kept, strict=True) if artifact is None]
    lower_all(stale, _stage("lowering:", progress))
    current = [artifact or Artifact.open(Path(work.output)) for work, artifact in zip(works, kept, strict=True)]
    artifacts = {
        name: {target: artifact.program(target) for target in work.targets}
        for name, work, artifact in zip(folders, works, current, strict=True)
    }
    hashes = {
        str(artifact.folder): [
            dict(source.origin.files),
            {file: record.sha256 for file, record in artifact.files.items()},
        ]
        for source, artifact in zip(sources, current, strict=True)
    }
    candidates = [*checkpoints.values(), *(path for programs in artifacts.values() for path in programs.values())]
    measured = {"release": release(), "tokens": tokens, "threads": threads, "files": hashes}
    comparison = _kept_comparison(folder / _MEASURED, measured)
    if comparison is not None:
        say(f"{folder / _MEASURED}: kept, it was measured on files of these hashes")
    else:
        say(f"measuring on the first {tokens:,} held-out tokens")
        comparison = compare(
            BUNDLED, candidates, tokens=tokens, threads=threads, progress=_stage("measuring:", progress)
        )
        with new_file(folder / _MEASURED, force=True) as partial:
            write_json(partial, {**measured, "comparison": comparison.to_json()})
    say("timing")
    # One core unless more are asked for: the figures then do not depend on what else the machine is doing.
    timed = bench([BUNDLED, *candidates], threads=threads or 1, repeats=_REPEATS, progress=_stage("timing:", progress))
    report = DemoReport(
        comparison=comparison,
        bench=timed,
        original_bytes=original.origin.file_bytes,
        checkpoints=checkpoints,
        artifacts=artifacts,
        prompt=_PROMPT,
        generation=generate(artifacts[list(RECIPES)[-1]]["onnx"], _PROMPT, max_tokens=_CONTINUED, threads=threads),
        picture=folder / _PICTURE,
    )
    write_picture(report, report.picture)
    return report


def _stage(what: str, progress: Progress | None) -> Progress | None:
    """Progress of one stage of the demo, which says what it is."""
    return progress and (lambda name, done, total: progress(f"{what} {name}", done, total))


def _check_writable(folder: Path, paths: list[Path]) -> None:
    """Every path must be free, or be ours to replace; and so must something in a folder that holds anything."""
    for path in paths:
        check_free(path, force=True)
    present = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
    if present and not any(path.exists() for path in paths):
        raise InputError(
            f"{folder} holds {present[0]} and nothing that the demo wrote; choose an empty folder or a new one"
        )


def _is_current_checkpoint(path: Path, recipe: str, original: Weights) -> bool:
    """Whether a quantized checkpoint is whole, and what this release makes of this original by such a recipe."""
    if not path.exists():
        return False
    try:
        checkpoint = QuantizedCheckpoint.open(path)
    except InputError:
        return False
    manifest = checkpoint.manifest
    return (
        manifest.parent.files == dict(original.origin.files)
        and manifest.release == release()
        and manifest.recipe == recipe
    )


def _asked(path: Path) -> dict[str, Any]:
    """By what earlier runs made the checkpoints; nothing where that is not known."""
    try:
        stored = read_json(path, largest=LARGEST_SMALL, advice="remove it") if path.is_file() else {}
    except InputError:
        stored = {}
    return stored if isinstance(stored, dict) else {}


def _current_artifact(work: Lowering, source: Weights) -> Artifact | None:
    """The artifact of a lowering, if it is whole and what this release makes of this source."""
    path = Path(work.output)
    if not path.exists():
        return None
    try:
        artifact = Artifact.open(path)
    except InputError:
        return None
    manifest, files = artifact.manifest, dict(source.origin.files)
    is_current = (
        manifest.release == release()
        and list(manifest.programs) == list(work.targets)
        and all(program.model.get("source_files") == files for program in manifest.programs.values())
    )
    return artifact if is_current else None


def _kept_comparison(path: Path, measured: dict[str, Any]) -> ComparisonReport | None:
    """What an earlier run measured on the same files, tokens and threads; None where there is no such thing."""
    if not path.is_file():
        return None
    try:
        stored = read_json(path, largest=LARGEST_SMALL, advice="remove it")
        return ComparisonReport.from_json(stored["comparison"]) if stored == {**stored, **measured} else None
    except (InputError, LookupError, TypeError, ValueError):
        return None  # measured again, and replaced
