# SPDX-License-Identifier: Apache-2.0
"""The `mossquant` command: one verb a function, each a thin shell over one documented function of the package.

Exit status: 0 done; 1 a gate failed (accuracy, parity); 2 bad input or usage, with one line that says what, where and
what to do; 70 an error that we did not foresee. Results go to stdout, progress and notes to stderr.
"""

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mossquant.cli.calibrate import calibrate, prune, sensitivity
from mossquant.cli.generate import generate
from mossquant.cli.make import demo, export, import_, quantize, recipes, train
from mossquant.cli.measure import bench, compare, info, native_path, perplexity, verify
from mossquant.cli.terminal import ReaderGone, drop_stdout, terminal
from mossquant.errors import InputError
from mossquant.release import release

app = typer.Typer(
    name="mossquant",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune and quantize MossNet and Mamba language models, lower them for phones, and measure what ships.",
    epilog="PATH is a checkpoint folder, a quantized checkpoint folder, an .onnx, .pte or .moss file, an artifact "
    "folder, or tiny (bundled). --quiet (no progress) and --debug (traceback of our own errors) may stand anywhere.",
)

_QUIET, _DEBUG = "--quiet", "--debug"
_BAD_INPUT, _UNFORESEEN, _STOPPED = 2, 70, 130
# Errors of the system that are the user's to mend, not ours: a full disk, a file-size limit, a forbidden folder.
_OF_THE_SYSTEM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG),
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if show_version:
        terminal.show(f"mossquant {release()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


_MAKING = (demo, info, train, import_, calibrate, sensitivity, prune, quantize, recipes, export)
for _verb in (*_MAKING, perplexity, compare, verify, generate, bench, native_path):
    app.command(_verb.__name__.rstrip("_").replace("_", "-"))(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. `arguments` are without the program's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # After "--" there are no options: a prompt may be spelled like one.
    end = words.index("--") if "--" in words else len(words)
    ours, rest = words[:end], words[end:]
    terminal.start(quiet=_QUIET in ours)
    debug = _DEBUG in ours
    try:
        command = typer.main.get_command(app)
        passed_on = [word for word in ours if word not in (_QUIET, _DEBUG)] + rest
        with terminal.alone(), command.make_context("mossquant", passed_on) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except ReaderGone:
        return 0
    except KeyboardInterrupt:
        terminal.complain("stopped")
        return _STOPPED
    except Exception as error:  # the one place where anything may be caught: what nobody is to mend is status 70
        message = _to_mend(error)
        if message is not None:
            terminal.complain(message)
            return _BAD_INPUT
        if debug:
            traceback.print_exception(error)
        terminal.complain(
            f"an error that we did not foresee ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "please report it, with the output of the same command and --debug"
        )
        return _UNFORESEEN
    return 0


def _to_mend(error: Exception) -> str | None:
    """What to tell the user about an error that is the user's to mend; None for one of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, typer.exceptions.TyperException):
        context: Any = getattr(error, "ctx", None)
        command = "mossquant" if context is None else context.command_path
        said = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
        return f"{said}; see {command} --help"
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        name = error.filename
        if name and os.access(name, os.F_OK) and not os.access(name, os.R_OK):
            return f"{name} cannot be read ({error.strerror}); give something that you may read"
        return f"{name or 'the output'}: {error.strerror}; free space or choose another path"
    return None


def run() -> None:
    """Entry point of the installed command."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us: nothing comes or goes there
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # results come out under any encoding
    if _DEBUG not in sys.argv:
        warnings.simplefilter("ignore")  # of libraries: a user can do nothing about them
    status = main()
    try:
        sys.stdout.flush()
    except OSError:
        drop_stdout()
    sys.exit(status)


if __name__ == "__main__":
    run()
