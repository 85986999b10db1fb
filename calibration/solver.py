# SPDX-License-Identifier: Apache-2.0
"""What a solver is: it finds scales and codes of a matrix in a number format.

    prepare(format, statistics) → solve;   solve(rows [n, K]) → the quantized rows

What a matrix shares (a factorization of its inputs' second moments, say) is made once, in `prepare`; rows are then
solved in pieces of bounded size, independently of one another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mossquant.formats import NumberFormat, QuantizedTensor

Statistics = Mapping[str, Any]
"""What was measured for one tensor: need → value, e.g. "gram" → fp32 [K, K]."""
Measured = Callable[[str], Statistics]
"""Tensor name → what was measured for it."""
Solve = Callable[[Tensor], QuantizedTensor]
"""fp32 rows [n, K] of a matrix → the same quantized."""


def _nothing_lacks(statistics: Statistics) -> None:
    return None


@dataclass(frozen=True)
class Solver:
    """One way to find scales and codes.

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
