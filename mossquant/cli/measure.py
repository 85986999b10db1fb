# SPDX-License-Identifier: Apache-2.0
"""Verbs that measure, compare or describe what is there, and write it as JSON too where `--json` asks for it."""

from pathlib import Path
from typing import Annotated

import typer

from mossquant.cli import options
from mossquant.cli.terminal import terminal

_GATE_FAILED = 1
"""Exit status: accuracy or parity."""


def info(path: options.Model, picture: options.Picture = None, json: options.Json = None) -> None:
    """What a checkpoint, quantized checkpoint or artifact is: shapes, experts, bytes by format, ledger, hashes.

    What `calibrate` and `sensitivity` wrote is shown too.

    Example: mossquant info tiny
    """
    from mossquant.calibration.sensitivity import Sensitivities
    from mossquant.calibration.statistics import Manifest
    from mossquant.checkpoint.locate import STATISTICS, locate
    from mossquant.checkpoint.quantized import QuantizedCheckpoint
    from mossquant.eval.info import info as run
    from mossquant.eval.report.chart import frontier_chart, sensitivity_chart, write_chart
    from mossquant.eval.report.sensitivity_tables import sensitivity_tables
    from mossquant.eval.report.statistics_tables import statistics_info
    from mossquant.eval.report.tables import info_tables

    options.check_json(json, path)
    options.check_picture(picture, path)
    if path.endswith(".json"):
        found = Sensitivities.read(Path(path))
        options.finish(json, found, *sensitivity_tables(found))
        if picture is not None:
            write_chart(*sensitivity_chart(found), picture)
        return
    located = locate(path)
    if picture is not None:
        located.require("quantized checkpoint", verb="a picture")
    if located.kind == STATISTICS:
        manifest = Manifest.read(located.path)
        options.finish(json, manifest, *statistics_info(path, manifest))
        return
    report = run(path)
    options.finish(json, report, *info_tables(report))
    if picture is not None:
        write_chart(*frontier_chart(QuantizedCheckpoint.open(located.path).plan), picture)


def native_path() -> None:
    """Print the folder with what an app links: libmoss, moss.h, a CMake config.

    Example: cc app.c -I"$(mossquant native-path)/include" -L"$(mossquant native-path)/lib" -lmoss
    """
    from mossquant.targets.native.library import native_path as run

    typer.echo(run())


def perplexity(
    model: options.Model,
    text: options.Text = None,
    ids: options.Ids = None,
    special: options.Special = False,
    separator: options.Separator = None,
    tokens: options.Tokens = None,
    streams: options.Streams = 1,
    activations: options.RunActivations = None,
    threads: options.Threads = None,
    allow_seen: options.AllowSeen = False,
    json: options.Json = None,
) -> None:
    """Measure one model or artifact: nats a token, perplexity, bits a byte.

    Example: mossquant perplexity tiny --tokens 65536
    """
    from mossquant.eval.perplexity import perplexity as run
    from mossquant.eval.report.tables import perplexity_table

    options.check_json(json, model, text, ids)
    with terminal.bar("measuring") as shown:
        report = run(
            model,
            text=options.measured_text(text, ids, special, separator),
            tokens=tokens,
            streams=streams,
            activations=activations,
            threads=threads,
            allow_seen=allow_seen,
            progress=shown,
        )
    options.finish(json, report, perplexity_table(report))


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the original; usually the full-precision checkpoint")],
    candidates: Annotated[
        list[str], typer.Argument(metavar="CANDIDATE", help="checkpoints and artifacts to compare with it")
    ],
    text: options.Text = None,
    ids: options.Ids = None,
    special: options.Special = False,
    separator: options.Separator = None,
    tokens: options.Tokens = None,
    streams: options.Streams = 1,
    max_ppl_increase: Annotated[str | None, typer.Option(help="gate: exit status 1 above it, e.g. 1%")] = None,
    activations: options.RunActivations = None,
    threads: options.Threads = None,
    allow_seen: options.AllowSeen = False,
    routing: Annotated[bool, typer.Option("--routing", help="also what the routers do (PyTorch models)")] = False,
    json: options.Json = None,
) -> None:
    """Measure candidates against the original on the same tokens: perplexity, KL, top-1 agreement, bytes.

    Example: mossquant compare tiny tiny-int4 tiny-int4-onnx --max-ppl-increase 6%
    """
    from mossquant.eval.compare import compare as run
    from mossquant.eval.report.tables import comparison_tables

    options.check_json(json, base, *candidates, text, ids)
    gate = None if max_ppl_increase is None else options.percent(max_ppl_increase, "--max-ppl-increase")
    with terminal.bar("measuring") as shown:
        report = run(
            base,
            candidates,
            text=options.measured_text(text, ids, special, separator),
            tokens=tokens,
            streams=streams,
            max_ppl_increase=gate,
            activations=activations,
            threads=threads,
            allow_seen=allow_seen,
            routing=routing,
            progress=shown,
        )
    options.finish(json, report, *comparison_tables(report))
    if report.gate_failed:
        terminal.warn(f"gate failed: perplexity rose by more than {str(max_ppl_increase).removesuffix('%')}%")
        raise typer.Exit(_GATE_FAILED)


def verify(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="the checkpoint that it was lowered from")],
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT", help="an .onnx, a .pte, a .moss, or the folder of one")
    ],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="read back the weights and stop")] = False,
    text: options.Text = None,
    ids: options.Ids = None,
    special: options.Special = False,
    separator: options.Separator = None,
    positions: Annotated[int, typer.Option(min=1, help="single steps that are compared")] = 2000,
    stream: Annotated[int, typer.Option(min=128, help="tokens run freely and compared")] = 20000,
    threads: options.Threads = None,
    json: options.Json = None,
) -> None:
    """Hold an artifact against its quantized checkpoint: every weight read back from the file, then run side by side.

    Example: mossquant verify tiny-int4 tiny-int4-onnx
    """
    from mossquant.eval.report.tables import parity_table
    from mossquant.eval.verify import verify as run

    options.check_json(json, quantized, *artifacts, text, ids)
    with terminal.bar("comparing") as shown:
        report = run(
            quantized,
            artifacts,
            weights_only=weights_only,
            text=options.measured_text(text, ids, special, separator),
            positions=positions,
            stream=stream,
            threads=threads,
            progress=shown,
        )
    options.finish(json, report, parity_table(report))
    if not report.passed:
        for line in report.failures():
            terminal.warn(line)
        raise typer.Exit(_GATE_FAILED)


def bench(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="what to time")],
    threads: options.Threads = None,
    prompt: Annotated[int, typer.Option(min=1, max=options.MOST_TOKENS, help="tokens of the prefill")] = 512,
    decode: Annotated[int, typer.Option(min=1, max=options.MOST_TOKENS, help="steps of the decode")] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="turns that count")] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="also where the time goes, for runtimes that say it")
    ] = False,
    json: options.Json = None,
) -> None:
    """Time models and artifacts in turn: prefill and decode tokens a second, load time, memory.

    Example: mossquant bench tiny tiny-int4-onnx
    """
    from mossquant.eval.bench import bench as run
    from mossquant.eval.report.tables import bandwidth_tables, bench_table, profile_tables

    options.check_json(json, *paths)
    with terminal.bar("timing") as shown:
        report = run(
            paths, threads=threads, prompt=prompt, decode=decode, repeats=repeats, profile=profile, progress=shown
        )
    shown_after = [*bandwidth_tables(report), *(profile_tables(report) if profile else ())]
    options.finish(json, report, bench_table(report), *shown_after)
