# SPDX-License-Identifier: Apache-2.0
"""What reading back the weights of an artifact found, whatever the target."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WeightsReport", "first_difference"]


@dataclass(frozen=True)
class WeightsReport:
    """What reading back the weights of an artifact found.

    Attributes:
        path: the program.
        tensors: tensors compared.
        weights: their elements.
        differences: one line for each tensor that differs, with the first place where it does; and what is left over.
    """

    path: str
    tensors: int
    weights: int
    differences: tuple[str, ...]

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
        return self.differences[0] + more

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "tensors": self.tensors,
            "weights": self.weights,
            "passed": self.passed,
            "differences": list(self.differences),
        }


def first_difference(found: NDArray[Any], expected: NDArray[Any], what: str) -> str | None:
    """The first place where two arrays differ, in words."""
    if found.shape != expected.shape:
        return f"has {list(found.shape)} {what}s, the checkpoint has {list(expected.shape)}"
    if found.dtype == expected.dtype == np.float32:
        found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
        places = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    else:
        places = np.argwhere(found != expected)
    if len(places) == 0:
        return None
    place = tuple(int(one) for one in places[0])
    return f"{what} {list(place)} is {found[place]:g}, the checkpoint has {expected[place]:g} ({len(places)} differ)"
