# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and what every verb does with `--json`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import RenderableType

from mossquant.cli.terminal import terminal
from mossquant.errors import InputError

MOST_TOKENS = 1 << 24
MOST_SEED = (1 << 63) - 1
NO_OUTPUT = "no output folder was given; say where to write with -o FOLDER, or look first with --dry-run"

Model = Annotated[str, typer.Argument(metavar="PATH", help="a checkpoint, an artifact, or tiny")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="a name (see `recipes`), or a recipe file (.yaml)")]
Output = Annotated[Path, typer.Option("--output", "-o", help="what to write")]
MaybeOutput = Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")]
Force = Annotated[bool, typer.Option("--force", help="replace an output that exists")]
Json = Annotated[Path | None, typer.Option(help="also write the result as JSON to this file")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; all of them if not given")]
Text = Annotated[Path | None, typer.Option(help="text file to measure on; the bundled held-out text if not given")]
CalibrationTexts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="text file to calibrate on; may be repeated; the bundled model has one of its own"),
]
Picture = Annotated[Path | None, typer.Option(help="also draw KL over bits a weight into this .svg file")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="where the model is run: cpu or cuda")]
Special = Annotated[bool, typer.Option("--special", help="special tokens that the text spells are meant, not letters")]
Separator = Annotated[
    str | None, typer.Option("--document-separator", help="stands between documents; becomes the end-of-text token")
]
Ids = Annotated[Path | None, typer.Option("--ids", help="token ids to measure on, an array in a .npy file")]
Tokens = Annotated[int | None, typer.Option(min=2, help="measure on the text's first so many tokens")]
Streams = Annotated[int, typer.Option(min=1, help="cut the text into so many streams")]
AllowSeen = Annotated[bool, typer.Option("--allow-seen", help="measure on text that the model was trained on")]
Dtype = Literal["bfloat16", "float32", "float16"]
RunActivations = Annotated[
    Literal["fp32", "planned"] | None,
    typer.Option("--activations", help="how quantized checkpoints are run in PyTorch: fp32, or as the recipe plans"),
]


class Report(Protocol):
    """What a verb found."""

    def to_json(self) -> dict[str, Any]: ...


def check_json(path: Path | None, *inputs: str | Path | None, output: Path | None = None) -> None:
    """A report may replace a .json file, but nothing else, and lies neither in an input nor in the output.

    Raises:
        InputError: it would, or cannot be written.
    """
    from mossquant.checkpoint.locate import BUNDLED
    from mossquant.files.outputs import check_apart, check_free, check_outside

    if path is None:
        return
    read = [Path(source) for source in inputs if source and source != BUNDLED]
    check_free(path, force=True, as_file=True, inputs=read)
    check_apart(path, [] if output is None else [output], role="output")
    check_outside(path)
    if path.suffix != ".json":
        raise InputError(f"{path} is no name for a report, which is JSON; end it with .json")


def check_picture(path: Path | None, *inputs: str | Path | None, output: Path | None = None) -> None:
    """A picture may replace an .svg file, but nothing else. Raises `InputError`: it would, or cannot be written."""
    from mossquant.checkpoint.locate import BUNDLED
    from mossquant.files.outputs import check_apart, check_free, check_outside

    if path is None:
        return
    if path.suffix != ".svg":
        raise InputError(f"{path}: a picture is an .svg file; choose such a name")
    check_free(
        path, force=True, as_file=True, inputs=[Path(source) for source in inputs if source and source != BUNDLED]
    )
    check_apart(path, [] if output is None else [output], role="output")
    check_outside(path)


def measured_text(text: Path | None, ids: Path | None, special: bool, separator: str | None) -> Any:
    """What a verb measures on: a `Text`, the path of a file, or None for the bundled text.

    Raises:
        InputError: options that exclude one another, or a file that cannot be read.
    """
    from mossquant.text.text import Text, read_text

    if ids is not None:
        if text is not None or special or separator is not None:
            raise InputError("--ids are tokens already; leave --text, --special and --document-separator out")
        return Text.from_ids(ids)
    if not special and separator is None:
        return text
    if separator == "":
        raise InputError("--document-separator is empty; give what stands between the documents of the text")
    if text is None:
        raise InputError("--special and --document-separator say how a text of yours is read; give --text FILE")
    return replace(read_text(text, as_bytes=True), special=special, document_separator=separator)


def use_threads(threads: int | None) -> None:
    """Let PyTorch use so many threads; all of them where none are given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def token_count(text: str) -> int:
    """Read "250000", "250k" or "1M" (of 10³ and 10⁶). Raises `InputError` for anything else."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M") else (text, "")
    try:
        count = float(number) * {"": 1, "k": 1e3, "M": 1e6}[unit]
    except ValueError:
        count = -1.0
    if not 0 <= count <= 1e12 or count != int(count):
        raise InputError(f"{text[:40]!r} is not a number of tokens; give one like 250000, 250k or 1M")
    return int(count)


def percent(text: str, option: str) -> float:
    """Read "25%" as 25.0. Raises `InputError` for anything else, naming the option: a bare 3 may mean three of them."""
    try:
        if not text.endswith("%"):
            raise ValueError
        return float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"{option} {text[:40]!r} is not a percentage; give one like 25% or 0.5%") from None


def finish(json: Path | None, report: Report, *shown: RenderableType) -> None:
    """Print what a verb found and what the user should know, and write it as JSON where `--json` says."""
    from mossquant.files.outputs import json_bytes, new_file

    for note in getattr(report, "notes", ()):
        terminal.say(note)
    terminal.show(*shown)
    if json is not None:
        with new_file(json, force=json.suffix == ".json") as partial:
            partial.write_bytes(json_bytes(report.to_json()))
