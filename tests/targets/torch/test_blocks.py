# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint with int8 inputs runs in PyTorch's Runner on the blocks of libmoss, where they compute it."""

import numpy as np
import pytest
from bounds import NATIVE_INT8_MEDIAN
from lowered import Workshop, relative, same_bits

from mossquant.targets.torch.blocks import fast_kernels
from mossquant.targets.torch.runner import TorchRunner

CASES = [
    *[("wide", "int4"), ("wide", "one input"), ("experts", "g128"), ("all chosen", "int8"), ("mamba48", "int4")],
    *[("no window", "int8"), ("pruned", "int4")],
]
LENGTHS = (1, 2, 150)
"""One step, and more than libmoss takes of a sequence at once."""

pytestmark = pytest.mark.skipif(not fast_kernels(), reason="this machine has scalar kernels for linears, no others")


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_same_bits_as_a_moss(workshop: Workshop, model: str, recipe: str) -> None:
    """Logits of all positions and of the last one, and states, of two sequences and of one."""
    lowered = workshop(model, recipe, target="native")
    own, native = TorchRunner.open(lowered.checkpoint, activations="planned"), lowered.runner
    assert own._blocks is not None
    for batch in (1, 2):
        same_bits(own, native, lowered.tokens(batch, 2 * sum(LENGTHS)), LENGTHS)


def test_what_pytorch_computes_of_the_values(workshop: Workshop) -> None:
    checkpoint = workshop("wide", "int4", target="native").checkpoint
    blocks = TorchRunner.open(checkpoint, activations="planned")
    exact = TorchRunner.open(checkpoint, activations="planned", kernels=False)
    state, off = exact.initial_state(1), []
    for column in workshop("wide", "int4", target="native").tokens(1, 24).T:
        before = exact.read(state)  # single steps from the same states: a rounding tie upsets its own position only
        found, _ = blocks(column[None], blocks.write(before))
        expected, state = exact(column[None], exact.write(before))
        off.append(relative(found, expected).max())
    assert np.median(off) <= NATIVE_INT8_MEDIAN


def test_a_state_stays_usable_after_a_copy_was_read(workshop: Workshop) -> None:
    lowered = workshop("wide", "int4", target="native")
    runner, tokens = TorchRunner.open(lowered.checkpoint, activations="planned"), lowered.tokens(1, 6)
    _, state = runner(tokens[:, :3], runner.initial_state(1))
    before = runner.read(state)
    runner(tokens[:, 3:], runner.copy(state))
    for name, array in runner.read(state).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("recipe", ["int8 states", "fp16 states", "mixed"])
def test_what_libmoss_computes_otherwise_goes_linear_by_linear(workshop: Workshop, recipe: str) -> None:
    """Rounded states, and an input that is not rounded."""
    target = "onnx" if recipe == "mixed" else "native"
    runner = TorchRunner.open(workshop("wide", recipe, target=target).checkpoint, activations="planned")
    assert runner._blocks is None
    assert runner._forward.product is not None
