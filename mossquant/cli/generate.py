# SPDX-License-Identifier: Apache-2.0
"""The verb that writes text: `generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mossquant.cli.options import MOST_SEED, MOST_TOKENS, Force, Model, Threads
from mossquant.cli.terminal import ReaderGone, command_line, terminal
from mossquant.errors import InputError

_MOST_PROMPT = 1 << 24  # bytes


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="text to continue; - reads stdin")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="read the prompt from a file")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is the user's turn in a conversation")] = False,
    messages: Annotated[
        Path | None,
        typer.Option("--messages", metavar="FILE", help="continue the conversation in this JSON file, a list of turns"),
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="what spells a special token in prompt and stop strings is that token")
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            min=0,
            max=MOST_TOKENS,
            help="most tokens to add; 0 with --save-state only reads the prompt",
        ),
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the likeliest tokens of this total")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="of the draws")] = 0,
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
    from mossquant.eval.generate import generate as run
    from mossquant.files.json import read_json

    def write(piece: str) -> None:
        try:
            terminal.write(piece)
        except ReaderGone:
            if save_state is None:  # the state that was asked for is saved, whether somebody reads the text or not
                raise

    turns = None
    if messages is not None:
        if prompt is not None or prompt_file is not None or chat:
            raise InputError("--messages is the whole conversation; leave the prompt and --chat out")
        turns = read_json(messages, largest=_MOST_PROMPT, advice="give a list of messages in JSON") or []
    generation = run(
        model,
        "" if messages is not None else _prompt(prompt, prompt_file, needed=load_state is None),
        messages=turns,
        chat=chat,
        special=special,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        load_state=load_state,
        save_state=save_state,
        force=force,
        threads=threads,
        on_text=write,
    )
    if max_tokens > 0:
        write("\n")
    for note in generation.notes:
        terminal.say(note)
    if save_state is not None:
        terminal.say(
            f"{save_state}: go on with: {command_line('generate', model, 'PROMPT', '--load-state', save_state)}"
        )


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
