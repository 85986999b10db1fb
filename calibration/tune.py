# SPDX-License-Identifier: Apache-2.0
"""`tune`: learn roundings and scales of a whole block, mixer or MLP with its routing, from what goes in and comes out.

    minimise over v and r   mean (x + block(x; ŵ) − y)² / mean (y − x)²
    ŵ = round(w / s₀ + v) · s,   s = s₀ · e^r in the stored scale type,   |v| ≤ ½

Cheng et al. 2023 (arXiv 2309.05516), AutoRound: rounding offsets and clipping by gradient descent, straight through the
rounding, for each block against its full-precision output. x is what the quantized blocks before it make of the text.
y is what full precision makes of the same text, from its own inputs, so that a block also makes up for those before it.
What is computed with is exactly what is stored (`mossquant.calibration.student`); norms, routers and whatever else is
kept stay. Of what is looked at every so many steps the one with the least error on held-out windows is taken, the start
among them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.products import linear
from mossquant.calibration.solver import BlockSolved, BlockSolver, BlockTask
from mossquant.calibration.student import Student
from mossquant.checkpoint.weights import View, Weights
from mossquant.formats import QuantizedTensor
from mossquant.kernels.conv.autograd import causal_conv as conv_kernel
from mossquant.model.block import Block
from mossquant.model.forward import Forward
from mossquant.model.routing import Routing
from mossquant.model.tensors import TensorSpec

OFFSET = 0.5
"""|v| at most: a value is rounded to one of its two neighbours."""


@dataclass(frozen=True)
class Rates:
    """How fast and on how much at once. Found on the calibration text of the bundled model.

    Attributes:
        steps: in all.
        batch: windows a step.
        codes: learning rate of v.
        small: of v of quantized tensors that are no matrices.
        scales: of r.
        judged: how often held-out windows are looked at.
    """

    steps: int = 64
    batch: int = 8
    codes: float = 5e-3
    small: float = 5e-3
    scales: float = 1e-3
    judged: int = 8


RATES = Rates()


def tune(task: BlockTask, rates: Rates | None = None) -> BlockSolved:
    """Solve a block.

    Args:
        task: the block.
        rates: how fast; None: the defaults.
    """
    rates = rates or RATES
    learned, judged = (~task.held_out).nonzero().flatten(), task.held_out.nonzero().flatten()
    if len(learned) == 0 or len(judged) == 0:
        kept = {name: task.start[name] for name in sorted(task.solved)}
        note = f"nothing was held out to judge on: as {TUNE.start.name} left it"
        return BlockSolved(kept, dict.fromkeys(kept, note), math.nan, math.nan)
    tuning = _Tuning(task, rates)
    before = best = tuning.error(judged)
    found, every = tuning.tensors(), max(1, rates.steps // rates.judged)
    batch = min(rates.batch, len(learned))
    generator = torch.Generator().manual_seed(0)
    rounds = -(-rates.steps * batch // len(learned))
    order = torch.cat([learned[torch.randperm(len(learned), generator=generator)] for _ in range(rounds)])
    for step in range(rates.steps):
        tuning.step(order[step * batch : (step + 1) * batch], share=1 - step / rates.steps)
        if (step + 1) % every == 0 or step + 1 == rates.steps:
            error = tuning.error(judged)
            if error < best:
                best, found = error, tuning.tensors()
    if best < before:
        return BlockSolved(found, tuning.unreached(), before, best)
    note = f"nothing better was found on held-out text: as {TUNE.start.name} left it"
    return BlockSolved(found, dict.fromkeys(found, note), before, before)


class _OfBlock(View):
    """A model of which one block is seen."""

    def __init__(self, weights: Weights, block: Block) -> None:
        super().__init__(weights)
        self._own = {spec.name: spec for spec in block.specs(block.config, block.layer)}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The block's tensors."""
        return self._own


class _Tuning:
    """A block that learns."""

    def __init__(self, task: BlockTask, rates: Rates) -> None:
        self._task, self._batch, block = task, rates.batch, task.block
        self._device, own = block.norm.device, _OfBlock(task.weights, block)
        frozen = own.specs.keys() - task.solved
        device = str(self._device)
        self._student = Student(own, task.plan, task.start, codes=True, device=device, frozen=frozen)
        groups = self._student.groups
        self._offset = [(u, u.detach().clone()) for kind in ("codes", "small") for u in groups[kind]]
        self._size = float((task.targets - task.inputs).square().mean(dtype=torch.float64)) or 1.0
        self._experts = block.experts(block.config, block.layer)
        self._reached: set[int] = set()
        on_cpu = self._device.type == "cpu"
        scan: Literal["kernel", "chunked"] = "kernel" if on_cpu else "chunked"
        conv = conv_kernel if on_cpu else None
        parameter = self._student.parameter
        self._run = Forward(scan=scan, dense_ssm=True, multiply=linear, conv=conv, parameter=parameter)
        peaks = {"codes": rates.codes, "small": rates.small, "scales": rates.scales}
        learning = [{"params": of, "lr": peaks[kind], "peak": peaks[kind]} for kind, of in groups.items() if of]
        # Gradients of a mean over thousands of tokens are small: a usual ε would slow the smallest ones down.
        self._optimizer = torch.optim.Adam(learning, betas=(0.9, 0.95), eps=1e-15, fused=True)

    def step(self, windows: Tensor, *, share: float) -> float:
        """Learn from windows of these numbers at a share of the rates; returns the loss before."""
        self._student.refresh()
        loss = self._loss(windows, replace(self._run, reroute=self._count))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self._optimizer.step()
        for u, start in self._offset:
            u.detach().clamp_(start - OFFSET, start + OFFSET)
        self._student.stay_in_range()
        return loss.item()

    def error(self, windows: Tensor) -> float:
        """The loss on windows of these numbers."""
        with torch.no_grad():
            self._student.refresh()
            parts = torch.split(windows, self._batch)
            return sum(float(self._loss(part, self._run)) * len(part) for part in parts) / len(windows)

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Those that are asked for, as they would be stored now."""
        made = self._student.tensors().items()
        return {name: one for name, one in made if isinstance(one, QuantizedTensor) and name in self._task.solved}

    def unreached(self) -> dict[str, str]:
        """Notes on tensors of experts that no text reached: without gradients they stayed as they were."""
        members = () if self._experts is None else self._experts.members
        starved = [name for expert, names in enumerate(members) if expert not in self._reached for name in names]
        note = f"no calibration text reached it: as {TUNE.start.name} left it"
        return {name: note for name in starved if name in self._task.solved}

    def _loss(self, windows: Tensor, run: Forward) -> Tensor:
        task, block = self._task, self._task.block
        x, y = (stream[windows].to(self._device) for stream in (task.inputs, task.targets))
        state = {spec.name: spec.zeros(len(x), device=x.device) for spec in block.states(block.config, block.layer)}
        return (block.added(x, state, run)[0] - y).square().mean() / self._size

    def _count(self, name: str, routing: Routing) -> Routing:
        self._reached.update(torch.unique(routing.chosen).tolist())
        return routing


TUNE = BlockSolver("tune", GPTQ, tune)
