# SPDX-License-Identifier: Apache-2.0
"""The `mossquant` command: one verb a function, each a thin shell over one documented function of the package.

Exit status: 0 done; 1 a gate failed (accuracy, parity); 2 bad input or usage, with one line that says what, where and
what to do; 70 an error that we did not foresee. Results go to stdout, progress and notes to stderr.
"""

import errno
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from mossquant.cli.terminal import ReaderGone, Terminal, drop_stdout
from mossquant.errors import InputError
from mossquant.release import release

__all__ = ["app", "main"]

app = typer.Typer(
    name="mossquant",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize MossNet and Mamba language models, lower them for phones, and measure what ships.",
    epilog="PATH is a checkpoint folder, a quantized checkpoint folder, an .onnx or .pte file, an artifact folder, or "
    "tiny (bundled). --quiet (no progress) and --debug (traceback of our own errors) may stand anywhere.",
)

_QUIET, _DEBUG = "--quiet", "--debug"
_GATE_FAILED, _BAD_INPUT, _UNFORESEEN, _STOPPED = 1, 2, 70, 130
# Errors of the system that are the user's to mend, not ours: a full disk, a file-size limit, a forbidden folder.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG)

_MOST_THREADS = 1024
_MOST_TOKENS = 1 << 24
_MOST_REPEATS = 10_000
_MOST_PROMPT = 1 << 24  # bytes
_MOST_SEED = (1 << 63) - 1
_NO_OUTPUT = "no output folder was given; say where to write with -o FOLDER, or look first with --dry-run"

_terminal = Terminal(quiet=False)


class _Reported(Protocol):
    def to_json(self) -> dict[str, Any]: ...


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


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        _terminal.show(f"mossquant {release()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command()
def demo(output: Output = Path("demo"), tokens: Tokens = 65536, threads: Threads = None, json: Json = None) -> None:
    """The main job on the bundled model: quantize, lower, run what came out, and compare it with the original.

    Example: mossquant demo -o demo
    """
    from mossquant.eval.report.demo import demo as run
    from mossquant.eval.report.tables import demo_table

    _json_free(json, output=output)
    with _terminal.bar("measuring") as shown:
        report = run(output, tokens=tokens or 65536, threads=threads, said=_terminal.say, progress=shown)
    _terminal.show(demo_table(report), *report.closing())
    _write_json(json, report)


@app.command()
def info(path: Model, json: Json = None) -> None:
    """What a checkpoint, quantized checkpoint or artifact is: shapes, experts, bytes by format, ledger, hashes.

    Example: mossquant info tiny
    """
    from mossquant.eval.info import info as run
    from mossquant.eval.report.tables import info_tables

    _json_free(json, path)
    report = run(path)
    _terminal.show(*info_tables(report))
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
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=_MOST_SEED, help="initial weights and order of the text")
    ] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="cpu or cuda")] = "cpu",
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], typer.Option("--dtype", help="stored type")
    ] = "bfloat16",
    work: Annotated[Path | None, typer.Option("--work", help="work folder; OUTPUT.training if not given")] = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Train a MossNet from text. A killed run goes on from its last snapshot when the same command is given again.

    Example: mossquant train --text book.txt -o my-model --steps 1000
    """
    import torch

    from mossquant.training.train import train as run
    from mossquant.training.trainer import Schedule

    if threads is not None:
        torch.set_num_threads(threads)
    if not 0 < learning_rate < 1:
        raise InputError(f"--learning-rate {learning_rate} is not between 0 and 1; 0.003 suits the presets")
    schedule = Schedule(steps=steps, batch=batch, window=window, peak_lr=learning_rate, seed=seed)
    with _terminal.training_bar(steps) as shown:
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
            said=_terminal.say,
        )
    _terminal.show(f"{trained.output}: {trained.tokens:,} tokens seen, {trained.loss:.3f} nats a token at the end")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="the Mamba, or a MossNet to add a tokenizer to")],
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
    from mossquant.importing.mamba import import_mamba

    imported = import_mamba(source, output, tokenizer=tokenizer, dtype=dtype, force=force)
    for note in imported.notes:
        _terminal.say(note)
    _terminal.show(f"{output}: imported; quantize it with: {_next('quantize', output, '-o', f'{output}-int4')}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a full-precision checkpoint, or tiny")],
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
    from mossquant.eval.report.tables import plan_tables
    from mossquant.plan.recipe import recipe_files

    _json_free(json, model, *recipe_files(recipe), output=output)
    if output is None and not dry_run:
        raise InputError(_NO_OUTPUT)
    with _terminal.named_bar("quantizing") as shown:
        plan = run(model, output or Path(), recipe=recipe, force=force, dry_run=dry_run, progress=shown)
    _terminal.show(*plan_tables(plan))
    if output is not None and not dry_run:
        _terminal.show(f"{output}: lower it with: {_next('export', output, '-o', f'{output}-onnx')}")
    _write_json(json, plan)


@app.command()
def recipes() -> None:
    """The named recipes: what each turns every role of tensor into, and why some are kept.

    Example: mossquant recipes
    """
    from mossquant.eval.report.tables import recipe_tables

    _terminal.show(*recipe_tables())


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="PATH", help="a checkpoint, quantized or not, or tiny")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    target: Annotated[str, typer.Option("--target", help="onnx, executorch, or both with a comma between")] = "onnx",
    activations: Annotated[
        Literal["int8", "fp32"] | None,
        typer.Option("--activations", help="inputs of the linears; as planned if not given"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the disk and memory needed; write nothing")] = False,
    force: Force = False,
) -> None:
    """Lower a checkpoint, quantized or not, to an artifact: programs, tokenizer and manifest.

    Example: mossquant export tiny-int4 --target onnx,executorch -o tiny-int4-app
    """
    from mossquant.eval.report.tables import needs_table
    from mossquant.targets.export import export as run
    from mossquant.targets.export import export_needs

    targets = [name.strip() for name in target.split(",")]
    if dry_run:
        _terminal.show(needs_table(export_needs(model, target=targets, activations=activations)))
        return
    if output is None:
        raise InputError(_NO_OUTPUT)
    with _terminal.named_bar("lowering") as shown:
        artifact = run(model, output, target=targets, activations=activations, force=force, progress=shown)
    for note in artifact.notes:
        _terminal.say(note)
    programs = [artifact.program(name) for name in artifact.targets]
    for program in programs:
        _terminal.show(f"{program}: {artifact.files[program.name].bytes:,} bytes")
    _terminal.show(f"verify with: {_next('verify', model, *programs)}")


@app.command()
def perplexity(
    model: Model,
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
    from mossquant.eval.report.tables import perplexity_table

    _json_free(json, model, text)
    with _terminal.bar("measuring") as shown:
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
    _terminal.show(perplexity_table(report))
    _write_json(json, report)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the original; usually the full-precision checkpoint")],
    candidates: Annotated[
        list[str], typer.Argument(metavar="CANDIDATE", help="checkpoints and artifacts to compare with it")
    ],
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

    Example: mossquant compare tiny tiny-int4 tiny-int4-onnx --max-ppl-increase 6%
    """
    from mossquant.eval.compare import compare as run
    from mossquant.eval.report.tables import comparison_table

    _json_free(json, base, *candidates, text)
    gate = None if max_ppl_increase is None else _percent(max_ppl_increase)
    with _terminal.bar("measuring") as shown:
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
    _terminal.show(comparison_table(report))
    _write_json(json, report)
    if report.gate_failed:
        _terminal.warn(f"gate failed: perplexity rose by more than {str(max_ppl_increase).removesuffix('%')}%")
        raise typer.Exit(_GATE_FAILED)


@app.command()
def verify(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="the checkpoint that it was lowered from")],
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT", help="an .onnx, a .pte, or the folder of one")],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="read back the weights and stop")] = False,
    text: TextOption = None,
    positions: Annotated[int, typer.Option("--positions", min=1, help="single steps that are compared")] = 2000,
    stream: Annotated[int, typer.Option("--stream", min=128, help="tokens run freely and compared")] = 20000,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Hold an artifact against its quantized checkpoint: every weight read back from the file, then run side by side.

    Example: mossquant verify tiny-int4 tiny-int4-onnx
    """
    from mossquant.eval.report.tables import parity_table
    from mossquant.eval.verify import verify as run

    _json_free(json, quantized, *artifacts, text)
    with _terminal.bar("comparing") as shown:
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
    _terminal.show(parity_table(report))
    _write_json(json, report)
    if not report.passed:
        for line in report.failures():
            _terminal.warn(line)
        raise typer.Exit(_GATE_FAILED)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="text to continue; - reads stdin")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="read the prompt from a file")] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            min=0,
            max=_MOST_TOKENS,
            help="most tokens to add; 0 with --save-state only reads the prompt",
        ),
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the likeliest tokens of this total")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=_MOST_SEED, help="of the draws")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="end before this string; may be repeated")] = None,
    load_state: Annotated[
        Path | None, typer.Option("--load-state", help="go on from this file; the prompt is what follows, if anything")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", help="write where the text stands at the end to this file")
    ] = None,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Continue a prompt (argument, file, or stdin) with a model or artifact, token by token.

    Example: mossquant generate tiny "def main(" --max-tokens 64
    """
    from mossquant.eval.generate import continue_text as run
    from mossquant.eval.open import open_model
    from mossquant.state_file import check_state_free

    if save_state is not None:
        check_state_free(save_state, force=force, inputs=[_read_at(model)])
    given = _prompt(prompt, prompt_file, needed=load_state is None)
    opened = open_model(model, threads=threads)
    tokenizer = opened.tokenizer

    def write(piece: str) -> None:
        try:
            _terminal.write(piece)
        except ReaderGone:
            if save_state is None:  # the state that was asked for is saved, whether somebody reads the text or not
                raise

    run(
        opened.runner,
        tokenizer,
        given,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        load_state=load_state,
        save_state=save_state,
        force=force,
        on_text=write,
    )
    if max_tokens > 0:
        write("\n")
    if save_state is not None:
        _terminal.say(f"{save_state}: go on with: {_next('generate', model, 'PROMPT', '--load-state', save_state)}")


@app.command()
def bench(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="what to time")],
    threads: Threads = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, max=_MOST_TOKENS, help="tokens of the prefill")] = 512,
    decode: Annotated[int, typer.Option("--decode", min=1, max=_MOST_TOKENS, help="steps of the decode")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=_MOST_REPEATS, help="turns that count")] = 5,
    json: Json = None,
) -> None:
    """Time models and artifacts in turn: prefill and decode tokens a second, load time, memory.

    Example: mossquant bench tiny tiny-int4-onnx
    """
    from mossquant.eval.bench import bench as run
    from mossquant.eval.report.tables import bench_table

    _json_free(json, *paths)
    with _terminal.bar("timing") as shown:
        report = run(paths, threads=threads, prompt=prompt, decode=decode, repeats=repeats, progress=shown)
    _terminal.show(bench_table(report))
    _write_json(json, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. `arguments` are without the program's name."""
    global _terminal
    given = list(sys.argv[1:] if arguments is None else arguments)
    # After "--" there are no options: a prompt may be spelled like one.
    end = given.index("--") if "--" in given else len(given)
    ours, rest = given[:end], given[end:]
    _terminal, debug = Terminal(quiet=_QUIET in ours), _DEBUG in ours
    try:
        command = typer.main.get_command(app)
        words = [word for word in ours if word not in (_QUIET, _DEBUG)] + rest
        with command.make_context("mossquant", words) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except ReaderGone:
        return 0
    except InputError as error:
        return _refuse(str(error))
    except typer.exceptions.TyperException as error:
        return _refuse(_usage(error))
    except OSError as error:
        name = error.filename
        if name and os.access(name, os.F_OK) and not os.access(name, os.R_OK):
            return _refuse(f"{name} cannot be read ({error.strerror}); give something that you may read")
        if error.errno in _FULL + _FORBIDDEN:
            return _refuse(f"{error.filename or 'the output'}: {error.strerror}; free space or choose another path")
        return _unforeseen(error, debug)
    except KeyboardInterrupt:
        _terminal.complain("stopped")
        return _STOPPED
    except Exception as error:  # the one place where anything may be caught: it becomes status 70
        return _unforeseen(error, debug)
    return 0


def _usage(error: typer.exceptions.TyperException) -> str:
    context: Any = getattr(error, "ctx", None)
    command = "mossquant" if context is None else context.command_path
    said = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    return f"{said}; see {command} --help"


def _refuse(message: str) -> int:
    _terminal.complain(message)
    return _BAD_INPUT


def _unforeseen(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    name = type(error).__name__
    _terminal.complain(
        f"an error that we did not foresee ({name}: {' '.join(str(error).split())[:200]}); "
        "please report it, with the output of the same command and --debug"
    )
    return _UNFORESEEN


def _next(*words: str | Path) -> str:
    """A command to try next, for a shell."""
    return shlex.join(["mossquant", *map(str, words)])


def _json_free(path: Path | None, *inputs: str | Path | None, output: Path | None = None) -> None:
    """A report may replace a .json file, but nothing else, and lies neither in an input nor in the output.

    Raises:
        InputError: it would, or cannot be written.
    """
    from mossquant.files.outputs import check_apart, check_free, check_outside

    if path is None:
        return
    check_free(path, force=True, as_file=True, inputs=[_read_at(each) for each in inputs if each])
    check_apart(path, [] if output is None else [output], role="output")
    check_outside(path)
    if path.exists() and path.suffix != ".json":
        raise InputError(f"{path} exists already, and a report replaces .json files only; choose another path")


def _read_at(given: str | Path) -> Path:
    """Where an argument is read from."""
    from mossquant.checkpoint.locate import BUNDLED, asset_folder

    return asset_folder(BUNDLED) if given == BUNDLED else Path(given)


def _write_json(path: Path | None, report: _Reported) -> None:
    from mossquant.files.outputs import json_bytes, new_file

    if path is not None:
        with new_file(path, force=path.suffix == ".json") as partial:
            partial.write_bytes(json_bytes(report.to_json()))


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--max-ppl-increase {text!r} is not a percentage; give one like 1% or 0.5%") from None


def _prompt(argument: str | None, file: Path | None, *, needed: bool) -> str | bytes:
    """What to continue; where none is `needed`, a terminal is not read from."""
    if file is not None:
        if argument is not None:
            raise InputError("a prompt and --prompt-file were both given; give one of them")
        from mossquant.text.text import read_text

        return read_text(file, as_bytes=True, largest=_MOST_PROMPT).data
    if argument == "-" or (argument is None and not sys.stdin.isatty()):
        try:
            data = sys.stdin.buffer.read(_MOST_PROMPT + 1)
        except OSError as error:
            raise InputError(f"stdin cannot be read ({error.strerror}); give the prompt as an argument") from None
        if len(data) > _MOST_PROMPT:
            raise InputError(f"the prompt on stdin is larger than {_MOST_PROMPT >> 20} MB; give a shorter one")
        return data
    if argument is None and needed:
        raise InputError("no prompt was given; give it as an argument, with --prompt-file, or on stdin")
    return argument or ""


def run() -> None:
    """Entry point of the installed command."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: nothing comes or goes there
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # results come out under any encoding
    status = main()
    try:
        sys.stdout.flush()
    except OSError:
        drop_stdout()
    sys.exit(status)


if __name__ == "__main__":
    run()
