# SPDX-License-Identifier: Apache-2.0
"""Continue a prompt with any Runner, one token at a time.

    greedy:      argmax of the logits (of several equal ones, the first)
    otherwise:   p = softmax(logits / temperature), the fewest tokens whose probabilities reach top_p, renormalised,
                 one of them drawn by the inverse of the cumulative distribution

Draws come from numpy's default generator, so that a seed gives the same text on every machine as far as the logits are
the same. Probabilities are computed in float64.

A saved state (`mossquant.state_file`) stands after the prompt and everything that was generated, so that the next call
reads what follows and nothing twice.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mossquant import state_file
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.open import open_model
from mossquant.eval.scores import advance, not_finite
from mossquant.runner import Floats, Runner, Tokens
from mossquant.state_file import SavedState
from mossquant.text.chat import render_chat
from mossquant.text.text import Tokenizer
from mossquant.text.tokenizer import decode_utf8

StopReason = Literal["max_tokens", "stop", "end_of_text"]


@dataclass(frozen=True)
class Generation:
    """What `generate` wrote.

    Attributes:
        text: the continuation, without the prompt, cut before the stop string.
        tokens: the tokens it was decoded from, those of a stop string or of the end of the text included.
        prompt_tokens: tokens of the prompt, one that begins the text included.
        reason: why it ended: "max_tokens", "stop" (a stop string came) or "end_of_text" (the model ended the text).
        notes: what may not have been meant: special tokens that were taken as letters, or the other way round.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    reason: StopReason
    notes: tuple[str, ...] = ()


def generate(
    model: str | Path | Weights,
    prompt: str | bytes = "",
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    chat: bool = False,
    special: bool = False,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    load_state: str | Path | None = None,
    save_state: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt with a model or artifact, token by token.

    Args:
        model: a PATH argument, or weights.
        threads: CPU threads; None leaves it to the runtime.

    The other arguments, what is returned and the errors are those of `continue_text`; besides, an `InputError` where
    nothing that runs is at `model`, or it has no tokenizer.
    """
    if save_state is not None:
        inputs = [locate(model).path] if isinstance(model, str | Path) else []
        state_file.check_state_free(save_state, force=force, inputs=inputs)
    opened = open_model(model, threads=threads)
    return continue_text(
        opened.runner,
        opened.tokenizer,
        prompt,
        messages=messages,
        chat=chat,
        special=special,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        load_state=load_state,
        save_state=save_state,
        force=force,
        on_text=on_text,
    )


def continue_text(
    runner: Runner,
    tokenizer: Tokenizer,
    prompt: str | bytes = "",
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    chat: bool = False,
    special: bool = False,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    load_state: str | Path | None = None,
    save_state: str | Path | None = None,
    force: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt, or a saved state and what is said next.

    Args:
        runner: the model.
        tokenizer: its tokenizer.
        prompt: what to continue. In front of it goes the token that begins a text, where the model declares one. An
            empty prompt begins a new text: the model is shown that token, or else the end-of-text token; after
            `load_state` nothing is added, and the text goes on where it stood.
        messages: a conversation in place of a prompt, each turn with `role` and `content`, which the model's chat
            template writes.
        chat: the prompt is the user's turn of a conversation, and the only one.
        special: what spells a special token in the prompt and in `stop` is that token; else it is letters.
        max_tokens: most tokens to add; 0 reads the prompt alone, for `save_state`.
        temperature: 0 is greedy.
        top_p: 0 < top_p ≤ 1; 1 draws from all tokens.
        seed: of the draws.
        stop: strings that end the text; they are looked for in the continuation, also across tokens, and left out. One
            that is a special token also ends the text when that token comes.
        load_state: file of a state, saved by any Runner of this model, that the prompt follows.
        save_state: file to write the state to, after the prompt and all of `Generation.tokens`.
        force: replace a state at `save_state`.
        on_text: is given the text piece by piece as soon as no stop string can begin in it and its characters are
            whole.

    Returns:
        The continuation: what the text of all tokens since the stream began has more than that of the prompt. Bytes
        that never became a character are U+FFFD; where a state is saved, the last ones are left to whoever goes on.

    Raises:
        InputError: an option out of range, an empty prompt for a tokenizer without an end-of-text token, a conversation
            that the model has no template for or that it does not write, a state that cannot be read or written or is
            another model's, or logits that are not finite.
    """
    _check(max_tokens, temperature, top_p, seed, stop, saving=save_state is not None)
    if chat and messages is None:
        turn = prompt if isinstance(prompt, str) else decode_utf8(prompt, "the prompt")
        prompt, messages = "", [{"role": "user", "content": turn}]
    if messages is not None and (prompt or load_state is not None):
        other = "a prompt" if prompt else "a loaded state: a template writes a text from its beginning"
        raise InputError(f"a conversation was given, and {other}; give one of them")
    if save_state is not None:
        state_file.check_state_free(save_state, force=force)
    written = prompt if messages is None else render_chat(tokenizer.declared, messages)
    ids = tokenizer.encode(written, special=special or messages is not None)
    at = None if load_state is None else state_file.load_state(load_state, runner, tokenizer=tokenizer)
    if at is None:
        ids = _new_text(tokenizer, ids, None if messages is not None else tokenizer.beginning_of_text)
    stop_texts, marks = _stops(tokenizer, stop, special=special)
    generator = np.random.default_rng(seed)
    decoder = tokenizer.stream(after=[*(() if at is None else at.recent), *ids])
    text = _StoppingText(stop_texts, on_text, marks.values())
    tokens: list[int] = []
    reason: StopReason = "max_tokens"
    at = _read(runner, ids, at)
    while len(tokens) < max_tokens:
        if not np.isfinite(at.logits[0, -1]).all():
            raise InputError(not_finite(runner, at.tokens - 1))
        token = sample(at.logits[0, -1], generator, temperature=temperature, top_p=top_p)
        tokens.append(token)
        if token in tokenizer.ends:
            reason = "end_of_text"
            break
        if text.add(decoder.step(token) + marks.get(token, "")):
            reason = "stop"
            break
        if len(tokens) < max_tokens:
            at = _read(runner, np.array([token]), at)
    if save_state is None and reason != "stop" and text.add(decoder.finish()):
        reason = "stop"
    if save_state is not None:
        at = _read(runner, np.array(tokens[-1:], np.int64), at)  # the last one was not read yet
        at = replace(at, recent=decoder.ids)
        state_file.save_state(save_state, runner, at, tokenizer=tokenizer, force=force)
    notes = _notes(tokenizer, prompt, messages, stop, special=special)
    return Generation(text.finish(), tuple(tokens), len(ids), reason, notes)


def _new_text(tokenizer: Tokenizer, ids: Tokens, begin: int | None) -> Tokens:
    """The tokens of a prompt [T] that begins a text, `begin` in front unless they begin with it already."""
    if begin is not None and (len(ids) == 0 or ids[0] != begin):
        return np.array([begin, *ids], np.int64)
    if len(ids) > 0:
        return ids
    if tokenizer.end_of_text is None:
        raise InputError("the prompt is empty, and this tokenizer has no end-of-text token; give a prompt")
    return np.array([tokenizer.end_of_text], np.int64)


def _stops(tokenizer: Tokenizer, stop: Sequence[str], *, special: bool) -> tuple[list[str], dict[int, str]]:
    """Strings to look for, and special token → the mark in them that stands for it: a surrogate, which no text has."""
    marks: dict[int, str] = {}

    def mark(found: re.Match[str]) -> str:
        token = tokenizer.special_tokens[found[0]]
        return marks.setdefault(token, chr(0xD800 + len(marks)))

    strings = [] if special else list(stop)
    for string in stop:
        names = sorted(tokenizer.special_in(string), key=len, reverse=True)
        if special and not names:
            strings.append(string)
        elif special or string in names:
            strings.append(re.sub("|".join(map(re.escape, names)), mark, string))
    return strings, marks


def _notes(
    tokenizer: Tokenizer,
    prompt: str | bytes,
    messages: Sequence[Mapping[str, Any]] | None,
    stop: Sequence[str],
    *,
    special: bool,
) -> tuple[str, ...]:
    """What `Generation.notes` says of special tokens that are spelled."""
    if special:
        return ()
    letters = "taken as letters; --special takes them for tokens"
    parts = [("the prompt", prompt, letters)]
    parts += [("a stop string", string, letters) for string in stop if string not in tokenizer.special_tokens]
    for turn in messages or ():
        parts.append((f"a message of {turn['role']}", turn["content"], "taken for tokens, as in the template"))
    spelled = [(where, tokenizer.special_in(text), taken) for where, text, taken in parts]
    return tuple(f"{where} spells {', '.join(names[:8])}, {taken}" for where, names, taken in spelled if names)


def _read(runner: Runner, ids: Tokens, at: SavedState | None) -> SavedState:
    """Where a stream stands after tokens [T] more; None is its beginning."""
    if at is not None and len(ids) == 0:
        return at
    state, before = (runner.initial_state(1), 0) if at is None else (at.state, at.tokens)
    logits, state = advance(runner, ids[None, :], state)
    return SavedState(state, logits, before + len(ids))


def sample(logits: Floats, generator: np.random.Generator, *, temperature: float, top_p: float) -> int:
    """Choose a token from logits [V]; temperature 0 is greedy and draws nothing."""
    if temperature == 0:
        return int(np.argmax(logits))
    below = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):  # next to a very low temperature all but the likeliest vanish
        p = np.exp(below / temperature)
    order = np.argsort(-p, kind="stable")
    cumulative = np.cumsum(p[order] / p.sum())
    # The first token always stays, whatever top_p is.
    kept = int(np.searchsorted(cumulative, min(top_p, cumulative[-1]), side="left")) + 1
    drawn = generator.random() * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative, drawn, side="right")), kept - 1)])


class _StoppingText:
    """Text that grows piece by piece until a stop string is in it; gives out what can no longer be part of one."""

    def __init__(self, stop: Sequence[str], on_text: Callable[[str], None] | None, marks: Iterable[str] = ()) -> None:
        self._stop, self._on_text = tuple(stop), on_text
        self._no_text = dict.fromkeys(map(ord, marks))
        self._given: list[str] = []
        self._held = ""
        self._stopped = False

    def add(self, piece: str) -> bool:
        """Add a piece; True once a stop string is complete."""
        self._held += piece
        places = [at for at in (self._held.find(string) for string in self._stop) if at >= 0]
        if places:
            self._give(min(places))
            self._held, self._stopped = "", True
        else:
            self._give(len(self._held) - self._possible_stop())
        return self._stopped

    def finish(self) -> str:
        """Give out what was held, and return all of the text."""
        self._give(len(self._held))
        return "".join(self._given)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._held)), longest, -1):
                if self._held.endswith(string[:length]):
                    longest = length
                    break
        return longest

    def _give(self, length: int) -> None:
        piece, self._held = self._held[:length].translate(self._no_text), self._held[length:]
        if piece:
            self._given.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


def _check(max_tokens: int, temperature: float, top_p: float, seed: int, stop: Sequence[str], *, saving: bool) -> None:
    offenders = []
    if max_tokens < (0 if saving else 1):
        offenders.append(f"--max-tokens is {max_tokens}, needs 1 or more, or 0 with a state to save")
    if not 0 <= temperature < float("inf"):
        offenders.append(f"--temperature is {temperature}, needs 0 (greedy) or more")
    if not 0 < top_p <= 1:
        offenders.append(f"--top-p is {top_p}, needs more than 0 and at most 1")
    if seed < 0:
        offenders.append(f"--seed is {seed}, needs 0 or more")
    if "" in stop:
        offenders.append("--stop is empty")
    if offenders:
        raise InputError.listing("these options cannot be used", offenders, "Give others.")
