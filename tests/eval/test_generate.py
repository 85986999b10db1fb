# SPDX-License-Identifier: Apache-2.0
"""Generation with scripted models: stop strings across tokens, characters across tokens, ends, draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.errors import InputError
from mossquant.eval.generate import Generation, continue_text, sample
from mossquant.eval.open import open_runner
from mossquant.runner import RunnerInfo, State
from mossquant.text.text import Tokenizer


class Scripted:
    """A Runner whose most likely tokens are a script, whatever it reads."""

    def __init__(self, script: Sequence[int], *, vocab_size: int = 256) -> None:
        self.script = list(script)
        self.read_tokens: list[int] = []
        self.info = RunnerInfo("script", "checkpoint", vocab_size, "fp32", "fp32", "float32", 1, 1, 1, {}, {})

    def initial_state(self, batch: int = 1) -> State:
        return State(-1, batch)

    def __call__(
        self, tokens: NDArray[np.int64], state: State, *, logits: str = "last"
    ) -> tuple[NDArray[np.float32], State]:
        self.read_tokens += tokens[0].tolist()
        at = state.take() + 1
        found = np.zeros((1, 1, self.info.vocab_size), np.float32)
        found[0, 0, self.script[at % len(self.script)]] = 9
        return found, State(at, 1)


def _run(script: bytes, **options: object) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    found = continue_text(
        Scripted(script),  # type: ignore[arg-type]
        Tokenizer.byte_level(),
        "prompt",
        on_text=pieces.append,
        **options,  # type: ignore[arg-type]
    )
    assert "".join(pieces) == found.text
    return found, pieces


def test_greedy_follows_the_logits_and_streams() -> None:
    found, pieces = _run(b"hello world", max_tokens=5)
    assert (found.text, found.reason, found.prompt_tokens) == ("hello", "max_tokens", 6)
    assert pieces == list("hello")
    assert found.tokens == tuple(b"hello")


def test_the_model_reads_the_prompt_and_what_it_wrote_but_not_the_last_token() -> None:
    runner = Scripted(b"abc")
    continue_text(runner, Tokenizer.byte_level(), "xy", max_tokens=3)  # type: ignore[arg-type]
    assert runner.read_tokens == list(b"xyab")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (("lo",), "hel", "stop"),
        (("lo w", "wor"), "hel", "stop"),
        (("x", "lx"), "hello world", "max_tokens"),
        (("o wx", "ld"), "hello wor", "stop"),
        (("hello",), "", "stop"),
        (("d!",), "hello world", "max_tokens"),
    ],
)
def test_stop_strings_across_tokens(stop: tuple[str, ...], text: str, reason: str) -> None:
    found, pieces = _run(b"hello world", max_tokens=11, stop=stop)
    assert (found.text, found.reason) == (text, reason)
    assert all(pieces)


def test_what_might_begin_a_stop_string_is_held_back_and_then_given() -> None:
    seen: list[str] = []
    script = Scripted(b"aab.")
    continue_text(script, Tokenizer.byte_level(), "p", max_tokens=4, stop=("aac",), on_text=seen.append)  # type: ignore[arg-type]
    assert seen == ["aab", "."]


def test_characters_are_given_whole() -> None:
    found, pieces = _run("größe".encode(), max_tokens=7)
    assert pieces == list("größe")
    assert len(found.tokens) == 7


def test_bytes_that_never_become_a_character() -> None:
    found, _ = _run("aé".encode()[:2], max_tokens=2)
    assert found.text == "a\ufffd"


def test_end_of_text_ends() -> None:
    tokenizer = Tokenizer.from_file(asset_folder(BUNDLED) / "tokenizer.json")
    assert tokenizer.end_of_text is not None
    word = tokenizer.encode("import").tolist()
    runner = Scripted([*word, tokenizer.end_of_text, *word], vocab_size=4096)
    found = continue_text(runner, tokenizer, "x", max_tokens=50)  # type: ignore[arg-type]
    assert (found.text, found.reason) == ("import", "end_of_text")
    assert found.tokens[-1] == tokenizer.end_of_text


def test_an_empty_prompt_begins_a_new_text() -> None:
    tokenizer = Tokenizer.from_file(asset_folder(BUNDLED) / "tokenizer.json")
    runner = Scripted([5], vocab_size=4096)
    continue_text(runner, tokenizer, "", max_tokens=1)  # type: ignore[arg-type]
    assert runner.read_tokens == [tokenizer.end_of_text]
    with pytest.raises(InputError, match="prompt is empty"):
        continue_text(Scripted([5]), Tokenizer.byte_level(), "", max_tokens=1)  # type: ignore[arg-type]


def test_a_seed_gives_the_same_text(byte_model: Path) -> None:
    runner, tokenizer = open_runner(byte_model), Tokenizer.byte_level()
    texts = [
        continue_text(runner, tokenizer, "The ", max_tokens=40, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, generator, temperature=1.0, top_p=1.0) for _ in range(4000)], minlength=4)
    # Three standard deviations of a share of 0.5 in 4,000 draws.
    np.testing.assert_allclose(drawn / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.024)


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.2, 0.8], np.float32))
    generator = np.random.default_rng(0)
    drawn = [sample(logits, generator, temperature=0.5, top_p=1.0) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.64 / (0.64 + 0.04), abs=0.012)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    logits = np.array([0.5, 0.25, 0.1875, 0.0625])
    generator = np.random.default_rng(0)
    drawn = {sample(np.log(logits), generator, temperature=1.0, top_p=top_p) for _ in range(1000)}
    assert drawn == set(range(kept))


class Broken(Scripted):
    """A Runner whose third logits are no numbers."""

    def __call__(
        self, tokens: NDArray[np.int64], state: State, *, logits: str = "last"
    ) -> tuple[NDArray[np.float32], State]:
        found, state = super().__call__(tokens, state, logits=logits)
        found[..., 7] = np.nan if state.peek() == 2 else 0
        return found, state


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="computed logits that are not finite at token 7 of a stream"):
        continue_text(Broken(b"text"), Tokenizer.byte_level(), "prompt", max_tokens=9)  # type: ignore[arg-type]


def test_bad_options_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        _run(b"a", max_tokens=0, temperature=-1.0, top_p=0.0, seed=-1, stop=("",))
    for part in ("max_tokens is 0", "temperature is -1.0", "top_p is 0.0", "seed is -1", "empty stop string"):
        assert part in str(caught.value)
