# SPDX-License-Identifier: Apache-2.0
"""A .pte computes what its checkpoint says, with its own activation arithmetic; planted faults are seen."""

import numpy as np
import pytest
import torch
from bounds import (
    EXECUTORCH_FORMS_MEDIAN_KL,
    EXECUTORCH_FP32,
    EXECUTORCH_MEDIAN_KL,
    EXECUTORCH_MEDIAN_STATE,
)
from lowered import Lowered, Workshop, relative
from small import input_format
from torch import Tensor

from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.divergence import Predictions, kl
from mossquant.eval import one_step as one_step_module
from mossquant.eval.one_step import OneStep, one_step
from mossquant.model.forward import GATED, Activation
from mossquant.targets.executorch.lower import CHUNK
from mossquant.targets.torch import runner as torch_runner
from mossquant.targets.torch.runner import TorchRunner

POSITIONS = 96
SLOW = [
    ("wide", "by expert"),
    ("pruned", "int8"),
    ("experts", None),
    ("wide", None),
    ("wide", "int8"),
    ("wide", "g128"),
    ("pruned", "int4"),
    ("untied", "int4"),
    ("all chosen", "int8"),
    ("mamba48", "int4"),
    ("no window", "int4"),
]
EVERY = [("mamba", None), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
"""Lowering takes long: `make test` has one more model than the int4 one of the whole line."""


def _steps(lowered: Lowered, reference: TorchRunner, positions: int = POSITIONS) -> OneStep:
    return one_step(reference, lowered.runner, lowered.tokens(1, 4 * positions)[0], positions=positions)


@pytest.fixture(autouse=True)
def _few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a fault is planted every position differs; a few of them show that rounding does not explain it.
    monkeypatch.setattr(one_step_module, "EXPLAINED_AT_MOST", 10)


def _holds(lowered: Lowered) -> None:
    """Single steps from given states: the median, because a rounding tie upsets its own position."""
    found = _steps(lowered, lowered.reference())
    assert np.median(found.kl) <= EXECUTORCH_MEDIAN_KL
    assert np.median(found.state_error) <= EXECUTORCH_MEDIAN_STATE


def test_int4(int4: Lowered) -> None:
    assert int4.runner.info.activations == "int8_row_asym"
    _holds(int4)


@pytest.mark.parametrize(("model", "recipe"), EVERY)
def test_every_kind_of_model(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe, target="executorch")
    assert lowered.runner.info.activations == ("fp32" if recipe is None else "int8_row_asym")
    _holds(lowered)


@pytest.mark.parametrize(
    ("model", "length"),
    [
        ("mamba", 2 * CHUNK + 44),
        pytest.param("experts", 2 * CHUNK + 44, marks=pytest.mark.slow),
        pytest.param("wide", 2 * CHUNK + 44, marks=pytest.mark.slow),
    ],
)
def test_full_precision_is_exact_in_a_free_run(workshop: Workshop, model: str, length: int) -> None:
    lowered = workshop(model, target="executorch")
    tokens, runner, reference = lowered.tokens(1, length), lowered.runner, lowered.reference()
    found, state = runner(tokens, runner.initial_state(1), logits="all")
    expected, end = reference(tokens, reference.initial_state(1), logits="all")
    assert relative(found, expected).max() <= EXECUTORCH_FP32
    wanted = reference.read(end)
    for name, value in runner.read(state).items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=EXECUTORCH_FP32 * np.abs(wanted[name]).max())


@pytest.fixture(params=["int4", "fp32"])
def either(request: pytest.FixtureRequest, int4: Lowered, workshop: Workshop) -> Lowered:
    return int4 if request.param == "int4" else workshop("mamba", target="executorch")


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2])
def test_prefill_score_and_decode_agree(either: Lowered, length: int) -> None:
    """One call for all, one for the last, and token by token, from the same state; around the edges of a chunk."""
    runner, tokens = either.runner, either.tokens(1, length)
    _, before = runner(either.tokens(1, 7, seed=1), runner.initial_state(1))
    every, after_score = runner(tokens, runner.copy(before), logits="all")
    last, after_prefill = runner(tokens, runner.copy(before), logits="last")
    steps, state = [], before
    for time in range(length):
        step, state = runner(tokens[:, time : time + 1], state)
        steps.append(step)
    assert every.shape == (1, length, either.config.vocab_size)
    assert last.shape == (1, 1, either.config.vocab_size)
    assert every.dtype == last.dtype == np.float32
    apart = kl(Predictions(every), Predictions(np.concatenate(steps, 1)))
    assert np.median(apart) <= EXECUTORCH_FORMS_MEDIAN_KL
    # The two methods run the same operators over the same rows.
    assert relative(last, every[:, -1:]).max() <= EXECUTORCH_FP32
    one, two = runner.read(after_score), runner.read(after_prefill)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=EXECUTORCH_FP32 * np.abs(value).max())
    if either.runner.info.activations == "fp32":
        assert relative(np.concatenate(steps, 1), every).max() <= EXECUTORCH_FP32


def _rows_of(levels: int) -> Activation:
    """`int8_row_asym` with another number of steps between a row's ends than 255."""

    def seen(x: Tensor) -> Tensor:
        exact = x.float()
        low, high = exact.amin(-1, keepdim=True).clamp(max=0), exact.amax(-1, keepdim=True).clamp(min=0)
        scale = torch.where(high == low, 1.0, levels / (high - low))
        from_low, from_high = -128 - low * scale, 127 - high * scale
        nearer_low = (-128 + low * scale) + (127 + high * scale) > 0
        zero = torch.where(nearer_low, from_low, from_high).clamp(-128, 127).round()
        codes = (torch.round(exact * scale) + zero).clamp(-128, 127)
        return ((codes - zero) / scale).to(x.dtype)

    return lambda name, x: seen(x)


def _kept_as_they_are(lowered: Lowered, model: Activation) -> Activation:
    source = QuantizedCheckpoint.open(lowered.checkpoint)
    return lambda name, x: x if input_format(source, name) is None else model(name, x)


def _rounded_apart(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> TorchRunner:
    monkeypatch.setattr(torch_runner, "expert_input_model", lambda *_: lambda name: GATED)
    return lowered.reference()


def test_the_fault_without_a_fault(int4: Lowered) -> None:
    """What the planted faults change does no harm by itself."""
    same = int4.reference().with_activation(_kept_as_they_are(int4, _rows_of(255)), name="255")
    assert np.median(_steps(int4, same).kl) <= EXECUTORCH_MEDIAN_KL


@pytest.mark.parametrize("levels", [254, pytest.param(256, marks=pytest.mark.slow)])
def test_a_range_off_by_one_code_is_seen(int4: Lowered, levels: int) -> None:
    wrong = int4.reference().with_activation(_kept_as_they_are(int4, _rows_of(levels)), name=str(levels))
    found = _steps(int4, wrong)
    assert np.median(found.kl) > EXECUTORCH_MEDIAN_KL
    assert np.median(found.state_error) > EXECUTORCH_MEDIAN_STATE


def test_experts_rounded_apart_are_seen(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _steps(int4, _rounded_apart(int4, monkeypatch))
    assert np.median(found.kl) > EXECUTORCH_MEDIAN_KL
