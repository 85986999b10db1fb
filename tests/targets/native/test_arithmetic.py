# SPDX-License-Identifier: Apache-2.0
"""libmoss computes what the checkpoint says, with its own activation arithmetic, on every kernel; planted faults are
seen.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bounds import NATIVE_CUT, NATIVE_FP32, NATIVE_INT8_MEDIAN
from lowered import MODELS, Lowered, Workshop, relative
from numpy.typing import NDArray
from small import input_format

from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.formats.activations import int8_block
from mossquant.kernels import _native
from mossquant.model.forward import Activation
from mossquant.runner import Arrays, Floats, Runner
from mossquant.targets.native.export import host_layout
from mossquant.targets.native.runner import NativeRunner

BATCH, TIME, STEPS = 3, 24, 12
ISAS = ("baseline", *_native.cpu_flags())
"""Every set of kernels that this machine can run."""
INT8_CASES = [(model, "int4") for model in MODELS]
INT8_CASES += [(model, "int8") for model in ("wide", "pruned", "untied", "mamba48")]
INT8_CASES += [(model, recipe) for model in ("wide", "experts") for recipe in ("g128", "one input", "by expert")]


class Steps(NamedTuple):
    """Single steps of a reference from its own states, so that a rounding tie upsets its own position only."""

    tokens: list[NDArray[np.int64]]
    before: list[Arrays]
    logits: Floats

    def by(self, runner: Runner) -> Floats:
        """What another Runner computes from the same states."""
        steps = zip(self.tokens, self.before, strict=True)
        return np.concatenate([runner(token, runner.write(arrays))[0] for token, arrays in steps], 1)


@cache
def _steps(lowered: Lowered) -> Steps:
    exact, tokens = lowered.reference(), lowered.tokens(BATCH, STEPS)
    state, columns, before, found = exact.initial_state(BATCH), [], [], []
    for time in range(STEPS):
        columns.append(tokens[:, time : time + 1])
        before.append(exact.read(state))
        logits, state = exact(columns[-1], exact.write(before[-1]))
        found.append(logits)
    return Steps(columns, before, np.concatenate(found, 1))


def _median(runner: NativeRunner, lowered: Lowered) -> float:
    """Median relative difference of single steps."""
    steps = _steps(lowered)
    return float(np.median(relative(steps.by(runner), steps.logits)))


@pytest.mark.parametrize("model", MODELS)
def test_full_precision(workshop: Workshop, model: str) -> None:
    lowered = workshop(model, target="native")
    assert lowered.runner.info.activations == "fp32"
    reference, tokens = lowered.reference(), lowered.tokens(BATCH, TIME)
    expected, end = reference(tokens, reference.initial_state(BATCH), logits="all")
    found, state = lowered.runner(tokens, lowered.runner.initial_state(BATCH), logits="all")
    assert relative(found, expected).max() <= NATIVE_FP32
    states, wanted = lowered.runner.read(state), reference.read(end)
    for name, value in states.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=NATIVE_FP32 * np.abs(wanted[name]).max(initial=0))


@pytest.mark.parametrize(("model", "recipe"), INT8_CASES)
def test_int8_activations(workshop: Workshop, model: str, recipe: str) -> None:
    lowered = workshop(model, recipe, target="native")
    assert lowered.runner.info.activations == "int8_block"
    runner = NativeRunner(lowered.artifact, threads=1)
    assert _median(runner, lowered) <= NATIVE_INT8_MEDIAN


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", ["one input", "g128"])
def test_every_kernel(workshop: Workshop, recipe: str, isa: str) -> None:
    lowered = workshop("wide", recipe, target="native")
    runner = NativeRunner(lowered.artifact, threads=2, isa=isa)
    assert _median(runner, lowered) <= NATIVE_INT8_MEDIAN


def _blocks_of_16(source: QuantizedCheckpoint) -> Activation:
    return lambda name, x: x if input_format(source, name) is None else int8_block(x, 16)


def _one_site_in_fp32(source: QuantizedCheckpoint, site: str) -> Activation:
    def seen(name: str, x: torch.Tensor) -> torch.Tensor:
        planned = input_format(source, name)
        return x if planned is None or source.specs[name].site == site else int8_block(x, planned[1])

    return seen


def test_planted_faults_are_seen(workshop: Workshop) -> None:
    lowered = workshop("wide", "int4", target="native")
    source, exact = QuantizedCheckpoint.open(lowered.checkpoint), lowered.reference()
    sites = sorted({spec.site for spec in source.specs.values() if spec.site is not None})
    assert len(sites) == 2 * 6 + 1
    faults = {"blocks of 16": _blocks_of_16(source)}
    faults |= {f"{site} in fp32": _one_site_in_fp32(source, site) for site in sites}
    steps = _steps(lowered)
    found = steps.by(NativeRunner(lowered.artifact, threads=1))
    for name, fault in faults.items():
        expected = steps.by(exact.with_activation(fault, name=name))
        assert np.median(relative(found, expected)) > 20 * NATIVE_INT8_MEDIAN, name


@pytest.mark.parametrize(
    ("model", "recipe"), [("wide", None), ("wide", "int4"), ("pruned", "int8"), ("mamba48", "int4"), ("untied", "g128")]
)
def test_prefill_split_and_steps_agree(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe, target="native")
    tokens, runner = lowered.tokens(2, TIME), lowered.runner
    whole, end = runner(tokens, runner.initial_state(2), logits="all")
    first, state = runner(tokens[:, :7], runner.initial_state(2), logits="all")
    rest, split_end = runner(tokens[:, 7:], state, logits="all")
    steps, state = [], runner.initial_state(2)
    for time in range(TIME):
        step, state = runner(tokens[:, time : time + 1], state)
        steps.append(step)
    for other, after in ((np.concatenate([first, rest], 1), split_end), (np.concatenate(steps, 1), state)):
        assert np.median(relative(other, whole)) <= NATIVE_CUT
        states, expected = runner.read(after), runner.read(end)
        for name, value in states.items():
            atol = NATIVE_CUT * np.abs(value).max(initial=1)
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol)


def test_streams_of_a_batch_do_not_see_one_another(workshop: Workshop) -> None:
    lowered = workshop("wide", "int8", target="native")
    tokens, runner = lowered.tokens(BATCH, TIME), lowered.runner
    together, _ = runner(tokens, runner.initial_state(BATCH), logits="all")
    alone = [runner(tokens[i : i + 1], runner.initial_state(1), logits="all")[0] for i in range(BATCH)]
    assert np.median(relative(np.concatenate(alone), together)) <= NATIVE_CUT


def test_a_prompt_longer_than_a_piece(workshop: Workshop) -> None:
    """libmoss goes through a long prompt in pieces; the last logits of it are those of the whole."""
    lowered = workshop("experts", target="native")
    tokens, runner, reference = lowered.tokens(2, 1000), lowered.runner, lowered.reference()
    last, state = runner(tokens, runner.initial_state(2))
    expected, end = reference(tokens, reference.initial_state(2))
    assert relative(last, expected).max() <= NATIVE_FP32
    wanted = reference.read(end)
    for name, value in runner.read(state).items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=NATIVE_FP32 * np.abs(wanted[name]).max())


@pytest.mark.parametrize("recipe", ["one input", "int8"])
def test_threads_and_layouts_change_no_bit(workshop: Workshop, recipe: str) -> None:
    """Threads share outputs and no sum; a file packed for other machines is packed anew, and says so."""
    own = workshop("wide", recipe, target="native", isa=host_layout())
    tokens = own.tokens(BATCH, TIME)
    expected, end = own.runner(tokens, own.runner.initial_state(BATCH), logits="all")
    arrays = own.runner.read(end)
    repacked = {}
    for isa, threads in ((host_layout(), 3), ("x86", 1), ("arm", 1), ("rows", 2)):
        runner = NativeRunner(workshop("wide", recipe, target="native", isa=isa).artifact, threads=threads)
        assert runner.model.layout == isa
        repacked[isa] = runner.model.repacked
        found, state = runner(tokens, runner.initial_state(BATCH), logits="all")
        np.testing.assert_array_equal(found, expected)
        for name, array in runner.read(state).items():
            np.testing.assert_array_equal(array, arrays[name])
    assert repacked == {isa: isa != host_layout() for isa in ("x86", "arm", "rows")}
