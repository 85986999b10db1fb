# SPDX-License-Identifier: Apache-2.0
"""What a solver is: it finds scales and codes of tensors in their number formats. There are three kinds.

    matrix   prepare(format, statistics) → solve;   solve(rows [n, K]) → the quantized rows
    block    solve(block, its inputs, its targets) → every tensor of the block that it is asked for
    model    the whole model against its full-precision self, on text, after every tensor was solved

What a matrix shares (a factorization of its inputs' second moments, say) is made once, in `prepare`; rows are then
solved in pieces of bounded size, independently of one another. A block solver begins with what a matrix solver made of
the block; `mossquant.calibration.walk` shows it the inputs that the quantized blocks before it make. The one of the
third kind is `recover`: a recipe asks for it by tokens, not by name of a tensor's solver.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.model.block import Block
from mossquant.plan.plan import Plan

Statistics = Mapping[str, Any]
"""What was measured for one tensor: need → value. "hessian" → `Hessian`, "rows" → fp32 [n, K], some of its rows; both
None where no linear multiplies it."""
Measured = Callable[[str], Statistics]
"""Tensor name → what was measured for it."""
Solve = Callable[[Tensor], QuantizedTensor]
"""fp32 rows [n, K] of a matrix → the same quantized."""


def _nothing_lacks(statistics: Statistics) -> None:
    return None


@dataclass(frozen=True)
class Solver:
    """One way to find scales and codes of a matrix.

    Attributes:
        name: the name used in recipes, ledgers and reports.
        needs: what must have been measured for a tensor; empty where the weights alone decide.
        prepare: (number format, statistics of the tensor) → what solves rows of it.
        note: statistics of a tensor → what they lack and what is done instead, for the ledger; None where nothing.
    """

    name: str
    needs: tuple[str, ...]
    prepare: Callable[[NumberFormat, Statistics], Solve]
    note: Callable[[Statistics], str | None] = _nothing_lacks

    def known(self, tensor: str, measured: Measured | None) -> Statistics:
        """What it needs to know of a tensor. Raises `InputError`: some of that was not measured."""
        if not self.needs:
            return {}
        known = {} if measured is None else measured(tensor)
        missing = " and ".join(need for need in self.needs if need not in known)
        if missing:
            raise InputError(f"{self.name} needs {missing} of {tensor}, which was not measured")
        return known


@dataclass(frozen=True)
class BlockTask:
    """One block that is to be solved.

    Attributes:
        weights: the full-precision model.
        plan: its plan.
        block: the full-precision block, loaded.
        start: tensor name → what the matrix solvers made of each quantized tensor of the block.
        solved: names of those that the block solver is asked for; the others stay as they are.
        inputs: fp32 [W, T, D], the residual stream before the block, each window from a state of zeros.
        targets: fp32 [W, T, D], the residual stream that there should be after it.
        held_out: bool [W], windows to judge on and not to learn from.
    """

    weights: Weights
    plan: Plan
    block: Block
    start: Mapping[str, QuantizedTensor]
    solved: frozenset[str]
    inputs: Tensor
    targets: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class BlockSolved:
    """What became of a block.

    Attributes:
        tensors: name → what is stored of each tensor that was asked for.
        notes: name → what was lacking and what was done instead.
        before: held-out error of the start; NaN where nothing was held out.
        after: the same of what was found, never more.
    """

    tensors: Mapping[str, QuantizedTensor]
    notes: Mapping[str, str]
    before: float
    after: float


@dataclass(frozen=True)
class BlockSolver:
    """One way to find scales and codes of a block's tensors together.

    Attributes:
        name: the name used in recipes, ledgers and reports.
        start: the matrix solver that it begins with, and that tensors outside blocks get.
        solve: solves one block.
        needs: that it is shown a block on text.
    """

    name: str
    start: Solver
    solve: Callable[[BlockTask], BlockSolved]
    needs: tuple[str, ...] = ("block",)
