# SPDX-License-Identifier: Apache-2.0
"""libmoss carries states in fp16 and int8 as the PyTorch model of the checkpoint does: the same codes, every token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import NATIVE_CUT, NATIVE_INT8_MEDIAN, STATE_TURNED
from lowered import Lowered, Workshop, relative
from numpy.typing import NDArray

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.eval.one_step import one_step
from mossquant.eval.parity import ONE_STEP_MEDIAN_STATE, ONE_STEP_UNEXPLAINED_SHARE
from mossquant.formats.states import STATE_FORMATS
from mossquant.kernels import _native
from mossquant.state_file import SavedState, load_state, save_state
from mossquant.targets.native.library import ModelState
from mossquant.targets.native.open import open_program
from mossquant.targets.native.runner import NativeRunner
from mossquant.targets.torch.runner import TorchRunner

FORMATS = ("fp16", "int8")
ISAS = ("baseline", *_native.cpu_flags())
BATCH, STEPS = 3, 9


def _lowered(workshop: Workshop, state: str, model: str = "wide") -> Lowered:
    return workshop(model, f"{state} states", target="native")


def _ssm(arrays: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {name: value for name, value in arrays.items() if name.endswith(".ssm")}


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize(("model", "isa"), [*(("wide", isa) for isa in ISAS), ("pruned", None)])
def test_steps_are_those_of_pytorch(workshop: Workshop, model: str, state: str, isa: str | None) -> None:
    """From the reference's own state at every position: logits, and which way every value was rounded."""
    lowered = _lowered(workshop, state, model)
    reference, runner = lowered.reference(), NativeRunner(lowered.artifact, threads=1, isa=isa)
    tokens = lowered.tokens(BATCH, STEPS)
    carried, off, turned = reference.initial_state(BATCH), [], []
    for time in range(STEPS):
        column, before = tokens[:, time : time + 1], reference.read(carried)
        own = runner.write(before)
        own.position = carried.position
        expected, carried = reference(column, carried)
        found, own = runner(column, own)
        off.append(relative(found, expected))
        wanted = _ssm(reference.read(carried))
        for name, value in _ssm(runner.read(own)).items():
            step = STATE_FORMATS[state].step
            assert step is not None
            steps = np.abs(value - wanted[name]) / step(torch.from_numpy(wanted[name])).numpy().clip(1e-30)
            turned.append((steps > 0.5).mean())
    assert np.median(off) <= NATIVE_INT8_MEDIAN
    assert np.median(turned) <= STATE_TURNED


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("model", ["wide", "mamba48"])
def test_prefill_split_and_steps_agree(workshop: Workshop, state: str, model: str) -> None:
    lowered = _lowered(workshop, state, model)
    tokens, runner = lowered.tokens(2, 37), lowered.runner
    whole, end = runner(tokens, runner.initial_state(2), logits="all")
    parts, carried = [], runner.initial_state(2)
    for start, stop in ((0, 7), (7, 8), (8, 30), *((at, at + 1) for at in range(30, 37))):
        logits, carried = runner(tokens[:, start:stop], carried, logits="all")
        parts.append(logits)
    assert np.median(relative(np.concatenate(parts, 1), whole)) <= NATIVE_CUT
    for name, value in runner.read(carried).items():
        assert np.median(np.abs(value - runner.read(end)[name])) <= NATIVE_CUT


@pytest.mark.parametrize("state", FORMATS)
def test_what_was_read_is_written_as_it_was(workshop: Workshop, state: str, tmp_path: Path) -> None:
    """A state that was saved goes on bit for bit; one of fp32 is rounded to the nearest."""
    lowered = _lowered(workshop, state)
    runner, tokens = lowered.runner, lowered.tokens(1, 60)
    logits, carried = runner(tokens[:, :41], runner.initial_state(1))
    save_state(tmp_path / "state", runner, SavedState(runner.copy(carried), logits, 41))
    restored = load_state(tmp_path / "state", runner).state
    for name, value in runner.read(carried).items():
        np.testing.assert_array_equal(runner.read(restored)[name], value)
    expected, _ = runner(tokens[:, 41:], carried)
    found, _ = runner(tokens[:, 41:], restored)
    np.testing.assert_array_equal(found, expected)
    arrays = runner.read(runner.initial_state(1))
    generator = np.random.default_rng(0)
    arrays |= {name: generator.normal(size=value.shape).astype(np.float32) for name, value in _ssm(arrays).items()}
    for name, value in _ssm(runner.read(runner.write(arrays))).items():
        step = STATE_FORMATS[state].step
        assert step is not None
        most = 0.501 * step(torch.from_numpy(arrays[name])).numpy()
        assert (np.abs(value - arrays[name]) <= most).all()
        assert (value != arrays[name]).mean() > 0.9


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_none(workshop: Workshop, value: float) -> None:
    """A channel in which a value has no code is read as NaN, and the others as they were."""
    runner = _lowered(workshop, "int8").runner
    arrays = runner.read(runner.initial_state(1))
    for array in _ssm(arrays).values():
        array[:] = 1
        array[0, 3, 1] = value
    for array in _ssm(runner.read(runner.write(arrays))).values():
        assert np.isnan(array[0, 3]).all()
        assert (np.delete(array, 3, 1) == 1).all()


def test_a_state_of_pytorch_goes_on(workshop: Workshop, tmp_path: Path) -> None:
    lowered = _lowered(workshop, "int8")
    reference, tokens = TorchRunner.open(lowered.checkpoint, activations="int8_block"), lowered.tokens(1, 30)
    logits, carried = reference(tokens, reference.initial_state(1))
    save_state(tmp_path / "state", reference, SavedState(reference.copy(carried), logits, 30))
    restored = load_state(tmp_path / "state", lowered.runner).state
    for name, value in reference.read(carried).items():
        np.testing.assert_array_equal(lowered.runner.read(restored)[name], value)
    assert restored.position == 30


@pytest.mark.parametrize("state", FORMATS)
def test_verify_holds_it_against_the_checkpoint(
    workshop: Workshop, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fails where libmoss rounds as at another token."""
    lowered = _lowered(workshop, state)
    reference, tokens = lowered.reference(), lowered.tokens(1, 400)[0]
    steps = one_step(reference, lowered.runner, tokens, positions=64)
    assert (steps.unexplained > 0).mean() <= ONE_STEP_UNEXPLAINED_SHARE
    assert np.median(steps.state_error) <= ONE_STEP_MEDIAN_STATE
    set_position = ModelState.set_position
    monkeypatch.setattr(ModelState, "set_position", lambda state, position: set_position(state, position + 1))
    assert (one_step(reference, lowered.runner, tokens, positions=64).unexplained > 0).all()


def test_the_file_says_so(workshop: Workshop) -> None:
    lowered = _lowered(workshop, "int8")
    opened = open_program(lowered.program)
    assert opened.states == {f"layers.{i}.mixer.ssm": "int8" for i in (0, 1)}
    assert lowered.runner.info.state_format == opened.metadata.state_format == "fp32, int8"
    assert open_program(workshop("wide", "int4", target="native").program).states == {}


def test_a_window_is_carried_in_fp32(workshop: Workshop, tmp_path: Path) -> None:
    text = (_lowered(workshop, "int8").checkpoint / "recipe.yaml").read_text()
    recipe = tmp_path / "windows.yaml"
    recipe.write_text(text.replace("ssm.ssm_state", "ssm.conv_state"))
    with pytest.raises(
        InputError, match=r"native cannot carry layers\.0\.mixer\.conv in int8 \(it carries it in fp32\)"
    ):
        quantize(workshop.checkpoint("wide"), tmp_path / "out", recipe=recipe)
