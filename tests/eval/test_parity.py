# SPDX-License-Identifier: Apache-2.0
"""Parity passes what computes the same, and fails every planted fault."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.inputs import activation_model
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval import one_step as one_step_module
from mossquant.eval.noise import with_noise
from mossquant.eval.one_step import EXPLAINED_KL, OneStep, compared_positions, one_step
from mossquant.eval.parity import (
    ONE_STEP_MAX_KL_FP32,
    ONE_STEP_MEDIAN_STATE,
    Check,
    Measured,
    judged,
    measure,
    parity,
)
from mossquant.eval.parity_measures import forms, growth
from mossquant.formats.activations import int8_block
from mossquant.runner import Arrays, Floats, LogitsWanted, Runner, State, Tokens
from mossquant.targets.torch.runner import TorchRunner

POSITIONS, STREAM = 240, 2400
SHORT = 600
"""Tokens where nothing is asked about growth along the text."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 checkpoint whose recipe plans int8 activations."""
    above = tmp_path_factory.mktemp("parity")
    model = random_model(replace(SMALL, vocab_size=256), seed=3)
    quantize(write_model(above / "model", model), above / "int8", recipe="int8-uniform")
    return above / "int8"


@pytest.fixture(autouse=True)
def _few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a fault is planted every position differs; a few of them show that rounding does not explain it.
    monkeypatch.setattr(one_step_module, "EXPLAINED_AT_MOST", 10)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """A stream of random bytes."""
    return np.random.default_rng(0).integers(0, 256, STREAM, np.int64)


def _check(folder: Path, tokens: Tokens, artifact: Runner, *, quantized_activations: bool = True) -> list[Check]:
    plain = TorchRunner.open(folder)
    reference = TorchRunner.open(folder, activations="planned") if quantized_activations else plain
    unquantized = plain if quantized_activations else None
    return list(judged(measure(reference, artifact, tokens, positions=POSITIONS, unquantized_activations=unquantized)))


def _failed(checks: list[Check]) -> set[str]:
    return {check.name.partition(":")[0] for check in checks if not check.passed}


class Wrapped:
    """Another Runner with something done to it."""

    def __init__(self, inner: TorchRunner) -> None:
        self.inner, self.info, self.initial_state = inner, inner.info, inner.initial_state
        self.copy, self.read, self.write = inner.copy, inner.read, inner.write

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        return self.inner(tokens, state, logits=logits)


class Forgetful(Wrapped):
    """Does not carry its state from call to call."""

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        return super().__call__(tokens, state, logits=logits)[0], self.initial_state(tokens.shape[0])


class SwappedStates(Wrapped):
    """Writes zeros into one state array."""

    def __init__(self, inner: TorchRunner) -> None:
        super().__init__(inner)
        self.write = self.write_zeros

    def write_zeros(self, arrays: Arrays) -> State:
        name = "layers.1.mixer.conv"
        return self.inner.write({**arrays, name: np.zeros_like(arrays[name])})


class Noisy(Wrapped):
    """Adds rounding of fp32 size to the logits, as another runtime would; with `growing`, ever more of it."""

    def __init__(self, inner: TorchRunner, *, growing: float = 0.0) -> None:
        super().__init__(inner)
        self.growing, self.read_before = growing, 0

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        values, state = super().__call__(tokens, state, logits=logits)
        at = self.read_before + np.arange(tokens.shape[1])[-values.shape[1] :]
        self.read_before += tokens.size
        noise = np.random.default_rng(self.read_before).standard_normal(values.shape)
        return (values + (1e-6 + self.growing * at[:, None]) * noise).astype(np.float32), state


@pytest.mark.parametrize("activations", ["planned", "fp32"])
def test_the_same_arithmetic_passes(folder: Path, tokens: Tokens, activations: str) -> None:
    artifact = Noisy(TorchRunner.open(folder, activations=activations, scan="sequential"))
    checks = _check(folder, tokens, artifact, quantized_activations=activations == "planned")
    assert _failed(checks) == set()
    assert any(check.value > 0 for check in checks)


def _blocks_of_16(name: str, x: torch.Tensor) -> torch.Tensor:
    return int8_block(x, 16) if x.shape[-1] > 16 else x


def _scale_128(name: str, x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 128
    codes = torch.round(padded / scale).clamp(-128, 127)
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


FAULTS = ["blocks of 16", "one expert in fp32"]
SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("scale max/128", "one site in fp32")]


@pytest.mark.parametrize("fault", [*FAULTS, *SLOW])
def test_a_fault_in_the_activations_fails(folder: Path, tokens: Tokens, fault: str) -> None:
    planned = activation_model(QuantizedCheckpoint.open(folder))

    def one_site_in_fp32(name: str, x: torch.Tensor) -> torch.Tensor:
        return x if name == "backbone.layers.1.mixer.out_proj.weight" else planned(name, x)

    def one_expert_in_fp32(name: str, x: torch.Tensor) -> torch.Tensor:
        return x if name == "backbone.layers.1.mlp.experts.2.w1.weight" else planned(name, x)

    models = {
        "blocks of 16": _blocks_of_16,
        "scale max/128": _scale_128,
        "one site in fp32": one_site_in_fp32,
        "one expert in fp32": one_expert_in_fp32,
    }
    artifact = TorchRunner.open(folder).with_activation(models[fault], name=fault)
    assert "one step" in _failed(_check(folder, tokens[:SHORT], artifact))


def test_a_state_that_is_not_carried_fails_one_step_and_the_forms(folder: Path, tokens: Tokens) -> None:
    artifact = Forgetful(TorchRunner.open(folder, activations="planned"))
    failed = _failed(_check(folder, tokens[:SHORT], artifact))
    assert {"one step", "token by token against one call", "split against one call"} <= failed


def _simulated(seed: int, length: int = 20_000) -> Measured:
    """What a right artifact and other rounding leave: mostly nothing, now and then a code, with a heavy tail."""
    generator = np.random.default_rng(seed)

    def stream() -> NDArray[np.float64]:
        codes = generator.random((1, length)) < 0.1
        values: NDArray[np.float64] = 1e-5 * codes * generator.pareto(1.2, (1, length))
        return values

    kl, rounding = stream(), stream()
    signs = generator.choice([-1.0, 1.0], (2, 1, length))
    still = np.zeros(2000)
    steps = OneStep(still, still + 1, still, (generator.random(2000) < 0.005).astype(np.float64))
    rises = signs * np.sqrt(2 * np.stack([kl, rounding]))
    return Measured(steps, rises[0], kl, rounding, rises[1], np.full((1, length), 1e-4), {"split": kl[0, :256]}, 0.0)


def _failed_names(measured: Measured) -> list[str]:
    return [check.name for check in judged(measured) if not check.passed]


def test_chance_fails_nothing() -> None:
    """`bench/verdicts.py` counts it on real artifacts."""
    assert [_failed_names(_simulated(seed)) for seed in range(40)] == [[]] * 40


FAULTS_OF_A_STREAM = {
    "free run: growth beyond that of other rounding": lambda m: m._replace(kl=m.kl + 2e-8 * np.arange(m.kl.size)),
    "free run: mean KL": lambda m: m._replace(kl=m.kl + 2 * m.cost),
    "free run: difference of perplexity, %": lambda m: m._replace(rise=m.rise + 0.003),
    "one step: … that rounding does not explain": lambda m: m._replace(
        steps=m.steps._replace(unexplained=m.steps.unexplained + (np.arange(2000) % 40 == 0))
    ),
    "split against one call: mean KL over 256 tokens": lambda m: m._replace(forms={"split": m.forms["split"] + 0.01}),
}


@pytest.mark.parametrize("name", FAULTS_OF_A_STREAM)
def test_what_is_more_than_chance_fails_its_own_check(name: str) -> None:
    assert all(name in _failed_names(FAULTS_OF_A_STREAM[name](_simulated(seed))) for seed in range(3))


def test_what_is_too_small_to_matter_fails_nothing() -> None:
    """However sure it is: every token differs by the same, and the more the later it comes."""
    small = _simulated(0)
    kl = 1e-9 * (1 + np.arange(20_000)[None] / 20_000)
    assert (
        _failed_names(small._replace(kl=kl, rise=np.full_like(kl, 5e-4), rounding=0 * kl, cost=0 * kl, forms={})) == []
    )


def test_few_windows_are_reported_and_not_judged() -> None:
    few, name = _simulated(0, 2000), "free run: mean KL"
    faulty = few._replace(kl=few.kl + 1.0, rise=few.rise + 1.0)
    assert _failed_names(faulty) == []
    check = next(check for check in judged(faulty) if check.name == name)
    assert (check.bound, check.note) == (None, "not judged: 8 of 16 windows")
    assert check.value > 1


def test_a_wild_artifact_and_positions_near_ties_alone_are_judged() -> None:
    wild = _simulated(0)
    steps = wild.steps._replace(unexplained=np.full(2000, np.nan))
    rise = np.where(np.arange(20_000) < 19_000, 0.0, 5e3)[None]
    checks = {check.name: check for check in judged(wild._replace(steps=steps, rise=rise, kl=wild.kl + rise))}
    assert "free run: mean KL" in _failed_names(wild._replace(kl=wild.kl + 100))
    assert checks["one step: … that rounding does not explain"].note == "not judged: no position"
    assert all(np.isfinite(check.value) for check in checks.values())


def test_a_fault_in_a_few_windows_does_not_widen_its_own_bound() -> None:
    right, late = _simulated(0), np.where(np.arange(20_000) < 19_000, 0.0, 5.0)[None]
    failed = _failed_names(right._replace(kl=right.kl + late, rise=right.rise + late))
    assert {"free run: mean KL", "free run: difference of perplexity, %"} <= set(failed)


def test_rounding_may_decide_at_most_positions() -> None:
    right = _simulated(0)
    decided = np.arange(2000) % 3 > 0
    steps = OneStep(1e-5 * decided, right.steps.margin, 3e-3 * decided, np.zeros(2000))
    assert _failed_names(right._replace(steps=steps)) == []
    assert "one step: median KL" in _failed_names(right._replace(steps=steps._replace(unexplained=1.0 * decided)))


def test_figures_lie_within_their_intervals(folder: Path, tokens: Tokens) -> None:
    checks = _check(folder, tokens, TorchRunner.open(folder, activations="planned", scan="sequential"))
    named = {check.name: check for check in checks}
    for figure, name in (
        ("one step: share of positions with KL above 0.0001", "one step: share above 0.0001"),
        ("what quantized activations themselves cost: mean KL", "what quantized activations cost"),
        ("free run: mean KL as a share of that cost", "free run: share of that cost"),
        ("free run: growth of KL per 10,000 tokens", "free run: growth of KL per 10,000 tokens"),
    ):
        low, high = named[f"{name}: 95 % interval from"], named[f"{name}: 95 % interval to"]
        assert low.value <= named[figure].value <= high.value
        assert low.value < high.value
        assert low.bound is high.bound is None


def test_a_state_array_that_is_not_written_fails_one_step(folder: Path, tokens: Tokens) -> None:
    artifact = SwappedStates(TorchRunner.open(folder, activations="planned"))
    assert _failed(_check(folder, tokens[:SHORT], artifact)) == {"one step"}


def test_int8_activations_in_place_of_fp32_fail_everything_tight(folder: Path, tokens: Tokens) -> None:
    artifact = TorchRunner.open(folder, activations="planned")
    failed = _failed(_check(folder, tokens[:SHORT], artifact, quantized_activations=False))
    assert {"one step", "free run"} <= failed


def test_one_step_visits_as_many_positions_as_asked_and_counts_ties(folder: Path, tokens: Tokens) -> None:
    runner = TorchRunner.open(folder)
    steps = one_step(runner, TorchRunner.open(folder), tokens, positions=POSITIONS)
    assert steps.kl.shape == steps.margin.shape == steps.state_error.shape == (POSITIONS,)
    # One Runner steps eight rows at a time, the other sixty-four: sums are rounded in another order.
    assert np.abs(steps.kl).max() < ONE_STEP_MAX_KL_FP32
    assert np.median(steps.state_error) < ONE_STEP_MEDIAN_STATE
    assert steps.margin.min() >= 0
    assert not steps.unexplained.any()
    assert len(np.unique(steps.margin)) > POSITIONS // 2


@pytest.mark.parametrize(("length", "asked"), [(2400, 241), (97, 3), (16, 16)])
def test_as_many_positions_are_reported_as_compared(folder: Path, length: int, asked: int) -> None:
    tokens, runner = np.random.default_rng(1).integers(0, 256, length, np.int64), TorchRunner.open(folder)
    compared = compared_positions(length, asked)
    assert len(one_step(runner, runner, tokens, positions=asked).kl) == compared
    assert min(asked, length - length % 8) <= compared < asked + 8


def test_the_report_counts_what_was_compared(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(207)))
    report = parity(folder, folder, text=tmp_path / "text", positions=206, stream=10_000, threads=1)
    assert report.positions == report.to_json()["positions"] == compared_positions(206, 206) < 206
    assert report.stream == 206, "the first token is predicted by none"


@pytest.mark.slow
def test_a_model_that_no_activation_changes(tokens: Tokens, tmp_path: Path) -> None:
    """What activations cost is then nothing, and no share of it."""
    model = random_model(replace(SMALL, vocab_size=256), seed=3)
    with torch.no_grad():
        model.norm_f.zero_()
    quantize(write_model(tmp_path / "model", model), tmp_path / "int8", recipe="int8-uniform")
    checks = _check(tmp_path / "int8", tokens[:SHORT], TorchRunner.open(tmp_path / "int8", activations="planned"))
    assert all(check.passed for check in checks)
    assert not any("share of that cost" in check.name for check in checks)
    # And so few tokens are too few to say whether anything grows; that is said.
    assert sum("not measured" in check.note for check in checks) == 2


def test_a_code_that_rounding_turned_is_explained_and_a_fault_is_not(folder: Path, tokens: Tokens) -> None:
    reference = TorchRunner.open(folder, activations="planned")
    noisy = with_noise(reference)
    assert noisy is not None
    steps = one_step(reference, noisy, tokens, positions=STREAM)
    turned = steps.kl > EXPLAINED_KL
    # Noise is what would explain it; here each step has noise of its own, which another repetition must find again.
    assert turned.sum() >= 3
    assert np.nansum(steps.unexplained) <= 0.2 * turned.sum()
    assert with_noise(TorchRunner.open(folder)) is None


def test_growth_sees_a_trend_and_no_trend() -> None:
    noise = np.abs(np.random.default_rng(0).standard_normal(20_000)) * 1e-5
    for trend in (0.0, 1e-9):
        found = growth(noise + np.arange(20_000) * trend, skip=1024)
        assert found is not None
        slope, error, windows = found
        assert windows == (20_000 - 1024) // 256
        assert slope == pytest.approx(1e4 * trend, abs=3 * error)
        assert (slope > 4 * error) == (trend > 0)
    assert growth(noise[:600], skip=0) is None


def test_one_window_is_no_growth() -> None:
    values = np.zeros(5120)
    values[-10:] = 1.0
    found = growth(values, skip=0)
    assert found is not None
    assert found[0] < 2 * found[1]


def test_forms_of_a_faithful_runner_agree(folder: Path, tokens: Tokens) -> None:
    divergences = forms(TorchRunner.open(folder), tokens, every=60, split=100)
    assert {name: len(kl) for name, kl in divergences.items()} == {"token by token": 60, "split": 100}
    for kl in divergences.values():
        assert np.abs(kl).max() < 1e-8
