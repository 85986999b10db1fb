# SPDX-License-Identifier: Apache-2.0
"""A saved state goes on bit for bit on the runtime that saved it, and as the same text on another of the same model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bounds import FORGOTTEN, ONNX_INT8_MEDIAN
from made_tokenizers import MADE
from numpy.typing import NDArray
from shared import once
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.eval.generate import continue_text
from mossquant.eval.open import open_runner
from mossquant.runner import Floats, Runner, State
from mossquant.state_file import SavedState, load_state, save_state
from mossquant.targets.export import export
from mossquant.text.text import Tokenizer

RUNTIMES: dict[str, tuple[str, str | None]] = {
    "original": ("checkpoint_folder", None),
    "original .onnx": ("original_artifact", None),
    "int4": ("quantized_folder", None),
    "int4, planned": ("quantized_folder", "planned"),
    "int4 .onnx": ("artifact_folder", None),
    "int4 .pte": ("pte_folder", None),
    "int4 .moss": ("moss_folder", None),
}
"""Name → fixture of its path, and the activations that it is opened with."""

INT4 = [name for name in RUNTIMES if name.startswith("int4")]
SAME_ARITHMETIC = [("original", "original .onnx"), ("int4, planned", "int4 .onnx"), ("int4 .moss", "int4 .onnx")]
SAME_MODEL = [SAME_ARITHMETIC[0], *((saver, reader) for saver in INT4 for reader in INT4 if saver < reader)]
BYTES = Tokenizer.byte_level()
PROMPT = "The quick brown fox – größer als zuvor – jumps over the lazy dog. "

Opener = Callable[[str], Runner]


@pytest.fixture(scope="session")
def original_artifact(checkpoint_folder: Path) -> Path:
    """The full-precision .onnx of the small model."""
    return once(checkpoint_folder.with_name("tiny-onnx"), lambda folder: export(checkpoint_folder, folder))


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest) -> Opener:
    """Opens a runtime by its name, once."""
    runners: dict[str, Runner] = {}

    def get(name: str) -> Runner:
        if name not in runners:
            fixture, activations = RUNTIMES[name]
            runners[name] = open_runner(request.getfixturevalue(fixture), activations=activations, threads=1)
        return runners[name]

    return get


def read(runner: Runner, tokens: NDArray[np.int64]) -> SavedState:
    logits, state = runner(tokens, runner.initial_state(1))
    return SavedState(state, logits, tokens.shape[1])


def tokens_of(count: int, *, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 256, (1, count))


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(("first", "then"), [(1, 33), (80, 1)])
def test_bit_for_bit_on_the_same_runtime(opened: Opener, name: str, first: int, then: int, tmp_path: Path) -> None:
    """The bar: the same logits as from the same two calls without saving between them, and at every step after."""
    runner, tokens, more = opened(name), tokens_of(first), tokens_of(then, seed=1)
    at = read(runner, tokens)
    save_state(tmp_path / "state", runner, at)
    restored = load_state(tmp_path / "state", runner)
    np.testing.assert_array_equal(restored.logits, at.logits)
    expected, state = runner(more, at.state, logits="all")
    continued, other = runner(more, restored.state, logits="all")
    np.testing.assert_array_equal(continued, expected)
    for token in tokens_of(8, seed=2)[0]:
        expected, state = runner(np.array([[token]]), state)
        continued, other = runner(np.array([[token]]), other)
        np.testing.assert_array_equal(continued, expected)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_generation_in_two_parts_is_the_whole(opened: Opener, name: str, tmp_path: Path) -> None:
    runner = opened(name)
    whole = continue_text(runner, BYTES, PROMPT, max_tokens=24, save_state=tmp_path / "whole")
    first = continue_text(runner, BYTES, PROMPT, max_tokens=10, save_state=tmp_path / "part")
    second = continue_text(runner, BYTES, max_tokens=14, load_state=tmp_path / "part", save_state=tmp_path / "end")
    assert first.tokens + second.tokens == whole.tokens
    assert first.text + second.text == whole.text
    assert second.prompt_tokens == 0
    assert (tmp_path / "end").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load_state(tmp_path / "end", runner).tokens == len(PROMPT.encode()) + 24


@pytest.mark.parametrize("kind", ["byte fallback", "byte-level"])
def test_the_text_of_many_parts_is_that_of_all_tokens(kind: str, tmp_path: Path) -> None:
    """Draws of whatever there is: broken characters, spaces that the text before decides, tokens of no text."""
    tokenizer, path = Tokenizer(MADE[kind](), None), tmp_path / "state"
    folder = write_model(tmp_path / "model", random_model(replace(SMALL, vocab_size=tokenizer.vocab_size + 3)))
    runner = open_runner(folder, threads=1)
    ids, texts = tokenizer.encode("the Hello").tolist(), []
    continue_text(runner, tokenizer, "the Hello", max_tokens=0, save_state=path)
    for seed in range(30):
        part = continue_text(
            runner, tokenizer, max_tokens=1, temperature=9.0, seed=seed, load_state=path, save_state=path, force=True
        )
        ids += part.tokens if part.reason != "end_of_text" else []
        texts.append(part.text)
    last = continue_text(runner, tokenizer, max_tokens=1, load_state=path)
    assert "the Hello" + "".join([*texts, last.text]) == tokenizer.decode([*ids, *last.tokens])
    assert "\ufffd" in "".join(texts)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_prompt_after_a_saved_prompt_is_the_second_of_two_calls(opened: Opener, name: str, tmp_path: Path) -> None:
    runner, path = opened(name), tmp_path / "state"
    silent = continue_text(runner, BYTES, PROMPT, max_tokens=0, save_state=path)
    assert (silent.text, silent.tokens, silent.reason) == ("", (), "max_tokens")
    generation = continue_text(runner, BYTES, "And then ", max_tokens=12, load_state=path, save_state=path, force=True)
    at = read(runner, BYTES.encode(PROMPT)[None])
    logits, state = runner(BYTES.encode("And then ")[None], at.state)
    for token in generation.tokens:
        assert token == np.argmax(logits[0, -1])
        logits, state = runner(np.array([[token]]), state)
    after = load_state(path, runner)
    np.testing.assert_array_equal(after.logits, logits)
    assert after.tokens == len(PROMPT.encode()) + len("And then ") + 12


def test_a_stop_string_has_been_read_when_the_state_is_saved(opened: Opener, tmp_path: Path) -> None:
    runner = opened("original")
    whole = continue_text(runner, BYTES, PROMPT, max_tokens=12)
    stop = BYTES.decode(whole.tokens[4:6])
    generation = continue_text(runner, BYTES, PROMPT, max_tokens=12, stop=[stop], save_state=tmp_path / "state")
    assert generation.reason == "stop"
    rest = continue_text(runner, BYTES, max_tokens=12 - len(generation.tokens), load_state=tmp_path / "state")
    assert generation.tokens + rest.tokens == whole.tokens


@pytest.mark.parametrize(("saver", "reader"), SAME_MODEL + [(reader, saver) for saver, reader in SAME_MODEL])
def test_another_runtime_of_the_same_model_goes_on(opened: Opener, saver: str, reader: str, tmp_path: Path) -> None:
    """What arrives is what was saved; what follows is what the other makes of the text itself, up to arithmetic."""
    source, target, tokens, more = opened(saver), opened(reader), tokens_of(80), tokens_of(40, seed=1)
    assert source.info.model_sha256 == target.info.model_sha256
    at = read(source, tokens)
    save_state(tmp_path / "state", source, at)
    restored = load_state(tmp_path / "state", target)
    np.testing.assert_array_equal(restored.logits, at.logits)
    for name, array in target.read(restored.state).items():
        np.testing.assert_array_equal(array, source.read(at.state)[name])
    continued = target(more, restored.state, logits="all")[0]
    expected = target(more, read(target, tokens).state, logits="all")[0]
    forgotten = target(more, target.initial_state(1), logits="all")[0]
    assert apart(continued, expected) <= FORGOTTEN * apart(forgotten, expected)
    if (saver, reader) in SAME_ARITHMETIC or (reader, saver) in SAME_ARITHMETIC:
        here, there = single_steps(source, target, at.state, more)
        assert apart(there, here) <= ONNX_INT8_MEDIAN * np.abs(here).max()


def single_steps(source: Runner, target: Runner, state: State, tokens: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Logits of both, each step from the state of `source`: a rounding tie upsets its own position only."""
    here, there = [], []
    for token in tokens.T[:, None]:
        there.append(target(token, target.write(source.read(state)))[0])
        logits, state = source(token, state)
        here.append(logits)
    return np.concatenate(here, 1), np.concatenate(there, 1)


def apart(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The median over positions of the largest difference."""
    return float(np.median(np.abs(a - b).max(-1)))


def test_a_state_of_another_model_is_refused(
    opened: Opener, checkpoint_folder: Path, quantized_folder: Path, tmp_path: Path
) -> None:
    """The original and two of its quantizations are three models, and the error names the two that met."""
    quantize(checkpoint_folder, tmp_path / "int8", recipe="int8-uniform")
    runners = {"bfloat16": opened("original"), "int4-uniform": opened("int4 .onnx")}
    runners["int8-uniform"] = open_runner(tmp_path / "int8")
    for saver, source in runners.items():
        path = tmp_path / f"{saver}.state"
        continue_text(source, BYTES, PROMPT, max_tokens=0, save_state=path)
        for name, runner in runners.items():
            if name == saver:
                continue
            with pytest.raises(InputError) as caught:
                continue_text(runner, BYTES, "x", load_state=path)
            message = str(caught.value)
            assert f"{path} is the state of another model: {saver}, SHA-256 {source.info.model_sha256[:12]}" in message
            assert f"{runner.info.path} is {name}, {runner.info.model_sha256[:12]}" in message
