# SPDX-License-Identifier: Apache-2.0
"""The state as a file: what comes back is what was saved, and nothing else is taken for it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowered import MODELS
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from small import random_model, random_tokens, write_model

from mossquant.errors import InputError
from mossquant.runner import UsedStateError
from mossquant.state_file import SavedState, check_state_free, load_state, save_state
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Tokenizer

Stored = tuple[dict[str, NDArray[Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def runner(checkpoint_folder: Path) -> TorchRunner:
    return TorchRunner.open(checkpoint_folder)


def read(runner: TorchRunner, text: bytes = b"def f(x):") -> SavedState:
    logits, state = runner(np.array([list(text)]), runner.initial_state(1))
    return SavedState(state, logits, len(text))


@pytest.fixture
def saved(runner: TorchRunner, tmp_path: Path) -> Path:
    path = tmp_path / "saved.state"
    save_state(path, runner, read(runner), tokenizer=Tokenizer.byte_level())
    return path


def stored(path: Path) -> Stored:
    """Arrays and metadata of a state file."""
    with safe_open(path, framework="numpy") as opened:
        metadata = json.loads(opened.metadata()["mossquant"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118


def test_everything_comes_back(runner: TorchRunner, saved: Path) -> None:
    before, after = read(runner), load_state(saved, runner, tokenizer=Tokenizer.byte_level())
    assert after.tokens == 9
    np.testing.assert_array_equal(after.logits, before.logits)
    arrays = runner.read(before.state)
    assert arrays.keys() == runner.read(after.state).keys()
    for name, array in runner.read(after.state).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_recent_tokens_are_kept_where_there_are_any(runner: TorchRunner, tmp_path: Path) -> None:
    save_state(tmp_path / "state", runner, replace(read(runner), recent=(255, 3)))
    assert stored(tmp_path / "state")[1]["recent"] == [255, 3]
    assert load_state(tmp_path / "state", runner).recent == (255, 3)


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_model(name: str, tmp_path: Path) -> None:
    """Pruned layers, blocks without experts, a convolution without a window: arrays of no elements."""
    runner = TorchRunner.open(write_model(tmp_path / "model", random_model(MODELS[name])))
    logits, state = runner(random_tokens(MODELS[name], 1, 20).numpy(), runner.initial_state(1))
    save_state(tmp_path / "state", runner, SavedState(state, logits, 20))
    restored = load_state(tmp_path / "state", runner).state
    token = np.array([[1]])
    np.testing.assert_array_equal(runner(token, restored)[0], runner(token, state)[0])


def test_saving_leaves_the_state_usable(runner: TorchRunner, tmp_path: Path) -> None:
    at = read(runner)
    save_state(tmp_path / "state", runner, at)
    runner(np.array([[1]]), at.state)
    with pytest.raises(UsedStateError):
        save_state(tmp_path / "late", runner, at)


def test_the_last_of_all_logits_is_kept(runner: TorchRunner, saved: Path, tmp_path: Path) -> None:
    at = read(runner)
    save_state(tmp_path / "state", runner, replace(at, logits=np.repeat(at.logits, 3, 1)), tokenizer=None)
    assert stored(tmp_path / "state")[0]["logits"].shape == (1, 1, 256)
    assert (tmp_path / "state").read_bytes() == saved.read_bytes(), "the same input gives the same bytes"


def test_nothing_but_arrays_and_what_they_belong_to(runner: TorchRunner, saved: Path) -> None:
    arrays, metadata = stored(saved)
    assert arrays.keys() == {*runner.read(runner.initial_state(1)), "logits"}
    assert metadata.keys() == {
        *("version", "kind", "release", "weights", "model_sha256", "tokenizer_sha256", "tokens", "arrays_sha256")
    }
    assert saved.stat().st_size < sum(array.nbytes for array in arrays.values()) + 2048


def test_a_tokenizer_is_compared_where_there_is_one(runner: TorchRunner, saved: Path) -> None:
    assert load_state(saved, runner).tokens == 9
    with pytest.raises(InputError, match=r"another tokenizer \(no tokenizer.json\).*\(SHA-256 00000000"):
        load_state(saved, runner, tokenizer=Tokenizer(None, "0" * 64))


def test_fp64_and_many_streams_are_not_saved(runner: TorchRunner, checkpoint_folder: Path, tmp_path: Path) -> None:
    double = TorchRunner.open(checkpoint_folder, dtype=torch.float64)
    with pytest.raises(InputError, match="computes in fp64, and states are saved in fp32"):
        save_state(tmp_path / "state", double, read(double))
    logits, state = runner(np.zeros((2, 3), np.int64), runner.initial_state(2))
    with pytest.raises(InputError, match="2 streams was given; save one stream a file"):
        save_state(tmp_path / "state", runner, SavedState(state, logits, 3))
    assert not list(tmp_path.iterdir())


def test_an_fp32_state_goes_on_in_fp64(runner: TorchRunner, saved: Path, checkpoint_folder: Path) -> None:
    double = TorchRunner.open(checkpoint_folder, dtype=torch.float64)
    arrays = double.read(load_state(saved, double).state)
    for name, array in runner.read(load_state(saved, runner).state).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("tokens", [0, 1 << 63])
def test_tokens_that_cannot_be_counted(runner: TorchRunner, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(InputError, match=f"a state after {tokens} tokens was given"):
        save_state(tmp_path / "state", runner, replace(read(runner), tokens=tokens))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_saved(runner: TorchRunner, tmp_path: Path, value: float) -> None:
    arrays = runner.read(read(runner).state)
    name = next(iter(arrays))
    arrays[name].flat[-1] = value
    with pytest.raises(InputError, match=f"not finite: {name}"):
        save_state(tmp_path / "state", runner, SavedState(runner.write(arrays), read(runner).logits, 9))
    assert not list(tmp_path.iterdir())


def test_a_state_replaces_a_state_and_nothing_else(runner: TorchRunner, saved: Path, tmp_path: Path) -> None:
    at, before = read(runner, b"other"), saved.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        save_state(saved, runner, at)
    assert saved.read_bytes() == before
    save_state(saved, runner, at, force=True)
    assert load_state(saved, runner).tokens == 5
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("notes")
    for name in ("model.safetensors", "notes.txt"):
        kept = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match="is not a state, so it is not replaced"):
            save_state(tmp_path / name, runner, at, force=True)
        assert (tmp_path / name).read_bytes() == kept
    with pytest.raises(InputError, match="is there and not a file"):
        check_state_free(tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"saved.state", "model.safetensors", "notes.txt"}


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(values: object, rest: bytes) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + rest


def changed(name: str, **fields: object) -> Callable[[bytes], bytes]:
    """A change to what the header says about a tensor."""

    def change(data: bytes) -> bytes:
        values, rest = header(data)
        values[name].update(fields)
        return with_header(values, rest)

    return change


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-5],
    "a header of 2⁶⁴ − 1 bytes": lambda data: b"\xff" * 8 + data[8:],
    "a header of two million brackets": lambda data: with_header(b"[" * (2 << 20), b""),
    "a header that is a list": lambda data: with_header([], b""),
    "a pickle": lambda _: b"\x80\x04K\x01.",
    "10¹⁸ elements": changed("logits", shape=[10**6, 10**6, 10**6]),
    "offsets outside": changed("logits", data_offsets=[10**15, 10**15 + 1024]),
    "an unknown type": changed("logits", dtype="F1024"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_states(runner: TorchRunner, saved: Path, name: str) -> None:
    saved.write_bytes(HOSTILE[name](saved.read_bytes()))
    with pytest.raises(InputError, match=r"saved\.state is not a state: .* Read the prompt again with --save-state\."):
        load_state(saved, runner)


def test_a_missing_file_a_folder_and_a_pipe(runner: TorchRunner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none", tmp_path, tmp_path / "fifo", tmp_path / "none" / "below"):
        with pytest.raises(InputError, match=r"is not a file; give one that `mossquant generate --save-state` wrote"):
            load_state(path, runner)
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)"):
        load_state(tmp_path / ("n" * 300), runner)


def rewritten(change: Callable[[dict[str, NDArray[Any]], dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change to arrays or metadata, in a file that is whole."""

    def rewrite(path: Path) -> None:
        arrays, metadata = stored(path)
        change(arrays, metadata)
        save_file(arrays, path, metadata={"mossquant": json.dumps(metadata)})

    return rewrite


FIRST = "layers.0.mixer.conv"

CONTRADICTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "version 2": (
        rewritten(lambda _, m: m.update(version=2, release="9.9")),
        "version 2 was written by mossquant 9.9; use that release",
    ),
    "no version": (
        rewritten(lambda _, m: m.pop("version")),
        "is not a state: it carries no version",
    ),
    "a version alone": (
        rewritten(lambda _, m: (m.clear(), m.update(version=1))),
        "release: field required",
    ),
    "an unknown key": (rewritten(lambda _, m: m.update(clock=1)), "clock: unknown key"),
    "no tokens": (rewritten(lambda _, m: m.update(tokens=0)), "tokens: input should be greater than or equal to 1"),
    "2⁶³ tokens": (rewritten(lambda _, m: m.update(tokens=1 << 63)), "tokens: input should be less than"),
    "another model": (
        rewritten(lambda _, m: m.update(model_sha256="0" * 64, weights="int3\n")),
        r"is the state of another model: int3\n, SHA-256 000000000000; ",
    ),
    "a recent token too large": (
        rewritten(lambda _, m: m.update(recent=[0, 256])),
        "its recent tokens are more than a vocabulary of 256 has",
    ),
    "a negative recent token": (rewritten(lambda _, m: m.update(recent=[-1])), "recent.0: input should be greater"),
    "many recent tokens": (rewritten(lambda _, m: m.update(recent=[0] * 33)), "recent: tuple should have at most 32"),
    "an array more": (rewritten(lambda a, _: a.update({"x\n": a["logits"]})), r"x\n is unexpected"),
    "no logits": (rewritten(lambda a, _: a.pop("logits")), "logits is missing"),
    "another shape": (
        rewritten(lambda a, _: a.update({FIRST: a[FIRST].reshape(-1)})),
        f"{FIRST} has shape [384], needs [1, 128, 3]",
    ),
    "two streams": (
        rewritten(lambda a, _: a.update({FIRST: np.repeat(a[FIRST], 2, 0)})),
        f"{FIRST} has shape [2, 128, 3], needs [1, 128, 3]",
    ),
    "another type": (
        rewritten(lambda a, _: a.update(logits=a["logits"].astype(np.float64))),
        "logits has dtype float64, needs float32",
    ),
    "NaN": (rewritten(lambda a, _: a[FIRST].fill(np.nan)), f"{FIRST} holds NaN or infinite values"),
    "another value": (rewritten(lambda a, _: a[FIRST].fill(1)), "its values have another SHA-256"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_states_that_contradict_themselves_or_the_model(runner: TorchRunner, saved: Path, name: str) -> None:
    change, message = CONTRADICTIONS[name]
    change(saved)
    with pytest.raises(InputError) as caught:
        load_state(saved, runner)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "1" * 5000])
def test_metadata_that_is_none(runner: TorchRunner, saved: Path, text: str) -> None:
    arrays, _ = stored(saved)
    save_file(arrays, saved, metadata={"mossquant": text})
    with pytest.raises(InputError, match="is not a state"):
        load_state(saved, runner)
    save_file(arrays, saved, metadata={"other": text})
    with pytest.raises(InputError, match="is not a state"):
        load_state(saved, runner)
