# SPDX-License-Identifier: Apache-2.0
"""Verbs that learn from text what quantizing needs to know."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mossquant.cli import options
from mossquant.cli.terminal import command_line, terminal

_MEGABYTE = 10**6


def calibrate(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
    output: options.Output,
    text: Annotated[
        list[Path] | None, typer.Option(help="text file; may be repeated; the bundled text if not given")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="most tokens that are read")] = 2_000_000,
    quota: Annotated[
        float, typer.Option(min=0, help="effective tokens that every expert's inputs want, times their width")
    ] = 4.0,
    memory: Annotated[
        int | None, typer.Option(min=0, help="MB of waiting inputs kept in memory, 256 if not given; the rest on disk")
    ] = None,
    threads: options.Threads = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu or cuda")] = "cpu",
    force: options.Force = False,
    json: options.Json = None,
) -> None:
    """Gather on text what solvers need: second moments of every linear's inputs, for each expert apart.

    A killed run goes on from its last block when the same command is given again.

    Example: mossquant calibrate tiny -o tiny-statistics
    """
    from mossquant.calibration.calibrate import calibrate as run
    from mossquant.eval.report.statistics_tables import statistics_tables

    files = list(text or ())
    options.check_json(json, model, *files, output=output)
    with terminal.bar("calibrating") as shown:
        found = run(
            model,
            output,
            text=files,
            tokens=tokens,
            quota=quota,
            memory=None if memory is None else memory * _MEGABYTE,
            threads=threads,
            device=device,
            force=force,
            progress=shown,
            said=terminal.say,
        )
    use = command_line("quantize", model, "-r", "RECIPE.yaml", "--stats", str(output), "-o", "OUTPUT")
    closing = f"{output}: use it with a recipe whose solver is gptq: {use}"
    options.finish(json, found, *statistics_tables(found), closing)
