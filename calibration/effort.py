# SPDX-License-Identifier: Apache-2.0
"""What quantizing with text or statistics takes, told before it begins: minutes, disk and memory.

Parts of the work are timed on this machine as it is now, each a second or so: the first layer on a window of tokens,
some rows of the head, some rows in a format, GPTQ once for each width. What is to come is so many times these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.calibration.calibrate import Step, Sums, steps_of
from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.meter import divergence, learning_bytes, metering_bytes
from mossquant.calibration.nearest import nearest_mse
from mossquant.calibration.solver import BlockSolver, Solver
from mossquant.calibration.statistics import SAMPLED_ROWS, Hessian
from mossquant.checkpoint.weights import Weights, value
from mossquant.files.space import BLOCK_WEIGHTS
from mossquant.formats import get_format
from mossquant.model.forward import Forward
from mossquant.model.tensors import Use, outside_blocks
from mossquant.plan.plan import Plan
from mossquant.progress import about

_TOKENS = 256
_ROWS = 64
"""Tokens of the pass and rows of the head that are timed."""
SCALED = 10
"""Groups that are measured to scale estimates."""
LIBRARIES = 4 * 10**7
"""Bytes of what libraries set up when a model is first run, and of what encoding a text leaves."""
REACHED = 0.6
"""The share of the blocks that comes after a group, with the group's own."""
_TRAINED = 4.0
"""What a token costs forward and backward, in passes forward."""
_LOOKED_UP = 6e-9
"""Seconds a weight of the table, of a gradient of looking tokens up: zeros, and a sum with the head's."""
_INNER = 0.3e-9
"""Seconds a weight of multiplying a gradient with a change."""
PASSES = 3.0
"""What a token costs in recovery, in passes of the judging kind: measured on models of 6M and 11M parameters."""


@dataclass(frozen=True)
class Effort:
    """What is to come.

    Attributes:
        parts: name of a part → seconds.
        disk_bytes: of the output.
        memory_bytes: anonymous memory, at most, beside the interpreter's own.
    """

    parts: dict[str, float]
    disk_bytes: int
    memory_bytes: int

    def said(self) -> str:
        """In a line."""
        parts = [f"{name} {about(seconds)}" for name, seconds in self.parts.items()]
        whole = parts[0] if len(parts) == 1 else f"{about(sum(self.parts.values()))} ({', '.join(parts)})"
        return (
            f"{whole}; up to {self.disk_bytes / 1e6:,.0f} MB of disk, about {self.memory_bytes / 1e6:,.0f} MB of "
            "memory beside Python's own"
        )


class Pace:
    """How fast this machine is with a model.

    Attributes:
        blocks: seconds a token through all blocks.
        observed: the same where second moments are gathered.
        head: seconds a token of the head's product alone.
        compared: seconds a token of comparing two rows of logits.
        table: weights of the table.
    """

    def __init__(self, weights: Weights, *, device: str = "cpu") -> None:
        self._weights, self._device = weights, torch.device(device)
        self._prepared: dict[int, tuple[float, float]] = {}
        self._rounded: dict[str, float] = {}
        with torch.inference_mode():
            self.blocks, self.observed = self._through_blocks()
            self.head, self.compared = self._through_head()
        self.table = weights.config.vocab_size * weights.config.hidden_size

    def rounding(self, storage: str) -> float:
        """Seconds a weight of `nearest-mse`."""
        if storage not in self._rounded:
            rows, number_format = torch.randn(BLOCK_WEIGHTS // 1024, 1024), get_format(storage)
            self._rounded[storage] = _timed(lambda: nearest_mse(number_format, rows)) / rows.numel()
        return self._rounded[storage]

    def gptq(self, rows: int, columns: int) -> float:
        """Seconds of a matrix."""
        if columns not in self._prepared:
            number_format, block = get_format("int4_g32"), max(1, BLOCK_WEIGHTS // columns)
            x, matrix = torch.randn(columns + _ROWS, columns), torch.randn(block, columns)
            known = Hessian((x.T @ x).double() / len(x), 1.0, 1.0, x[:SAMPLED_ROWS].double())
            began = perf_counter()
            solve = GPTQ.prepare(number_format, {"hessian": known, "rows": matrix[:SAMPLED_ROWS]})
            prepared = perf_counter() - began
            self._prepared[columns] = prepared, _timed(lambda: solve(matrix)) / block
        prepare, row = self._prepared[columns]
        return prepare + rows * row

    def _through_blocks(self) -> tuple[float, float]:
        steps = [step for step in steps_of(self._weights) if step.kind is not None]
        first = [step for step in steps if step.layer == 0]
        plain, observed = zip(*(self._through(step) for step in first), strict=True)
        share = len(steps) / len(first) / _TOKENS
        return sum(plain) * share, sum(observed) * share

    def _through(self, step: Step) -> tuple[float, float]:
        """Seconds of a window through a block of the first layer, alone and with second moments."""
        assert step.kind is not None
        config = self._weights.config
        block = step.kind(config, step.layer)
        block.load(lambda name: value(self._weights, name))
        block.requires_grad_(False).to(self._device)
        state = {spec.name: spec.zeros(1, device=self._device) for spec in block.states(config, step.layer)}
        x = torch.randn(1, _TOKENS, config.hidden_size, device=self._device)
        sums = Sums(step, self._device)
        sums.begin(0, torch.zeros(_TOKENS, dtype=torch.bool))
        plain = Forward(scan="kernel" if self._device.type == "cpu" else "chunked")
        watched = replace(plain, observe=sums.observe, reroute=sums.reroute)
        return _timed(lambda: block.added(x, state, plain)), _timed(lambda: block.added(x, state, watched))

    def _through_head(self) -> tuple[float, float]:
        table = value(self._weights, outside_blocks(self._weights.specs.values())[Use.LINEAR].name).to(self._device)
        x = torch.randn(_ROWS, table.shape[1], device=self._device)
        logits = F.linear(x[:1], table)
        return _timed(lambda: F.linear(x, table)) / _ROWS, _timed(lambda: divergence(logits, logits + 1e-3))


def _timed(run: Callable[[], object]) -> float:
    """Seconds of a run; the one before pays for what libraries set up."""
    run()
    began = perf_counter()
    run()
    return perf_counter() - began


def choosing(pace: Pace, jobs: Sequence[tuple[int, str]], tokens: int, *, windows: Tensor | None, levels: int) -> float:
    """Seconds of finding what groups lose.

    Args:
        pace: of this machine.
        jobs: (weights of a group, format) of every change.
        tokens: on which a change is measured.
        windows: of the passes for gradients [W, T], where losses are estimated.
        levels: choices that are measured as a whole.
    """
    rounding = sum(count * pace.rounding(storage) for count, storage in jobs)
    rounding *= 1 + levels / max(1, len({storage for _, storage in jobs}))
    alone = tokens * (REACHED * pace.blocks + 2 * pace.head + pace.compared)
    if windows is None:
        return rounding + tokens * pace.blocks + (len(jobs) + levels) * alone
    gradient = windows.shape[1] * (_TRAINED * pace.blocks + 3 * pace.head) + _LOOKED_UP * pace.table
    gradient += _INNER * sum(count for count, _ in jobs)
    return rounding + tokens * pace.blocks + len(windows) * gradient + (SCALED + levels) * alone


def choosing_bytes(weights: Weights, jobs: Sequence[tuple[int, str]], tokens: int, *, windows: Tensor | None) -> int:
    """Anonymous memory of that, at most; arguments as those of `choosing`.

    The model and what is changed in fp32; where losses are estimated, every change in bf16 and the gradients of a
    window: those of a tied table are made twice, as a head's and as a table's, before they are added.
    """
    parameters = weights.origin.parameters
    held = LIBRARIES + 4 * parameters + metering_bytes(weights, tokens)
    if windows is None:
        return held + 4 * parameters
    vocabulary, length = weights.config.vocab_size, windows.shape[1]
    gradients = 4 * parameters + 2 * 4 * vocabulary * (weights.config.hidden_size + length)
    return held + 2 * sum(count for count, _ in jobs) + gradients + learning_bytes(weights, length)


def solving(
    pace: Pace,
    weights: Weights,
    plan: Plan,
    solvers: Mapping[str, Solver | BlockSolver],
    *,
    walked: int,
    trained: int,
) -> float:
    """Seconds of rounding every tensor.

    Args:
        pace: of this machine.
        weights: the model.
        plan: names a solver for each.
        solvers: those; one that needs to know something is taken to cost what `gptq` does.
        walked: tokens that go through the model block by block.
        trained: the tokens among them of the steps of a block solver.
    """
    seconds = walked * (pace.blocks + pace.observed) + trained * _TRAINED * pace.blocks
    for entry in plan.tensors:
        if entry.format is None:
            continue
        if solvers[entry.solver or ""].needs and weights.specs[entry.name].site is not None:
            seconds += pace.gptq(entry.rows, entry.columns)
        else:
            seconds += entry.count * pace.rounding(entry.format)
    return seconds


def judging(pace: Pace, tokens: int, times: int) -> float:
    """Seconds of comparing what was made with full precision so many times."""
    return tokens * ((1 + times) * pace.blocks + times * (2 * pace.head + pace.compared))


def distilling(pace: Pace, tokens: int) -> float:
    """Seconds of recovery over so many tokens."""
    return tokens * (PASSES * pace.blocks + 3 * pace.head)
