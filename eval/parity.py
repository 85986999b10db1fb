# SPDX-License-Identifier: Apache-2.0
"""Whether an artifact computes what its checkpoint says, apart from what quantizing cost.

The reference is the PyTorch model of the (quantized) checkpoint, in float64, with the artifact's own activation
arithmetic modelled, so that what is left between the two is the artifact's rounding. With fp32 activations everything
is held tight. With int8 activations rounding decides about a code now and then, and all that follows moves with it
(`mossquant.eval.noise`): single steps must be equal up to that, step by step; free runs are held against what the
activation formats cost, and against the reference with other rounding.

The bounds are this file's constants; every one of them is a line of the report.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.machine import shared_out
from mossquant.eval.noise import with_noise
from mossquant.eval.one_step import EXPLAINED_KL, EXPLAINED_STATE, OneStep, compared_positions, one_step
from mossquant.eval.open import open_model
from mossquant.eval.parity_measures import continuation, forms, growth
from mossquant.eval.passage import held_out_passage
from mossquant.eval.scores import score
from mossquant.eval.windows import Interval, Windows, share_interval
from mossquant.runner import Runner, Tokens
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Text

SURE = 4.0
"""Standard errors by which a statistic must lie beyond its bound before it fails: by chance once in 1,700 with
`LEAST_WINDOWS` windows (Student's t), once in 14,000 with the 79 of the default; five checks are statistics."""
LEAST_WINDOWS = 16
"""Windows (`mossquant.eval.windows`) below which a statistic of the free run is reported and not judged."""
ONE_STEP_MEDIAN_KL = EXPLAINED_KL
"""Median KL of one step: fp32 rounding."""
ONE_STEP_UNEXPLAINED_SHARE = 0.01
"""Positions at which one step differs and rounding before the codes does not explain it."""
ONE_STEP_LARGE_KL = 1e-4
"""A step above this is a code that fell the other way and mattered; how many do is a property of model and text."""
ONE_STEP_MAX_KL_FP32 = 1e-5
"""Largest KL of one step with fp32 activations."""
ONE_STEP_MEDIAN_STATE = EXPLAINED_STATE
"""Median relative difference of the states after one step: a state that is not carried differs by about 1."""
ROUTER_TIE = 1e-4
"""A router nearer than this to another choice may flip by rounding; such positions are counted apart …"""
ROUTER_TIE_SHARE = 0.05
"""… and at most so many of the positions may be."""
FREE_PPL_PCT = 0.1
"""Difference of perplexity in per cent, either way, below which none matters: decisions are made by whole per cents."""
LARGEST_RISE = 700.0
"""Nats whose exponential is still a number; a loss is at most `mossquant.eval.scores.MOST_NATS`."""
FREE_KL_SHARE_OF_COST = 0.5
"""Largest mean KL over the stream, as a share of what the activation formats themselves cost; or …"""
FREE_KL_OF_ROUNDING = 1.5
"""… relative to the reference against itself with other rounding, if that is more; or …"""
FREE_KL = 1e-6
"""… in nats, below which none matters: a thousandth of what int8 weights cost."""
FREE_KL_FP32 = 1e-5
"""Largest mean KL over the stream with fp32 activations."""
GROWTH_SHARE = 0.1
"""Growth of the mean KL in 10,000 tokens below which none matters, as a share of what the mean may be."""
SETTLING = 1024
"""Tokens at the stream's beginning that are left out of the slope: both start from the same state."""
FORM_TOKENS, SPLIT_TOKENS = 256, 1100
"""Tokens that are read in one call and token by token, and in one call and split: more than a Runner's own pieces."""
FORM_OF_ROUNDING = 2
"""Largest mean KL of two forms, relative to the window in which other rounding did most, if that is more than the free
run's bound: so few tokens are one window."""
PROMPTS, PROMPT_TOKENS, CONTINUED = 4, 64, 64
"""Greedy continuations, which must be identical with fp32 activations …"""
CONTINUED_SHARE = 1 / PROMPTS
"""… but for one, which may part where two tokens are equally likely."""

STAGES = ("one step", "free run", "forms", "continuation")
"""What is measured, in this order."""


@dataclass(frozen=True)
class Check:
    """One measured value against its bound; `bound` is None for a figure that is only reported, `note` may say why."""

    name: str
    value: float
    bound: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is a number within its bound."""
        return self.bound is None or (math.isfinite(self.value) and self.value <= self.bound)


@dataclass(frozen=True)
class ParityReport:
    """What `parity` found; `passed` decides the command's exit status.

    Attributes:
        reference: path of the checkpoint.
        artifact: path of the artifact.
        activations: the artifact's activation format.
        text_sha256: of the text.
        positions: positions of the one-step comparison.
        stream: tokens of the free run.
        checks: every measured value with its bound.
        notes: what the user should know about the text, a sentence each.
    """

    reference: str
    artifact: str
    activations: str
    text_sha256: str
    positions: int
    stream: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "version": 1,
            "reference": self.reference,
            "artifact": self.artifact,
            "activations": self.activations,
            "text": {"sha256": self.text_sha256, "tokens": self.stream},
            "positions": self.positions,
            "passed": self.passed,
            "notes": list(self.notes),
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
        }


def parity(
    quantized: str | Path | Weights,
    artifact: str | Path,
    *,
    text: str | Path | Text | None = None,
    positions: int = 2000,
    stream: int = 20_000,
    threads: int | None = None,
    allow_seen: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """Hold an artifact against the checkpoint that it was lowered from.

    Args:
        quantized: the quantized checkpoint; the full-precision one for an artifact of that; or weights.
        artifact: a PATH argument.
        text: a file or a text; None: the bundled held-out text.
        positions: of the one-step comparison (`mossquant.eval.one_step.compared_positions`).
        stream: tokens of the free run, from the text's beginning; fewer where the text is shorter.
        threads: CPU threads.
        allow_seen: use also a text that the model has seen.
        on_stage: is given each of `STAGES` when it is done.

    Raises:
        InputError: bad paths, text or options.
    """
    if positions < 1 or stream < 2 * PROMPT_TOKENS:
        needed = f"1 or more positions and {2 * PROMPT_TOKENS} or more tokens"
        raise InputError(f"{positions} positions and {stream} tokens cannot be measured; give {needed}")
    weights = open_weights(quantized, verb="parity")
    at_once, own_threads = shared_out(threads, 3)
    program = open_model(artifact, threads=own_threads)
    plain = open_model(weights, threads=own_threads)
    formats = program.runner.info.activations
    # An artifact with several formats has those of the plan. In float64, so that what is left is its own rounding.
    planned = "planned" if formats == "mixed" else formats
    reference = TorchRunner.open(weights, activations=planned, dtype=torch.float64, threads=own_threads)
    passage = held_out_passage([plain, program], text=text, tokens=stream + 1, allow_seen=allow_seen, allow_fewer=True)
    if passage.predicted < positions:
        raise InputError(
            f"the text has {passage.predicted} tokens to predict, too few for {positions} positions; give a longer "
            "text, or fewer with --positions"
        )
    measured = measure(
        reference,
        program.runner,
        passage.tokens[0],
        positions=positions,
        unquantized_activations=None if formats == "fp32" else plain.runner,
        at_once=at_once,
        on_stage=on_stage,
    )
    return ParityReport(
        reference=weights.origin.path,
        artifact=program.path,
        activations=formats,
        text_sha256=passage.sha256,
        positions=compared_positions(passage.tokens.shape[1], positions),
        stream=passage.predicted,
        checks=judged(measured),
        notes=passage.notes,
    )


class Measured(NamedTuple):
    """What is judged. Arrays of the free run are [1, T], a value a predicted token, in nats.

    Attributes:
        steps: single steps.
        rise: loss of the artifact − loss of the reference.
        kl: KL(reference ‖ artifact).
        rounding: KL(reference ‖ reference with other rounding); None with fp32 activations, as the next two.
        rounding_rise: loss of the reference with other rounding − its loss.
        cost: KL(reference with fp32 activations ‖ reference).
        forms: KL(one call ‖ other form) [t] by the form's name.
        parted: share of the greedily continued tokens that differ.
    """

    steps: OneStep
    rise: NDArray[np.float64]
    kl: NDArray[np.float64]
    rounding: NDArray[np.float64] | None
    rounding_rise: NDArray[np.float64] | None
    cost: NDArray[np.float64] | None
    forms: dict[str, NDArray[np.float64]]
    parted: float


def measure(
    reference: TorchRunner,
    artifact: Runner,
    tokens: Tokens,
    *,
    positions: int,
    unquantized_activations: Runner | None,
    at_once: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Measured:
    """Run two Runners on tokens [T].

    Args:
        reference: models the artifact's arithmetic.
        artifact: what is judged.
        tokens: the stream.
        positions: of the one-step comparison.
        unquantized_activations: the reference with fp32 activations, where the artifact's are quantized.
        at_once: Runners that work at the same time.
        on_stage: is given each of `STAGES` when it is done.
    """
    steps = one_step(reference, artifact, tokens, positions=positions)
    on_stage(STAGES[0])
    noisy = None if unquantized_activations is None else with_noise(reference)
    runners = [reference, artifact, *([noisy] if noisy is not None else [])]
    expected, run, *noisy_run = score(runners, tokens[None], at_once=at_once)
    rounding = rounding_rise = cost = None
    if unquantized_activations is not None and noisy_run:
        rounding, rounding_rise = noisy_run[0].kl, noisy_run[0].nll - expected.nll
        cost = score([unquantized_activations, reference], tokens[None], at_once=at_once)[1].kl
    on_stage(STAGES[1])
    read = forms(artifact, tokens, every=FORM_TOKENS, split=SPLIT_TOKENS)
    on_stage(STAGES[2])
    starts = np.linspace(0, max(0, len(tokens) - PROMPT_TOKENS), PROMPTS).astype(int)
    prompts = np.stack([tokens[start : start + PROMPT_TOKENS] for start in starts])
    wanted = continuation(reference, prompts, steps=CONTINUED)
    continued = np.concatenate([continuation(artifact, prompt[None], steps=CONTINUED) for prompt in prompts])
    on_stage(STAGES[3])
    parted = float((continued != wanted).mean())
    return Measured(steps, run.nll - expected.nll, run.kl, rounding, rounding_rise, cost, read, parted)


def judged(measured: Measured) -> tuple[Check, ...]:
    """The checks of what was measured."""
    exact = measured.cost is None
    free, bound = _free_run_checks(measured)
    most = bound
    if measured.rounding is not None:
        windows = Windows(*measured.rounding.shape)
        most = max(most, FORM_OF_ROUNDING * float((windows.sums(measured.rounding) / windows.counts).max()))
    parted = f"greedy continuation of {CONTINUED} tokens: share that differs"
    return (
        *_one_step_checks(measured.steps, exact=exact),
        *free,
        *(
            Check(f"{name} against one call: mean KL over {len(kl)} tokens", float(kl.mean()), most)
            for name, kl in measured.forms.items()
        ),
        Check(parted, measured.parted, CONTINUED_SHARE if exact else None),
    )


def _one_step_checks(steps: OneStep, *, exact: bool) -> list[Check]:
    tied = steps.margin < ROUTER_TIE
    counted = tied if tied.all() else ~tied
    kl, state_error, unexplained = steps.kl[counted], steps.state_error[counted], steps.unexplained[counted]
    large, asked = kl > ONE_STEP_LARGE_KL, unexplained[np.isnan(unexplained).cumsum() == 0]
    # Where most rows of a table hold values half-way between two codes, rounding decides at most positions.
    plain = (unexplained == 1) | ((kl <= EXPLAINED_KL) & (state_error <= EXPLAINED_STATE))
    return [
        _median("one step: median KL", kl[plain], ONE_STEP_MEDIAN_KL),
        Check(f"one step: share of positions with KL above {EXPLAINED_KL:g}", float((kl > EXPLAINED_KL).mean())),
        _share("one step: … that rounding does not explain", asked, ONE_STEP_UNEXPLAINED_SHARE),
        Check(f"one step: share of positions with KL above {ONE_STEP_LARGE_KL:g}", float(large.mean())),
        *_interval(f"one step: share above {ONE_STEP_LARGE_KL:g}", share_interval(int(large.sum()), len(large))),
        Check("one step: largest KL", float(kl.max()), ONE_STEP_MAX_KL_FP32 if exact else None),
        _median("one step: median relative difference of the state", state_error[plain], ONE_STEP_MEDIAN_STATE),
        _share("one step: share of positions with a router near a tie", tied, ROUTER_TIE_SHARE),
        Check("one step: largest KL at such a position", float(steps.kl[tied].max(initial=0.0))),
    ]


def _free_run_checks(measured: Measured) -> tuple[list[Check], float]:
    """The checks of the free run, and the bound that it puts on a mean KL."""
    kl, rise, rounding, cost = measured.kl, measured.rise, measured.rounding, measured.cost
    windows = Windows(*kl.shape)
    rises = FREE_PPL_PCT / 100
    if measured.rounding_rise is not None:
        rises = max(rises, abs(float(measured.rounding_rise.mean())) + _margin(windows, measured.rounding_rise))
    most = 100 * math.expm1(min(rises + min(_margin(windows, rise), rises), LARGEST_RISE))
    percent = 100 * math.expm1(abs(float(rise.mean())))
    checks = [_statistic("free run: difference of perplexity, %", percent, most, len(windows.counts))]
    mean = float(kl.mean())
    if rounding is None or cost is None:
        return [*checks, Check("free run: mean KL", mean, FREE_KL_FP32)], FREE_KL_FP32
    mean_cost, mean_rounding = float(cost.mean()), float(rounding.mean())
    bound = max(FREE_KL_SHARE_OF_COST * mean_cost, FREE_KL_OF_ROUNDING * mean_rounding, FREE_KL)
    checks += [
        _statistic("free run: mean KL", mean, bound + min(_margin(windows, kl), bound), len(windows.counts)),
        Check("free run: mean KL of the reference to itself with other rounding", mean_rounding),
        Check("what quantized activations themselves cost: mean KL", mean_cost),
        *_interval("what quantized activations cost", windows.interval(cost)),
    ]
    if mean_cost > 0:  # a model may be one that no activation changes
        checks += [
            Check("free run: mean KL as a share of that cost", mean / mean_cost),
            *_interval("free run: share of that cost", windows.ratio_interval(kl, cost)),
        ]
    for name, values, floor in (
        ("free run: growth of KL per 10,000 tokens", kl, None),
        ("free run: growth beyond that of other rounding", kl - rounding, GROWTH_SHARE * bound),
    ):
        slope = growth(values[0], skip=SETTLING)
        if slope is None:
            checks.append(Check(name, 0.0, note="not measured: tokens are too few"))
            continue
        per_10k, error, count = slope
        checks += [
            Check(name, per_10k) if floor is None else _statistic(name, per_10k, floor + SURE * error, count),
            *_interval(name, Interval(per_10k - 2 * error, per_10k + 2 * error)),
        ]
    return checks, bound


def _median(name: str, values: NDArray[np.float64], most: float) -> Check:
    """The median over the positions at which rounding before the codes explains nothing."""
    if values.size == 0:
        return Check(name, 0.0, note="not judged: rounding explains every position")
    return Check(name, float(np.median(values)), most)


def _share(name: str, counted: NDArray[Any], most: float) -> Check:
    """A share of positions, which fails where Wilson's interval of `SURE` leaves `most` out."""
    if counted.size == 0:  # repetitions were used up where routers are near a tie
        return Check(name, 0.0, note="not judged: no position")
    return Check(name, float(counted.mean()), most + SURE * math.sqrt(most * (1 - most) / counted.size))


def _margin(windows: Windows, values: NDArray[np.float64]) -> float:
    """`SURE` standard errors of the mean of values [1, T]; 0 where there is one window.

    Of an artifact it counts up to the bound once more: a fault in a few windows has a large spread itself.
    """
    return SURE * (windows.standard_error(values) or 0.0)


def _statistic(name: str, value: float, most: float, count: int) -> Check:
    """A figure over so many windows, judged where they are enough."""
    if count < LEAST_WINDOWS:
        return Check(name, value, note=f"not judged: {count} of {LEAST_WINDOWS} windows")
    return Check(name, value, most)


def _interval(name: str, interval: Interval | None) -> list[Check]:
    """The interval of a figure; nothing where there is none."""
    if interval is None:
        return []
    low, high = interval
    return [Check(f"{name}: 95 % interval from", low), Check(f"{name}: 95 % interval to", high)]
