# SPDX-License-Identifier: Apache-2.0
"""An .onnx computes what its checkpoint says, with its own activation arithmetic; planted faults are seen."""

import numpy as np
import pytest
import torch
from bounds import ONNX_CUT, ONNX_FP32, ONNX_INT8_MEDIAN
from lowered import MODELS, Lowered, Workshop, relative
from small import input_format
from torch import Tensor

from mossquant.checkpoint.inputs import activation_model
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.formats.activations import int8_block
from mossquant.model.forward import Activation
from mossquant.plan.capabilities import Activations
from mossquant.targets.torch.runner import TorchRunner

BATCH, TIME = 3, 24
FP32_CASES = [(model, recipe) for model in MODELS for recipe in (None, "int4")]
FP32_CASES += [("wide", "int8"), ("wide", "g128"), ("wide", "mixed"), ("experts", "mixed")]
INT8 = [*((model, "int4") for model in MODELS), ("wide", "int8"), ("wide", "g128"), ("pruned", "int8")]
INT8_CASES = [
    *((model, recipe, None, "int8_block") for model, recipe in INT8),
    *((model, "mixed", None, "mixed") for model in ("wide", "experts")),
    ("wide", "mixed", "int8", "int8_block"),  # asked for where the plan says fp32
]
"""Model, recipe, activations asked for and got; "mixed" differs from expert to expert."""


def _largest(lowered: Lowered, reference: TorchRunner) -> float:
    """Largest relative difference when both read a text."""
    tokens, runner = lowered.tokens(BATCH, TIME), lowered.runner
    found, _ = runner(tokens, runner.initial_state(BATCH), logits="all")
    expected, _ = reference(tokens, reference.initial_state(BATCH), logits="all")
    return float(relative(found, expected).max())


def _median(lowered: Lowered, exact: TorchRunner, other: TorchRunner | None = None) -> float:
    """Median relative difference of single steps from the states of `exact`: a tie upsets its own position only."""
    tokens, runner = lowered.tokens(BATCH, TIME), lowered.runner
    state, found, expected = exact.initial_state(BATCH), [], []
    for time in range(TIME):
        now, arrays = tokens[:, time : time + 1], exact.read(state)
        found.append(runner(now, runner.write(arrays))[0])
        expected.append((other or exact)(now, exact.write(arrays))[0])
        _, state = exact(now, state)
    return float(np.median(relative(np.concatenate(found, 1), np.concatenate(expected, 1))))


@pytest.mark.parametrize(("model", "recipe"), FP32_CASES)
def test_fp32_activations(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe, None if recipe is None else "fp32")
    assert lowered.runner.info.activations == "fp32"
    assert _largest(lowered, lowered.reference(activations="fp32")) <= ONNX_FP32


@pytest.mark.parametrize(("model", "recipe", "asked", "got"), INT8_CASES)
def test_int8_activations(workshop: Workshop, model: str, recipe: str, asked: Activations | None, got: str) -> None:
    lowered = workshop(model, recipe, asked)
    assert lowered.runner.info.activations == got
    assert _median(lowered, lowered.reference()) <= ONNX_INT8_MEDIAN


def _blocks_of_16(source: QuantizedCheckpoint) -> Activation:
    return lambda name, x: x if input_format(source, name) is None else int8_block(x, 16)


def _scale_of_128(source: QuantizedCheckpoint) -> Activation:
    def seen(name: str, x: Tensor) -> Tensor:
        planned = input_format(source, name)
        if planned is None:
            return x
        columns, block = x.shape[-1], planned[1]
        parts = torch.nn.functional.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
        scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 128
        return (torch.round(parts / scale).clamp(-127, 127) * scale).flatten(-2)[..., :columns].to(x.dtype)

    return seen


def _one_site_in_fp32(source: QuantizedCheckpoint, site: str) -> Activation:
    planned = activation_model(source)
    return lambda name, x: x if source.specs[name].site == site else planned(name, x)


@pytest.mark.parametrize("recipe", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_planted_faults_are_seen(workshop: Workshop, recipe: str) -> None:
    lowered = workshop("wide", recipe)
    source, exact = QuantizedCheckpoint.open(lowered.checkpoint), lowered.reference()
    sites = sorted({spec.site for spec in source.specs.values() if spec.site is not None})
    assert len(sites) == 2 * 6 + 1
    faults = {"blocks of 16": _blocks_of_16(source), "scale of 128": _scale_of_128(source)}
    faults |= {f"{site} in fp32": _one_site_in_fp32(source, site) for site in sites}
    for name, fault in faults.items():
        assert _median(lowered, exact, exact.with_activation(fault, name=name)) > 20 * ONNX_INT8_MEDIAN, name


@pytest.mark.parametrize(
    ("model", "recipe"), [("wide", None), ("wide", "int4"), ("pruned", "int8"), ("mamba48", "int4")]
)
def test_prefill_split_and_steps_agree(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe)
    tokens, runner = lowered.tokens(2, TIME), lowered.runner
    whole, end = runner(tokens, runner.initial_state(2), logits="all")
    first, state = runner(tokens[:, :7], runner.initial_state(2), logits="all")
    rest, split_end = runner(tokens[:, 7:], state, logits="all")
    steps, state = [], runner.initial_state(2)
    for time in range(TIME):
        step, state = runner(tokens[:, time : time + 1], state)
        steps.append(step)
    for other, after in ((np.concatenate([first, rest], 1), split_end), (np.concatenate(steps, 1), state)):
        assert np.median(relative(other, whole)) <= ONNX_CUT
        states, expected = runner.read(after), runner.read(end)
        assert states.keys() == expected.keys()
        for name, value in states.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=ONNX_CUT * max(1, np.abs(value).max()))


def test_streams_of_a_batch_do_not_see_one_another(workshop: Workshop) -> None:
    lowered = workshop("wide", "int8")
    tokens, runner = lowered.tokens(BATCH, TIME), lowered.runner
    together, _ = runner(tokens, runner.initial_state(BATCH), logits="all")
    alone = [runner(tokens[i : i + 1], runner.initial_state(1), logits="all")[0] for i in range(BATCH)]
    assert np.median(relative(np.concatenate(alone), together)) <= ONNX_CUT


def test_ten_thousand_tokens(workshop: Workshop) -> None:
    """Longer than the Runner gives to the graph at once, in one call of the Runner and in two."""
    lowered = workshop("experts", "int4", "fp32")
    tokens, runner = lowered.tokens(1, 10_000), lowered.runner
    last, state = runner(tokens, runner.initial_state(1))
    _, half = runner(tokens[:, :3333], runner.initial_state(1))
    other, _ = runner(tokens[:, 3333:], half)
    reference = lowered.reference(activations="fp32")
    expected, end = reference(tokens, reference.initial_state(1))
    assert relative(other, last).max() <= ONNX_FP32
    assert relative(last, expected).max() <= ONNX_FP32
    arrays, wanted = runner.read(state), reference.read(end)
    for name, value in arrays.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=ONNX_FP32 * np.abs(wanted[name]).max())
