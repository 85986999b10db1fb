# SPDX-License-Identifier: Apache-2.0
"""A loaded method of a .pte, and the state that goes through it.

What a method gives lies in its own memory, which its next call writes to; ExecuTorch's binding copies it out, unless it
is told not to. Where inputs and outputs of a program are memory of the caller's (`kernels/lower.py`), states stay where
they are: the call that takes one up brings it up to date in place, and only where another one comes first it is copied
out. What that saves is in docs/executorch.md.
"""

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from mossquant.runner import Floats
from mossquant.targets.executorch.packages import load_method


class Carried:
    """State arrays, each [1, …].

    Args:
        arrays: what they are.
        method: in whose memory they lie, and which lives as long as they do; None: they are PyTorch's own.
    """

    def __init__(self, arrays: list[Tensor], method: "Method | None" = None) -> None:
        self.arrays, self._method = arrays, method

    def copy(self) -> "Carried":
        """Others with the same values."""
        return Carried([array.clone() for array in self.arrays])

    def move_out(self) -> None:
        """Copy them out of the method's memory."""
        self.arrays, self._method = self.copy().arrays, None


class Method:
    """One method.

    Args:
        program: what it belongs to, which must live as long.
        name: its name.
        in_place: whether states may stay in its memory.
    """

    def __init__(self, program: Any, name: str, *, in_place: bool) -> None:
        self._program, self._method, self._in_place = program, load_method(program, name), in_place
        self._last: ReferenceType[Carried] | None = None

    def __call__(self, tokens: Tensor, carried: Carried) -> tuple[Floats, Carried]:
        """tokens [1, T], a state, which is used up → logits, to be read before the next call; the state after them."""
        if not self._in_place:
            logits, *after = self._method([tokens, *carried.arrays])
            return logits.numpy(), Carried(after)
        inside = self._last() if self._last is not None else None
        if inside is not None and inside is not carried:
            inside.move_out()
        logits, *after = self._method([tokens, *carried.arrays], clone_outputs=False)
        found = Carried(after, self)
        self._last = ref(found)
        return logits.numpy(), found


def zeros(shapes: list[tuple[int, ...]]) -> Carried:
    """Arrays of zeros, of PyTorch's own: the runtime ends the process over the strides of an empty one of numpy's."""
    return Carried([torch.zeros(1, *shape) for shape in shapes])
