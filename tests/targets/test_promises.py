# SPDX-License-Identifier: Apache-2.0
"""What every Runner promises (`mossquant/runner.py`), on every runtime of one and the same model."""

from pathlib import Path

import numpy as np
import pytest
from bounds import FORMS_FLOAT32
from numpy.typing import NDArray
from small import random_tokens

from mossquant.errors import InputError
from mossquant.eval.open import open_runner
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.runner import Runner, UsedStateError

FOLDERS = {
    "checkpoint": "checkpoint_folder",
    "quantized checkpoint": "quantized_folder",
    "onnx": "artifact_folder",
    "executorch": "pte_folder",
    "executorch, own kernels": "own_kernels_folder",
    "native": "moss_folder",
}
"""Kind → fixture: whatever a PATH argument may be."""


@pytest.fixture(scope="module", params=FOLDERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    folder: Path = request.getfixturevalue(FOLDERS[request.param])
    found = open_runner(folder, threads=1)
    assert found.info.kind == request.param.partition(",")[0]
    return found


@pytest.fixture
def batch(runner: Runner) -> int:
    """Two streams, where the runtime takes so many."""
    return min(2, runner.info.max_batch or 2)


@pytest.fixture
def tokens(batch: int, tiny_config: MossNetConfig) -> NDArray[np.int64]:
    """[B, 9]."""
    found: NDArray[np.int64] = random_tokens(tiny_config, batch, 9).numpy()
    return found


@pytest.mark.parametrize("time", [1, 2, 9])
def test_last_is_the_last_of_all(runner: Runner, batch: int, tokens: NDArray[np.int64], time: int) -> None:
    every, _ = runner(tokens[:, :time], runner.initial_state(batch), logits="all")
    last, _ = runner(tokens[:, :time], runner.initial_state(batch))
    assert every.shape == (batch, time, runner.info.vocab_size)
    assert last.shape == (batch, 1, runner.info.vocab_size)
    assert every.dtype == last.dtype == np.float32
    np.testing.assert_allclose(last, every[:, -1:], rtol=0, atol=FORMS_FLOAT32)


def test_logits_belong_to_the_caller(runner: Runner, batch: int, tokens: NDArray[np.int64]) -> None:
    first, state = runner(tokens[:, :3], runner.initial_state(batch))
    step, state = runner(tokens[:, 3:4], state)
    kept = first.copy(), step.copy()
    for time in range(4, 9):
        _, state = runner(tokens[:, time : time + 1], state)
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(step, kept[1])


def test_a_state_is_consumed(runner: Runner, batch: int, tokens: NDArray[np.int64]) -> None:
    state = runner.initial_state(batch)
    _, after = runner(tokens, state)
    for use in (lambda: runner(tokens, state), lambda: runner.copy(state), lambda: runner.read(state)):
        with pytest.raises(UsedStateError, match="consumed by an earlier call"):
            use()
    runner(tokens, after)


def test_a_copy_goes_its_own_way(runner: Runner, batch: int, tokens: NDArray[np.int64]) -> None:
    _, state = runner(tokens, runner.initial_state(batch))
    other = runner.copy(state)
    expected, end = runner(tokens, state, logits="all")
    for time in range(3):
        _, end = runner(tokens[:, time : time + 1], end)
    found, _ = runner(tokens, other, logits="all")
    np.testing.assert_array_equal(found, expected)


def test_read_and_write_are_inverse(
    runner: Runner, batch: int, tokens: NDArray[np.int64], tiny_config: MossNetConfig
) -> None:
    _, state = runner(tokens, runner.initial_state(batch))
    arrays = runner.read(state)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        spec.name: ((batch, *spec.shape), np.float32) for spec in state_specs(tiny_config)
    }
    written = runner.write({name: np.asfortranarray(array) for name, array in arrays.items()})
    for step in (tokens[:, :1], tokens):
        expected, state = runner(step, state)
        found, written = runner(step, written)
        np.testing.assert_array_equal(found, expected)


def test_arrays_of_a_state_belong_to_the_caller(runner: Runner, batch: int, tokens: NDArray[np.int64]) -> None:
    _, state = runner(tokens, runner.initial_state(batch))
    arrays = runner.read(state)
    kept = {name: array.copy() for name, array in arrays.items()}
    written = runner.write(arrays)
    for array in arrays.values():
        array[:] = 0
    for each in (state, written):
        for name, array in runner.read(each).items():
            np.testing.assert_array_equal(array, kept[name])
    arrays = runner.read(state)
    runner(tokens, state)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, kept[name])


def test_a_state_of_the_pytorch_model_can_be_carried_on(runner: Runner, checkpoint_folder: Path) -> None:
    reference = open_runner(checkpoint_folder)
    _, state = reference(np.arange(9)[None], reference.initial_state(1))
    arrays = reference.read(state)
    for name, array in runner.read(runner.write(arrays)).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([[0, 256]]), "token 256 is outside the vocabulary of 256"),
        (np.array([[-1, 3]]), "token -1 is outside the vocabulary of 256"),
        (np.zeros((1, 0), np.int64), "no tokens"),
        (np.zeros((3, 3), np.int64), "batch 3 and the state has 1"),
        (np.zeros(3, np.int64), r"shape \[3\] and type int64; give integers \[batch, time\]"),
        (np.zeros((1, 3)), r"shape \[1, 3\] and type float64; give integers \[batch, time\]"),
    ],
)
def test_a_refused_call_consumes_nothing(runner: Runner, wrong: NDArray[np.int64], message: str) -> None:
    state = runner.initial_state()
    with pytest.raises(InputError, match=message):
        runner(wrong, state)
    runner(np.array([[1, 2, 3]]), state)


def test_write_names_every_wrong_array(runner: Runner) -> None:
    arrays = runner.read(runner.initial_state())
    arrays["other"] = arrays.pop("layers.0.mixer.conv")
    arrays["layers.0.mixer.ssm"] = arrays["layers.0.mixer.ssm"][:, :, :-1]
    with pytest.raises(InputError) as caught:
        runner.write(arrays)
    for part in ("layers.0.mixer.conv is missing", "other is unexpected", "layers.0.mixer.ssm has shape [1, 128, 15]"):
        assert part in str(caught.value)
    arrays = runner.read(runner.initial_state())
    arrays["layers.0.mixer.ssm"] = np.repeat(arrays["layers.0.mixer.ssm"], 2, 0)
    with pytest.raises(InputError, match="batches of 1, 2 are mixed"):
        runner.write(arrays)


def test_a_batch_of_none_is_refused(runner: Runner) -> None:
    with pytest.raises(InputError, match="a batch of 0"):
        runner.initial_state(0)
