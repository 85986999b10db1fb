# SPDX-License-Identifier: Apache-2.0
"""Recovery lowers what it says it lowers, keeps the plan's formats, and refuses what it cannot learn from."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import bounds
import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, difference
from solved import Solved, random_text, solved

from mossquant.calibration.meter import Meter
from mossquant.calibration.recover import (
    HeadDivergence,
    Rates,
    RecoveryStep,
    Strength,
    _Windows,
    recover,
    routers_apart,
)
from mossquant.calibration.student import Planned, Stored
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.inputs import activation_model, expert_input_model
from mossquant.checkpoint.packing import PackedTensor
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import value
from mossquant.checkpoint.writer import QuantizedWriter
from mossquant.errors import InputError
from mossquant.formats import QuantizedTensor
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.plan.recipe import RecoveryActivations

FEW = Rates(batch=4, steps=1, window=16, codes=2e-2, scales=2e-3, kept=5e-3, small=5e-3)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    """A small model with experts of both kinds at 4 bits."""
    return solved(tmp_path_factory.mktemp("experts") / "model", CONFIGS["experts"])


def slow_kl(
    case: Solved, tensors: dict[str, QuantizedTensor], tokens: torch.Tensor, activations: str = "fp32"
) -> float:
    """In float64, all logits at once."""
    planned = Planned(case.weights, case.plan, tensors)
    rounded = Forward(activation=activation_model(planned), expert_input=expert_input_model(planned))
    logits = [
        MossNet(case.weights.config, dtype=torch.float64).load(lambda name, of=of: value(of, name))(tokens, run=run)[0]
        for of, run in ((case.weights, Forward()), (planned, rounded if activations == "planned" else Forward()))
    ]
    p, q = (torch.log_softmax(one, -1) for one in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("learning", [True, False])
def test_divergence_against_plain_pytorch(learning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossquant.calibration.recover._LOGITS", 5 * 7)
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(12, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    table, taught_table = (torch.randn(7, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    hidden.requires_grad_(learning)
    table.requires_grad_(learning)
    found = HeadDivergence.apply(hidden, table, taught, taught_table)  # type: ignore[no-untyped-call]
    log_p, log_q = F.log_softmax(taught @ taught_table.T, -1), F.log_softmax(hidden @ table.T, -1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert difference(found.detach(), expected.detach()) < bounds.SAME_SUM_FLOAT64
    if learning:
        for ours, slow in zip(
            torch.autograd.grad(3 * found, (hidden, table)),
            torch.autograd.grad(3 * expected, (hidden, table)),
            strict=True,
        ):
            assert difference(ours, slow) < bounds.SAME_SUM_FLOAT64


def test_routers_apart_by_hand() -> None:
    """One router that says 3 : 1 where the other says 1 : 1, and one that is the same."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    same = torch.randn(4, 3)
    found = routers_apart({"a": logits, "b": same}, {"a": torch.zeros(1, 2), "b": same + 2})
    assert abs(float(found - expected / 2)) < 1e-6
    assert float(routers_apart({}, {})) == 0


def kl_of(case: Solved, tensors: Mapping[str, Stored], text: CalibrationText) -> float:
    """Of what is stored, on one window."""
    stored = Planned(case.weights, case.plan, tensors)
    changed = {spec: value(stored, name) for name, spec in case.weights.specs.items()}
    return float(Meter(case.weights, text.windows(1, len(text))).kl(changed).mean())


@pytest.mark.parametrize("strength", ["weights", "scales"])
def test_it_lowers_its_loss(experts: Solved, strength: str) -> None:
    """On the text that it learned from, output and routers together, and the output alone."""
    text, steps = random_text(53, 256), list[RecoveryStep]()
    made = recover(
        experts.weights, experts.plan, experts.tensors, text, tokens=2048, strength=strength, rates=FEW,  # type: ignore[arg-type]
        shown=steps.append,
    )  # fmt: skip
    first, last = (sum(s.kl + FEW.routing * s.routing for s in some) for some in (steps[:4], steps[-4:]))
    assert last < 0.9 * first
    assert kl_of(experts, made, text) < 0.9 * kl_of(experts, experts.tensors, text)
    assert steps[-1].step == steps[-1].steps == 32
    assert steps[-1].tokens == 2048
    same = [torch.equal(made[name].codes, one.codes) for name, one in experts.tensors.items()]  # type: ignore[union-attr]
    assert all(same) == (strength == "scales")


def test_first_loss_is_that_of_what_was_solved(experts: Solved) -> None:
    """The first step sees the solved tensors, and inputs as they are asked for: its KL is that of its windows."""
    text, first = random_text(53, 64), dict[str, float]()
    rates, tokens = replace(FEW, batch=1, window=64), torch.from_numpy(text.tokens)[None]
    for activations in get_args(RecoveryActivations):
        steps = list[RecoveryStep]()
        recover(
            experts.weights, experts.plan, experts.tensors, text, tokens=1, activations=activations, rates=rates,
            shown=steps.append,
        )  # fmt: skip
        first[activations] = steps[0].kl
        assert abs(steps[0].kl - slow_kl(experts, experts.tensors, tokens, activations)) < bounds.CUT_NATS
    assert abs(first["fp32"] - first["planned"]) > 10 * bounds.CUT_NATS


@pytest.mark.parametrize("activations", ["fp32", "planned"])
@pytest.mark.parametrize(("config", "recipe", "dtype"), [
    ("experts", "int4-uniform", torch.float16), ("mamba", "int8-uniform", torch.bfloat16),
    ("pruned", "int4-uniform", torch.bfloat16), ("untied", "int8-uniform", torch.float32),
])  # fmt: skip
def test_made_as_planned(config: str, recipe: str, dtype: torch.dtype, activations: str, tmp_path: Path) -> None:
    """Formats, types and shapes are the plan's, the writer takes them, and what is read back is what was made."""
    case = solved(tmp_path / "model", CONFIGS[config], recipe=recipe, dtype=dtype)
    text = random_text(53, 50)
    made = recover(case.weights, case.plan, case.tensors, text, tokens=100, activations=activations, rates=FEW)  # type: ignore[arg-type]
    assert list(made) == [entry.name for entry in case.plan.tensors]
    (tmp_path / "out").mkdir()
    writer = QuantizedWriter(tmp_path / "out", case.weights, case.recipe, case.plan)
    for entry in case.plan.tensors:
        stored = made[entry.name]
        if isinstance(stored, QuantizedTensor):
            assert stored.format.name == entry.format
            packed = PackedTensor(entry.name, stored.format, stored.rows, stored.columns)
            packed.put(slice(None), stored)
            writer.add(entry.name, packed, 0.0)
        else:
            assert stored.dtype == FLOAT_DTYPES[entry.kept or ""]
            assert stored.shape == entry.shape
            if stored.dtype == torch.float32:
                assert not torch.equal(stored, case.weights.kept(entry.name).float())
            writer.add(entry.name, stored, 0.0)
    writer.finish()
    opened = QuantizedCheckpoint.open(tmp_path / "out")
    planned = Planned(case.weights, case.plan, made)
    assert all(torch.equal(value(opened, name), value(planned, name)) for name in made)


def test_same_twice(experts: Solved) -> None:
    text = random_text(53, 100)
    one, two = (recover(experts.weights, experts.plan, experts.tensors, text, tokens=300, rates=FEW) for _ in range(2))
    for name, stored in one.items():
        again = two[name]
        if isinstance(stored, QuantizedTensor):
            assert isinstance(again, QuantizedTensor)
            assert torch.equal(stored.codes, again.codes)
            assert torch.equal(stored.scales, again.scales)
        else:
            assert isinstance(again, torch.Tensor)
            assert torch.equal(stored, again)


@pytest.mark.parametrize(("tokens", "steps", "batch"), [(16 * 4 * 100, 100, 4), (16 * 4 * 50, 100, 2), (16, 1, 1)])
def test_few_tokens_are_few_a_step(tokens: int, steps: int, batch: int) -> None:
    """Every window of the text once before any comes again, cut from another token on each time."""
    schedule = _Windows(random_text(53, 1000), replace(FEW, steps=100), tokens)
    assert (schedule.steps, schedule.tokens_a_step) == (steps, 16 * batch)
    seen = [tuple(window.tolist()) for step in range(62 // batch) for window in schedule.windows(step)]
    assert len(set(seen)) == len(seen)
    assert torch.equal(schedule.windows(3), schedule.windows(3))


def test_a_text_shorter_than_a_window(experts: Solved) -> None:
    """It is one window; progress counts whole steps."""
    seen: list[tuple[str, int, int]] = []
    text = random_text(53, 5)
    recover(
        experts.weights, experts.plan, experts.tensors, text, tokens=9, rates=FEW, progress=lambda *s: seen.append(s)
    )
    assert seen == [("recovering", 5, 10), ("recovering", 10, 10)]


def test_refusals(experts: Solved) -> None:
    text = random_text(53, 50)

    def refused(message: str, *, of: int = 50, tokens: int = 10, **more: str) -> None:
        with pytest.raises(InputError) as caught:
            recover(experts.weights, experts.plan, experts.tensors, random_text(53, of), tokens=tokens, **more)  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("unknown strength 'all'; known strengths: weights, scales", strength="all")
    refused("unknown activation mode 'int8'; known modes: fp32, planned", activations="int8")
    refused("has 3 tokens, 4 are needed", of=3)
    refused("recovery from 0 tokens", tokens=0)
    with pytest.raises(InputError, match="recovery diverged at step 1: the loss is not finite"):
        recover(
            experts.weights, experts.plan, experts.tensors, text, tokens=100, rates=replace(FEW, batch=1, kept=1e38)
        )


class Stopped(Exception):
    """What a run is stopped with, at a step."""


def stop_at(step: int) -> Callable[[RecoveryStep], None]:
    def shown(now: RecoveryStep) -> None:
        if now.step == step:
            raise Stopped

    return shown


@pytest.mark.parametrize("strength", ["weights", "scales"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    strength: Strength, experts: Solved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mossquant.calibration.recover.EVERY", 2)
    text, file = random_text(53, 100), tmp_path / "run.safetensors"

    def run(snapshot: Path | None, **more: Any) -> dict[str, Stored]:
        return recover(
            experts.weights,
            experts.plan,
            experts.tensors,
            text,
            tokens=700,
            strength=strength,
            rates=FEW,
            snapshot=snapshot,
            **more,
        )

    whole = run(None)
    for step in (3, 5):
        with pytest.raises(Stopped):
            run(file, shown=stop_at(step))
    seen: list[int] = []
    again = run(file, shown=lambda now: seen.append(now.step))
    assert seen[0] == 5, "two steps more than the snapshot of the first run had, from the second run's"
    for name, stored in whole.items():
        other = again[name]
        if isinstance(stored, QuantizedTensor):
            assert isinstance(other, QuantizedTensor)
            assert torch.equal(stored.codes, other.codes)
            assert torch.equal(stored.scales, other.scales)
        else:
            assert isinstance(other, torch.Tensor)
            assert torch.equal(stored, other)
    with pytest.raises(InputError, match="belongs to another"):
        recover(experts.weights, experts.plan, experts.tensors, text, tokens=701, rates=FEW, snapshot=file)
    file.write_bytes(b"none")
    with pytest.raises(InputError, match="is not a snapshot"):
        run(file)


def test_what_is_no_code_moves_less_beside_finer_codes(tmp_path: Path) -> None:
    four, eight = (
        Rates.of(solved(tmp_path / name, CONFIGS["untied"], recipe=name).plan)
        for name in ("int4-uniform", "int8-uniform")
    )
    assert four == Rates()
    assert eight == replace(four, small=four.small / 16, scales=four.scales / 16, kept=four.kept / 16)
