# SPDX-License-Identifier: Apache-2.0
"""The `mossquant` command: one verb a function, each a thin shell over one documented function of the package.

Exit status: 0 done; 1 a gate failed (accuracy, parity); 2 bad input or usage, with one line that says what, where and
what to do; 70 an error that we did not foresee. Results go to stdout, progress and notes to stderr.
"""

import errno
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mossquant.errors import InputError

if TYPE_CHECKING:
    from mossquant.trainer import Progress as TrainingProgress

__all__ = ["app", "main"]

app = typer.Typer(
    name="mossquant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize MossNet and Mamba language models, lower them for phones, and measure what ships.",
    epilog="PATH is a checkpoint folder, a quantized checkpoint folder, an .onnx file, an artifact folder, or tiny "
    "(bundled). --quiet (no progress) and --debug (traceback of our own errors) may stand anywhere.",
)

_QUIET, _DEBUG = "--quiet", "--debug"
_UNFORESEEN = 70
# Errors of the system that are the user's to mend, not ours: a full disk, a file-size limit, a forbidden folder.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

_out = Console(highlight=False, soft_wrap=False)
_err = Console(stderr=True, highlight=False)
_quiet = False


class _Reported(Protocol):
    def to_json(self) -> dict[str, Any]: ...


Recipe = Annotated[str, typer.Option("--recipe", "-r", help="int8, int4, or a recipe file (.yaml)")]
Output = Annotated[Path, typer.Option("--output", "-o", help="what to write")]
Force = Annotated[bool, typer.Option("--force", help="replace an output that exists")]
Json = Annotated[Path | None, typer.Option("--json", help="also write the result as JSON to this file")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all of them if not given")]
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


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        _out.print(f"mossquant {version('mossquant')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        _out.print(context.get_help())
        raise typer.Exit


@app.command()
def demo(output: Output = Path("demo"), tokens: Tokens = 65536, threads: Threads = None, json: Json = None) -> None:
    """The main job on the bundled model: quantize, lower, run what came out, and compare it with the original.

    Example: mossquant demo -o demo
    """
    from mossquant.eval.demo import demo as run
    from mossquant.eval.tables import demo_table

    _json_free(json)
    with _bar("measuring") as shown:
        report = run(output, tokens=tokens or 65536, threads=threads, said=_say, progress=shown)
    _out.print(demo_table(report))
    for line in report.closing():
        _out.print(line, soft_wrap=True)
    _write_json(json, report)


@app.command()
def info(path: Annotated[str, typer.Argument(metavar="PATH")], json: Json = None) -> None:
    """What a checkpoint, quantized checkpoint or artifact is: shapes, experts, bytes by format, ledger, hashes.

    Example: mossquant info tiny
    """
    from mossquant.eval.info import info as run
    from mossquant.eval.tables import info_tables

    _json_free(json)
    report = run(path)
    for table in info_tables(report):
        _out.print(table)
    _write_json(json, report)


@app.command()
def train(
    output: Output,
    text: Annotated[list[str], typer.Option("--text", help="text file, or python-stdlib; may be repeated")],
    preset: Annotated[str, typer.Option("--preset", help="tiny, 8x30m, 8x200m or 8x1.5b")] = "tiny",
    tokenizer: Annotated[Literal["bpe", "bytes"], typer.Option("--tokenizer", help="bpe, or bytes")] = "bpe",
    steps: Annotated[int, typer.Option("--steps", min=1, help="optimizer steps")] = 5000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="windows a step; half of them carry state")] = 16,
    window: Annotated[int, typer.Option("--window", min=2, help="tokens a window")] = 256,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="peak learning rate")] = 3e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="initial weights and order of the text")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="cpu or cuda")] = "cpu",
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], typer.Option("--dtype", help="stored type")
    ] = "bfloat16",
    work: Annotated[Path | None, typer.Option("--work", help="work folder; OUTPUT.training if not given")] = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Train a MossNet from text. A killed run goes on from its last snapshot when the same command is given again.

    Example: mossquant train --preset tiny --text book.txt -o my-model --steps 1000
    """
    import torch

    from mossquant.trainer import Schedule
    from mossquant.training import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    if not 0 < learning_rate < 1:
        raise InputError(f"--learning-rate {learning_rate} is not between 0 and 1; 0.003 suits the presets")
    schedule = Schedule(steps=steps, batch=batch, window=window, peak_lr=learning_rate, seed=seed)
    with _training_bar(steps) as shown:
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
            said=_say,
        )
    _out.print(f"{trained.output}: {trained.tokens} tokens seen, {trained.loss:.3f} nats a token at the end")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FOLDER")],
    output: Output,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="a tokenizer.json to take along")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"] | None,
        typer.Option("--dtype", help="stored type; as it is if not given"),
    ] = None,
    force: Force = False,
) -> None:
    """Bring in a Mamba checkpoint: a Hugging Face folder (MambaForCausalLM) or the original state-spaces layout.

    Example: mossquant import mamba-130m-hf -o mamba
    """
    from mossquant.importing import import_mamba

    imported = import_mamba(Path(source), output, tokenizer=tokenizer, dtype=dtype, force=force)
    for note in imported.notes:
        _say(note)
    _out.print(f"{output}: imported; quantize it with: mossquant quantize {output} -r int4 -o {output}-int4")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="PATH")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    recipe: Recipe = "int4",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, bytes, disk and memory; write nothing")
    ] = False,
    force: Force = False,
    json: Json = None,
) -> None:
    """Run a recipe on a checkpoint: every tensor to int8 or int4, or kept with a reason in the ledger.

    Example: mossquant quantize tiny -r int4 -o tiny-int4
    """
    from mossquant.calibration.quantize import quantize as run
    from mossquant.eval.tables import plan_tables

    _json_free(json)
    if output is None and not dry_run:
        raise InputError("no output folder was given; say where to write with -o FOLDER, or look first with --dry-run")
    with _named_bar("quantizing") as shown:
        plan = run(model, output or Path(), recipe=recipe, force=force, dry_run=dry_run, progress=shown)
    for table in plan_tables(plan):
        _out.print(table)
    if not dry_run:
        _out.print(f"{output}: lower it with: mossquant export {output} --target onnx -o {output}-onnx", soft_wrap=True)
    _write_json(json, plan)


@app.command()
def recipes() -> None:
    """The named recipes: what each turns every role of tensor into, and why some are kept.

    Example: mossquant recipes
    """
    from mossquant.eval.tables import recipe_tables

    for table in recipe_tables():
        _out.print(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="PATH")],
    output: Output,
    target: Annotated[str, typer.Option("--target", help="onnx")] = "onnx",
    activations: Annotated[
        Literal["int8", "fp32"] | None,
        typer.Option("--activations", help="inputs of the linears; as planned if not given"),
    ] = None,
    force: Force = False,
) -> None:
    """Lower a checkpoint, quantized or not, to an artifact: program, tokenizer and manifest.

    Example: mossquant export tiny-int4 --target onnx -o tiny-int4-onnx
    """
    from mossquant.targets.export import export as run

    with _named_bar("lowering") as shown:
        artifact = run(model, output, target=target, activations=activations, force=force, progress=shown)
    for note in artifact.notes:
        _say(note)
    _out.print(f"{artifact.program}: {artifact.bytes} bytes", soft_wrap=True)


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="PATH")],
    text: TextOption = None,
    tokens: Tokens = None,
    streams: Streams = 1,
    activations: RunActivations = None,
    threads: Threads = None,
    allow_seen: AllowSeen = False,
    json: Json = None,
) -> None:
    """Measure one model or artifact: nats a token, perplexity, bits a byte.

    Example: mossquant perplexity tiny --tokens 65536
    """
    from mossquant.eval.perplexity import perplexity as run
    from mossquant.eval.tables import perplexity_table

    _json_free(json)
    with _bar("measuring") as shown:
        report = run(
            model,
            text=text,
            tokens=tokens,
            streams=streams,
            activations=activations,
            threads=threads,
            allow_seen=allow_seen,
            progress=shown,
        )
    _out.print(perplexity_table(report))
    _write_json(json, report)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...")],
    text: TextOption = None,
    tokens: Tokens = None,
    streams: Streams = 1,
    max_ppl_increase: Annotated[
        str | None, typer.Option("--max-ppl-increase", help="gate: exit status 1 above it, e.g. 1%")
    ] = None,
    activations: RunActivations = None,
    threads: Threads = None,
    allow_seen: AllowSeen = False,
    json: Json = None,
) -> None:
    """Measure candidates against the original on the same tokens: perplexity, KL, top-1 agreement, bytes.

    Example: mossquant compare tiny tiny-int4 tiny-int4-onnx --max-ppl-increase 2%
    """
    from mossquant.eval.compare import compare as run
    from mossquant.eval.tables import comparison_table

    _json_free(json)
    gate = None if max_ppl_increase is None else _percent(max_ppl_increase)
    with _bar("measuring") as shown:
        report = run(
            base,
            candidates,
            text=text,
            tokens=tokens,
            streams=streams,
            max_ppl_increase=gate,
            activations=activations,
            threads=threads,
            allow_seen=allow_seen,
            progress=shown,
        )
    _out.print(comparison_table(report))
    _write_json(json, report)
    if report.gate_failed:
        _err.print(f"gate failed: perplexity rose by more than {max_ppl_increase}", soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def verify(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED")],
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT...")],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="read back the weights and stop")] = False,
    text: TextOption = None,
    positions: Annotated[int, typer.Option("--positions", min=1, help="single steps that are compared")] = 2000,
    stream: Annotated[int, typer.Option("--stream", min=64, help="tokens run freely and compared")] = 20000,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Hold an artifact against its quantized checkpoint: every weight read back from the file, then run side by side.

    Example: mossquant verify tiny-int4 tiny-int4-onnx
    """
    from mossquant.eval.tables import parity_table
    from mossquant.eval.verify import verify as run

    _json_free(json)
    with _bar("comparing") as shown:
        report = run(
            quantized,
            artifacts,
            weights_only=weights_only,
            text=text,
            positions=positions,
            stream=stream,
            threads=threads,
            progress=shown,
        )
    _out.print(parity_table(report))
    _write_json(json, report)
    if not report.passed:
        for line in report.failures():
            _err.print(line, soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="PATH")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="- reads stdin")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="read the prompt from a file")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="most tokens to add")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the likeliest tokens of this total")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draws")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="end before this string; may be repeated")] = None,
    threads: Threads = None,
) -> None:
    """Continue a prompt (argument, file, or stdin) with a model or artifact, token by token.

    Example: mossquant generate tiny "def main(" --max-tokens 64
    """
    from mossquant.eval.generate import generate as run
    from mossquant.eval.open import open_model

    given = _prompt(prompt, prompt_file)
    opened = open_model(model, threads=threads)
    tokenizer = opened.tokenizer

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    run(
        opened.runner,
        tokenizer,
        given,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        on_text=write,
    )
    write("\n")


@app.command()
def bench(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...")],
    threads: Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="tokens of the prefill")] = 512,
    decode: Annotated[int, typer.Option("--decode", min=1, help="steps of the decode")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="turns that count")] = 5,
    json: Json = None,
) -> None:
    """Time models and artifacts in turn: prefill and decode tokens a second, load time, memory.

    Example: mossquant bench tiny tiny-int4-onnx
    """
    from mossquant.eval.bench import bench as run
    from mossquant.eval.tables import bench_table

    _json_free(json)
    with _bar("timing") as shown:
        report = run(paths, threads=threads, prompt=prompt, decode=decode, repeats=repeats, progress=shown)
    _out.print(bench_table(report))
    _write_json(json, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. `arguments` are without the program's name."""
    global _quiet
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = given[: given.index("--")] if "--" in given else given
    _quiet, debug = _QUIET in ours, _DEBUG in ours
    given = [item for item in given if item not in (_QUIET, _DEBUG)]
    try:
        status = app(given, prog_name="mossquant", standalone_mode=False)
    except InputError as error:
        return _refuse(str(error))
    except typer.exceptions.TyperException as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see mossquant --help")
    except OSError as error:
        if error.errno == errno.EPIPE:
            return 0
        if error.errno in _SYSTEM:
            return _refuse(f"{error.filename or 'output'}: {error.strerror}; free space or choose another path")
        return _unforeseen(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        _err.print("stopped")
        return 130
    except Exception as error:  # the one place where anything may be caught: it becomes status 70
        return _unforeseen(error, debug)
    return status if isinstance(status, int) else 0


def _refuse(message: str) -> int:
    sys.stderr.write(f"mossquant: {' '.join(message.split())}\n")
    return 2


def _unforeseen(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    name = type(error).__name__
    sys.stderr.write(
        f"mossquant: an error that we did not foresee ({name}: {' '.join(str(error).split())[:200]}); "
        "please report it, with the output of the same command and --debug\n"
    )
    return _UNFORESEEN


def _say(line: str) -> None:
    if not _quiet:
        _err.print(line, soft_wrap=True, markup=False)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a function of (done, all)."""
    with _named_bar(what) as shown:
        yield lambda done, total: shown("", done, total)


@contextmanager
def _named_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, as a function of (name of what is being worked on, done, all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=_quiet or not _err.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def shown(name: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"{what} {name}".rstrip())

        yield shown


@contextmanager
def _training_bar(steps: int) -> Iterator[Callable[["TrainingProgress"], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, disable=_quiet) as progress:
        task = progress.add_task("training", total=steps)

        def shown(step: "TrainingProgress") -> None:
            text = f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s"
            progress.update(task, completed=step.step, description=text)

        yield shown


def _json_free(path: Path | None) -> None:
    """A report may replace an older one, but not a folder."""
    from mossquant.outputs import check_free

    if path is not None:
        check_free(path, force=not path.is_dir())


def _write_json(path: Path | None, report: _Reported) -> None:
    from mossquant.outputs import json_bytes, new_file

    if path is not None:
        with new_file(path, force=True) as partial:
            partial.write_bytes(json_bytes(report.to_json()))


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--max-ppl-increase {text!r} is not a percentage; give one like 1% or 0.5%") from None


def _prompt(argument: str | None, file: Path | None) -> str | bytes:
    if file is not None:
        if argument is not None:
            raise InputError("a prompt and --prompt-file were both given; give one of them")
        from mossquant.text import read_text

        return read_text(file, as_bytes=True).data
    if argument == "-" or (argument is None and not sys.stdin.isatty()):
        return sys.stdin.buffer.read()
    if argument is None:
        raise InputError("no prompt was given; give it as an argument, with --prompt-file, or on stdin")
    return argument


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
