# SPDX-License-Identifier: Apache-2.0
"""What reading back the weights of an artifact found, whatever the target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossquant.checkpoint.weights import Weights
from mossquant.files.space import row_blocks


@dataclass(frozen=True)
class WeightsReport:
    """What reading back the weights of an artifact found.

    Attributes:
        path: the program.
        tensors: tensors compared.
        weights: their elements.
        differences: one line for each tensor that differs, with the first place where it does; and what is left over.
        another: whether the program says that it was lowered from other files than these.
    """

    path: str
    tensors: int
    weights: int
    differences: tuple[str, ...]
    another: bool = False

    @classmethod
    def of(
        cls, path: str, weights: Weights, recorded: Mapping[str, str], differences: Sequence[str]
    ) -> "WeightsReport":
        """A report of all tensors of `weights`; `recorded` is file name → SHA-256 of what was lowered, as it says."""
        count = sum(spec.count for spec in weights.specs.values())
        another = bool(differences) and dict(weights.origin.files) != dict(recorded)
        return cls(path, len(weights.specs), count, tuple(differences), another)

    @property
    def passed(self) -> bool:
        """Whether every code and value is the checkpoint's."""
        return not self.differences

    @property
    def summary(self) -> str:
        """One line."""
        if self.passed:
            return "all equal"
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        why = "; it says that it was lowered from another checkpoint than this" if self.another else ""
        return self.differences[0] + more + why

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "tensors": self.tensors,
            "weights": self.weights,
            "passed": self.passed,
            "differences": list(self.differences),
            "lowered_from_another": self.another,
        }


def first_difference(stored: NDArray[Any], expected: NDArray[Any], what: str) -> str | None:
    """The first place where two arrays differ, in words; matrices are taken in blocks of rows, floats bit for bit."""
    if stored.shape != expected.shape:
        return f"has {list(stored.shape)} {what}s, the checkpoint has {list(expected.shape)}"
    place: tuple[int, ...] | None = None
    count = 0
    for rows in row_blocks(*stored.shape) if stored.ndim == 2 else [slice(0, None)]:
        block, wanted = stored[rows], expected[rows]
        if block.dtype == np.float32:
            block = np.ascontiguousarray(block).view(np.uint32)
            wanted = np.ascontiguousarray(wanted, np.float32).view(np.uint32)
        places = np.argwhere(block != wanted)
        if place is None and len(places) > 0:
            place = (rows.start + int(places[0][0]), *(int(index) for index in places[0][1:]))
        count += len(places)
    if place is None:
        return None
    was, original = float(stored[place]), float(expected[place])
    return f"{what} {list(place)} is {was:g}, the checkpoint has {original:g} ({count} differ)"
