# SPDX-License-Identifier: Apache-2.0
"""Verbs that learn from text what a model can lose, and the one that takes experts away."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mossquant.cli import options
from mossquant.cli.terminal import command_line, terminal

_MEGABYTE = 10**6


def calibrate(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
    output: options.Output,
    text: options.CalibrationTexts = None,
    tokens: Annotated[int, typer.Option(min=1, help="most tokens that are read")] = 2_000_000,
    quota: Annotated[
        float, typer.Option(min=0, help="effective tokens that every expert's inputs want, times their width")
    ] = 4.0,
    memory: Annotated[
        int | None, typer.Option(min=0, help="MB of waiting inputs kept in memory, 256 if not given; the rest on disk")
    ] = None,
    threads: options.Threads = None,
    device: options.Device = "cpu",
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
    options.finish(json, found, *statistics_tables(found.manifest), closing)


def sensitivity(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write")],
    text: options.CalibrationTexts = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="whose open formats are tried; int4 and int8 if not given"),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, max=options.MOST_TOKENS, help="tokens that each is measured on, in windows of 256")
    ] = 8192,
    method: Annotated[
        Literal["measured", "estimated"] | None,
        typer.Option(
            help="each alone, or from gradients; measured if not given, unless it takes some half an hour or more"
        ),
    ] = None,
    experts: Annotated[bool, typer.Option("--experts", help="also each expert alone")] = False,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    picture: options.Picture = None,
    force: options.Force = False,
) -> None:
    """Measure what each group of tensors costs in each format: KL at the output, the group alone.

    Example: mossquant sensitivity tiny -o tiny-sensitivity.json
    """
    from mossquant.calibration.sensitivity import sensitivity as run
    from mossquant.eval.report.chart import sensitivity_chart, write_chart
    from mossquant.eval.report.sensitivity_tables import sensitivity_tables

    options.check_picture(picture, model, *(recipe or ()), *(text or ()), output=output)
    options.use_threads(threads)
    with terminal.bar("measuring") as shown:
        found = run(
            model,
            output,
            text=text or (),
            recipes=recipe or ("int4", "int8"),
            tokens=tokens,
            method=method,
            experts=experts,
            device=device,
            force=force,
            said=terminal.say,
            progress=shown,
        )
    terminal.show(*sensitivity_tables(found))
    if picture is not None:
        write_chart(*sensitivity_chart(found), picture)
    words = ("quantize", model, "--sensitivity", str(output), "-o", "OUTPUT")
    terminal.show(f"{output}: quantize by it with: {command_line(*words)}")


def prune(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
    output: options.Output,
    experts: Annotated[
        str | None, typer.Option(help="share of the experts to remove, of each kind: 25%", metavar="PERCENT")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help='JSON file with the experts that stay, a list for each layer: {"ssm": [[0, 1], [0, 3]]}'),
    ] = None,
    kind: Annotated[
        Literal["ssm", "mlp", "both"] | None, typer.Option(help="which experts may go; ssm if not given")
    ] = None,
    by: Annotated[
        Literal["random", "frequency", "reap", "change", "leave-one-out", "greedy"] | None,
        typer.Option(help="how they are chosen; greedy if not given"),
    ] = None,
    text: options.CalibrationTexts = None,
    tokens: Annotated[
        int,
        typer.Option(min=2, max=options.MOST_TOKENS, help="tokens that experts are looked at on, in windows of 256"),
    ] = 8192,
    recover: Annotated[
        str | None, typer.Option(help="tokens of the text to distil over afterwards, e.g. 500k or 2M")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=options.MOST_SEED, help="of --by random; 0 if not given")
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    force: options.Force = False,
    json: options.Json = None,
) -> None:
    """Remove experts of the SSM or of the MLP by what is lost without them; an ordinary checkpoint comes out.

    Nothing is removed before it was measured. A killed run goes on when the same command is given again.

    Example: mossquant prune tiny --experts 25% -o tiny-pruned
    """
    from mossquant.calibration.prune import prune as run
    from mossquant.eval.report.pruning_tables import pruning_tables

    options.check_json(json, model, *(text or ()), keep, output=output)
    options.use_threads(threads)
    with terminal.bar("pruning") as shown:
        found = run(
            model,
            output,
            experts=None if experts is None else options.percent(experts, "--experts") / 100,
            keep=keep,
            kind=kind,
            by=by,
            text=text or (),
            tokens=tokens,
            recover=0 if recover is None else options.token_count(recover),
            seed=seed,
            device=device,
            force=force,
            said=terminal.say,
            progress=shown,
        )
    closing = f"{output}: compare it with: {command_line('compare', model, str(output))}"
    options.finish(json, found, *pruning_tables(found), closing)
