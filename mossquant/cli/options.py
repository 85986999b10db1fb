# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and what every verb does with `--json`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from mossquant.errors import InputError

__all__ = [
    "MOST_SEED",
    "MOST_TOKENS",
    "NO_OUTPUT",
    "AllowSeen",
    "Force",
    "Json",
    "Model",
    "Output",
    "Recipe",
    "RunActivations",
    "Streams",
    "TextOption",
    "Threads",
    "Tokens",
    "check_json",
    "read_at",
    "write_json_report",
]

MOST_TOKENS = 1 << 24
MOST_SEED = (1 << 63) - 1
NO_OUTPUT = "no output folder was given; say where to write with -o FOLDER, or look first with --dry-run"
_MOST_THREADS = 1024

Model = Annotated[str, typer.Argument(metavar="PATH", help="a checkpoint, an artifact, or tiny")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="int8, int4, or a recipe file (.yaml)")]
Output = Annotated[Path, typer.Option("--output", "-o", help="what to write")]
Force = Annotated[bool, typer.Option("--force", help="replace an output that exists")]
Json = Annotated[Path | None, typer.Option("--json", help="also write the result as JSON to this file")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=_MOST_THREADS, help="CPU threads; all of them if not given")
]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="text file to measure on; the bundled held-out text if not given")
]
Tokens = Annotated[int | None, typer.Option("--tokens", min=2, help="measure on the text's first so many tokens")]
Streams = Annotated[int, typer.Option("--streams", min=1, help="cut the text into so many streams")]
AllowSeen = Annotated[bool, typer.Option("--allow-seen", help="measure on text that the model was trained on")]
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
    from mossquant.files.outputs import check_apart, check_free, check_outside

    if path is None:
        return
    check_free(path, force=True, as_file=True, inputs=[read_at(source) for source in inputs if source])
    check_apart(path, [] if output is None else [output], role="output")
    check_outside(path)
    if path.exists() and path.suffix != ".json":
        raise InputError(f"{path} exists already, and a report replaces .json files only; choose another path")


def read_at(argument: str | Path) -> Path:
    """Where an argument is read from."""
    from mossquant.checkpoint.locate import BUNDLED, asset_folder

    return asset_folder(BUNDLED) if argument == BUNDLED else Path(argument)


def write_json_report(path: Path | None, report: Report) -> None:
    """Write a report where `--json` says, if it does."""
    from mossquant.files.outputs import json_bytes, new_file

    if path is not None:
        with new_file(path, force=path.suffix == ".json") as partial:
            partial.write_bytes(json_bytes(report.to_json()))
