# SPDX-License-Identifier: Apache-2.0
"""Verbs that make something: a checkpoint, a quantized one, an artifact; and the demo, which makes all of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mossquant.cli import options
from mossquant.cli.terminal import command_line, terminal
from mossquant.errors import InputError


def demo(
    output: options.Output = Path("demo"),
    tokens: options.Tokens = 32768,
    threads: options.Threads = None,
    json: options.Json = None,
) -> None:
    """The main job on the bundled model: quantize, lower, run what came out, and compare it with the original.

    Example: mossquant demo -o demo
    """
    from mossquant.eval.report.demo import demo as run
    from mossquant.eval.report.demo_report import demo_table

    options.check_json(json, output=output)
    with terminal.bar() as shown:
        report = run(output, tokens=tokens or 32768, threads=threads, said=terminal.say, progress=shown)
    options.finish(json, report, demo_table(report), *report.closing())


def train(
    output: options.Output,
    text: Annotated[list[str], typer.Option(help="text file, or python-stdlib; may be repeated")],
    preset: Annotated[
        str, typer.Option(help="tiny, 8x30m, 8x200m, 8x1.5b, mamba-5m, mamba-130m or mamba-370m")
    ] = "tiny",
    tokenizer: Annotated[Literal["bpe", "bytes"], typer.Option(help="bpe, or bytes")] = "bpe",
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="windows a step; half of them carry state")] = 16,
    window: Annotated[int, typer.Option(min=2, help="tokens a window")] = 256,
    learning_rate: Annotated[float, typer.Option(help="peak learning rate")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, max=options.MOST_SEED, help="initial weights and order of the text")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[options.Dtype, typer.Option(help="stored type")] = "bfloat16",
    work: Annotated[Path | None, typer.Option(help="work folder; OUTPUT.training if not given")] = None,
    threads: options.Threads = None,
    force: options.Force = False,
) -> None:
    """Train a MossNet from text. A killed run goes on from its last snapshot when the same command is given again.

    Example: mossquant train --text book.txt -o my-model --steps 1000
    """
    import torch

    from mossquant.training.train import train as run
    from mossquant.training.trainer import Schedule, TrainingStep

    if threads is not None:
        torch.set_num_threads(threads)
    if not 0 < learning_rate < 1:
        raise InputError(f"--learning-rate {learning_rate} is not between 0 and 1; 0.003 suits the presets")
    schedule = Schedule(steps=steps, batch=batch, window=window, peak_lr=learning_rate, seed=seed)
    with terminal.bar("training:") as bar:

        def shown(step: TrainingStep) -> None:
            bar(f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s", step.step, steps)

        trained = run(
            preset,
            text,
            output,
            tokenizer=tokenizer,
            schedule=schedule,
            device=device,
            dtype=dtype,
            work=work,
            force=force,
            shown=shown,
            said=terminal.say,
        )
    terminal.show(f"{trained.output}: {trained.tokens:,} tokens seen, {trained.loss:.3f} nats a token at the end")


def import_(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="the Mamba, or a MossNet to add a tokenizer to")],
    output: options.Output,
    tokenizer: Annotated[Path | None, typer.Option(help="a tokenizer.json to take along")] = None,
    dtype: Annotated[options.Dtype | None, typer.Option(help="stored type; as it is if not given")] = None,
    force: options.Force = False,
) -> None:
    """Bring in a Mamba checkpoint: a Hugging Face folder (MambaForCausalLM) or the original state-spaces layout.

    Example: mossquant import mamba-130m-hf -o mamba
    """
    from mossquant.importing.mamba import import_mamba

    with terminal.bar("importing") as shown:
        imported = import_mamba(source, output, tokenizer=tokenizer, dtype=dtype, force=force, progress=shown)
    for note in imported.notes:
        terminal.say(note)
    terminal.show(f"{output}: imported; quantize it with: {command_line('quantize', output, '-o', f'{output}-int4')}")


def quantize(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
    output: options.MaybeOutput = None,
    recipe: options.Recipe = "int4",
    stats: Annotated[
        Path | None, typer.Option(help="what `mossquant calibrate` wrote, for solvers that need it")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="bits a weight, bytes, time of a token, or KL: 4.75bpw, 40MB, 8ms, kl=0.01; the recipe's if not given"
        ),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="what a token costs on a machine, for a budget of time: moss-costs wrote it")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="where it must run, with commas between; the recipe's if not given")
    ] = None,
    text: options.CalibrationTexts = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="what groups lose, a file that `sensitivity` wrote; measured if not given")
    ] = None,
    recover: Annotated[
        str | None, typer.Option(help="tokens of the text to distil over, e.g. 250k or 1M; the recipe's if not given")
    ] = None,
    recover_activations: Annotated[
        Literal["fp32", "planned"] | None,
        typer.Option(help="inputs of the linears while distilling: fp32, or as planned; the recipe's if not given"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, bytes, disk and memory; write nothing")
    ] = False,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    picture: options.Picture = None,
    force: options.Force = False,
    json: options.Json = None,
) -> None:
    """Run a recipe on a checkpoint: every tensor to int8 or int4, or kept with a reason in the ledger.

    Example: mossquant quantize tiny -r int4 -o tiny-int4
    """
    from mossquant.calibration.quantize import quantize as run
    from mossquant.eval.report.chart import frontier_chart, write_chart
    from mossquant.eval.report.plan_tables import plan_tables
    from mossquant.plan.recipe import recipe_files

    options.check_json(json, model, *recipe_files(recipe), *(text or ()), sensitivity, stats, costs, output=output)
    options.check_picture(
        picture, model, *recipe_files(recipe), *(text or ()), sensitivity, stats, costs, output=output
    )
    if picture is not None and not (text or sensitivity or recipe.endswith("-best")):
        raise InputError(
            "--picture draws what other budgets lose on text; give --text, --sensitivity or a -best recipe"
        )
    if output is None and not dry_run:
        raise InputError(options.NO_OUTPUT)
    options.use_threads(threads)
    with terminal.bar("quantizing") as shown:
        plan = run(
            model,
            output or Path(),
            recipe=recipe,
            budget=budget,
            costs=costs,
            targets=None if targets is None else [name.strip() for name in targets.split(",")],
            text=text or (),
            sensitivities=sensitivity,
            stats=stats,
            recover=None if recover is None else options.token_count(recover),
            recover_activations=recover_activations,
            device=device,
            force=force,
            dry_run=dry_run,
            said=terminal.say,
            progress=shown,
        )
    results = plan_tables(plan)
    if not dry_run:
        results.append(f"{output}: lower it with: {command_line('export', str(output), '-o', f'{output}-onnx')}")
    options.finish(json, plan, *results)
    if picture is not None:
        write_chart(*frontier_chart(plan), picture)


def recipes() -> None:
    """The named recipes: what each turns every role of tensor into, and why some are kept.

    Example: mossquant recipes
    """
    from mossquant.eval.report.plan_tables import recipe_tables

    terminal.show(*recipe_tables())


def export(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a checkpoint, quantized or not, or tiny")],
    output: options.MaybeOutput = None,
    target: Annotated[str, typer.Option(help="onnx, executorch, native, or several with commas between")] = "onnx",
    activations: Annotated[
        Literal["int8", "fp32"] | None, typer.Option(help="inputs of the linears; as planned if not given")
    ] = None,
    scales: Annotated[
        Literal["folded", "initializers"] | None,
        typer.Option(help="of onnx: folded at load (if not given), or larger initializers, as fast without folding"),
    ] = None,
    isa: Annotated[
        Literal["host", "x86", "arm", "rows"] | None,
        typer.Option(
            help="of native, and of executorch with kernels of ours: packed for this machine (host, if not given), "
            "x86, arm, or none in particular"
        ),
    ] = None,
    kernels: Annotated[
        Literal["stock", "mossquant"] | None,
        typer.Option(help="of executorch: its own and XNNPACK's (stock, if not given), or ours, packed as --isa says"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the disk and memory needed; write nothing")] = False,
    force: options.Force = False,
) -> None:
    """Lower a checkpoint, quantized or not, to an artifact: programs, tokenizer and manifest.

    Example: mossquant export tiny-int4 --target onnx,executorch -o tiny-int4-app
    """
    from mossquant.checkpoint.locate import is_bundled_tokenizer
    from mossquant.eval.report.tables import needs_table
    from mossquant.targets.artifact import TOKENIZER
    from mossquant.targets.export import export as run
    from mossquant.targets.export import export_needs
    from mossquant.text.tokenizer import Tokenizer

    targets = [name.strip() for name in target.split(",")]
    if dry_run:
        needs = export_needs(model, target=targets, activations=activations, scales=scales, isa=isa, kernels=kernels)
        terminal.show(needs_table(needs))
        return
    if output is None:
        raise InputError(options.NO_OUTPUT)
    with terminal.bar("lowering") as shown:
        artifact = run(
            model,
            output,
            target=targets,
            activations=activations,
            scales=scales,
            isa=isa,
            kernels=kernels,
            force=force,
            progress=shown,
        )
    for note in artifact.notes:
        terminal.say(note)
    programs = [artifact.program(name) for name in artifact.targets]
    for program in programs:
        terminal.show(f"{program}: {artifact.files[program.name].bytes:,} bytes")
    words = ["verify", model, *map(str, programs)]
    tokenizer = artifact.files.get(TOKENIZER)
    # The bundled text is for the bundled tokenizer; without a tokenizer, any but a model of bytes takes ids only.
    vocabulary = artifact.manifest.programs[artifact.targets[0]].model["config"]["vocab_size"]
    if tokenizer is None and vocabulary != Tokenizer.byte_level().vocab_size:
        words += ["--ids", "FILE.npy"]
    elif tokenizer is None or not is_bundled_tokenizer(tokenizer.sha256):
        words += ["--text", "FILE"]
    terminal.show(f"verify with: {command_line(*words)}")
