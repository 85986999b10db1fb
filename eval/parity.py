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
from typing import Any

import numpy as np
import torch

from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.machine import shared_out
from mossquant.eval.noise import with_noise
from mossquant.eval.one_step import EXPLAINED_KL, OneStep, compared_positions, one_step
from mossquant.eval.open import open_model
from mossquant.eval.parity_measures import continuation, forms, growth
from mossquant.eval.passage import held_out_passage
from mossquant.eval.scores import score
from mossquant.eval.windows import Interval, Windows, share_interval
from mossquant.runner import Runner, Tokens
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Text

__all__ = ["STAGES", "Check", "ParityReport", "parity", "parity_of"]

ONE_STEP_MEDIAN_KL = 1e-7
"""Median KL of one step: fp32 rounding."""
ONE_STEP_UNEXPLAINED_SHARE = 0.01
"""Positions at which one step differs and rounding before the codes does not explain it."""
ONE_STEP_LARGE_KL = 1e-4
"""A step above this is a code that fell the other way and mattered; how many do is a property of model and text."""
ONE_STEP_MAX_KL_FP32 = 1e-5
"""Largest KL of one step with fp32 activations."""
ONE_STEP_MEDIAN_STATE = 1e-5
"""Median relative difference of the states after one step: a state that is not carried differs by about 1."""
ROUTER_TIE = 1e-4
"""A router nearer than this to another choice may flip by rounding; such positions are counted apart …"""
ROUTER_TIE_SHARE = 0.05
"""… and at most so many of the positions may be."""
FREE_PPL_PCT, FREE_PPL_TOKENS = 0.1, 20_000
"""Largest difference of perplexity over a stream of so many tokens, in per cent; over a shorter one it is left to
chance as the inverse of the root of its length, and so is the bound."""
FREE_KL_SHARE_OF_COST = 0.5
"""Largest mean KL over the stream, as a share of what the activation formats themselves cost; or …"""
FREE_KL_OF_ROUNDING = 1.5
"""… relative to the reference against itself with other rounding, if that is more."""
FREE_KL_FP32 = 1e-5
"""Largest mean KL over the stream with fp32 activations."""
SETTLING = 1024
"""Tokens at the stream's beginning that are left out of the slope: both start from the same state."""
FORM_TOKENS = 256
"""Tokens that are read in one call, token by token and split."""
PROMPTS, PROMPT_TOKENS, CONTINUED = 4, 64, 64
"""Greedy continuations that must be identical with fp32 activations."""

STAGES = ("one step", "free run", "forms", "continuation")
"""What is measured, in this order."""


@dataclass(frozen=True)
class Check:
    """One measured value against its bound; `bound` is None for a figure that is only reported."""

    name: str
    value: float
    bound: float | None = None

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
    """

    reference: str
    artifact: str
    activations: str
    text_sha256: str
    positions: int
    stream: int
    checks: tuple[Check, ...]

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
    checks = parity_of(
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
        checks=checks,
    )


def parity_of(
    reference: TorchRunner,
    artifact: Runner,
    tokens: Tokens,
    *,
    positions: int,
    unquantized_activations: Runner | None,
    at_once: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[Check, ...]:
    """The checks of two Runners on tokens [T].

    Args:
        reference: models the artifact's arithmetic.
        artifact: what is judged.
        tokens: the stream.
        positions: of the one-step comparison.
        unquantized_activations: the reference with fp32 activations, where the artifact's are quantized.
        at_once: Runners that work at the same time.
        on_stage: is given each of `STAGES` when it is done.
    """
    exact = unquantized_activations is None
    checks = _one_step_checks(one_step(reference, artifact, tokens, positions=positions), exact=exact)
    on_stage(STAGES[0])
    free, bound = _free_run_checks(reference, artifact, tokens, unquantized_activations, at_once=at_once)
    checks += free
    on_stage(STAGES[1])
    for name, kl in forms(artifact, tokens[:FORM_TOKENS]).items():
        checks.append(Check(f"{name} against one call: mean KL over {len(kl)} tokens", float(kl.mean()), bound))
    on_stage(STAGES[2])
    starts = np.linspace(0, max(0, len(tokens) - PROMPT_TOKENS), PROMPTS).astype(int)
    prompts = np.stack([tokens[start : start + PROMPT_TOKENS] for start in starts])
    expected = continuation(reference, prompts, steps=CONTINUED)
    continued = np.concatenate([continuation(artifact, prompt[None], steps=CONTINUED) for prompt in prompts])
    name, share = (
        f"greedy continuation of {CONTINUED} tokens: share that differs",
        float((continued != expected).mean()),
    )
    on_stage(STAGES[3])
    return (*checks, Check(name, share, 0.0 if exact else None))


def _one_step_checks(steps: OneStep, *, exact: bool) -> list[Check]:
    tied = steps.margin < ROUTER_TIE
    counted = tied if tied.all() else ~tied
    kl, state_error = steps.kl[counted], steps.state_error[counted]
    checks = [Check("one step: median KL", float(np.median(kl)), ONE_STEP_MEDIAN_KL)]
    if not exact:
        large, unexplained = kl > ONE_STEP_LARGE_KL, steps.unexplained[counted]
        checks += [
            Check(f"one step: share of positions with KL above {EXPLAINED_KL:g}", float((kl > EXPLAINED_KL).mean())),
            Check("one step: … that rounding does not explain", float(unexplained.mean()), ONE_STEP_UNEXPLAINED_SHARE),
            Check(f"one step: share of positions with KL above {ONE_STEP_LARGE_KL:g}", float(large.mean())),
            *_interval(f"one step: share above {ONE_STEP_LARGE_KL:g}", share_interval(int(large.sum()), len(large))),
        ]
    state = "one step: median relative difference of the state"
    return [
        *checks,
        Check("one step: largest KL", float(kl.max()), ONE_STEP_MAX_KL_FP32 if exact else None),
        Check(state, float(np.median(state_error)), ONE_STEP_MEDIAN_STATE),
        Check("one step: share of positions with a router near a tie", float(tied.mean()), ROUTER_TIE_SHARE),
        Check("one step: largest KL at such a position", float(steps.kl[tied].max(initial=0.0))),
    ]


def _free_run_checks(
    reference: TorchRunner, artifact: Runner, tokens: Tokens, unquantized: Runner | None, *, at_once: int
) -> tuple[list[Check], float]:
    """The checks of the free run, and the bound that it puts on a mean KL."""
    noisy = with_noise(reference)
    runners = [reference, artifact, *([noisy] if noisy is not None else [])]
    expected, run, *noisy_run = score(runners, tokens[None], at_once=at_once)
    rise = abs(100 * math.expm1(run.nll.mean() - expected.nll.mean()))
    mean = float(run.kl.mean())
    most = FREE_PPL_PCT * math.sqrt(max(1.0, FREE_PPL_TOKENS / run.nll.size))
    checks = [Check("free run: difference of perplexity, %", rise, most)]
    if unquantized is None or not noisy_run:
        return [*checks, Check("free run: mean KL", mean, FREE_KL_FP32)], FREE_KL_FP32
    cost, rounding = score([unquantized, reference], tokens[None], at_once=at_once)[1].kl, noisy_run[0].kl
    mean_cost, mean_rounding = float(cost.mean()), float(rounding.mean())
    bound = max(FREE_KL_SHARE_OF_COST * mean_cost, FREE_KL_OF_ROUNDING * mean_rounding)
    windows = Windows(*run.kl.shape)
    checks += [
        Check("free run: mean KL", mean, bound),
        Check("free run: mean KL of the reference to itself with other rounding", mean_rounding),
        Check("what quantized activations themselves cost: mean KL", mean_cost),
        *_interval("what quantized activations cost", windows.interval(cost)),
    ]
    if mean_cost > 0:  # a model may be one that no activation changes
        checks += [
            Check("free run: mean KL as a share of that cost", mean / mean_cost),
            *_interval("free run: share of that cost", windows.ratio_interval(run.kl, cost)),
        ]
    for name, values, limit in (
        ("free run: growth of KL per 10,000 tokens", run.kl, None),
        ("free run: growth beyond that of other rounding", run.kl - rounding, 0.0),
    ):
        slope = growth(values[0], skip=SETTLING)
        if slope is None:
            checks.append(Check(f"{name}: not measured, tokens are too few", float(values.size)))
        else:
            checks += [Check(name, slope[0]), *_interval(name, slope[1], low_at_most=limit)]
    return checks, bound


def _interval(name: str, interval: Interval | None, *, low_at_most: float | None = None) -> list[Check]:
    """The interval of a figure; nothing where there is none."""
    if interval is None:
        return []
    low, high = interval
    return [Check(f"{name}: 95 % interval from", low, low_at_most), Check(f"{name}: 95 % interval to", high)]
