# SPDX-License-Identifier: Apache-2.0
"""What a kind of block declares about itself: its tensors, its state arrays and its activation sites.

Recipes, plans, ledgers, capabilities and reports speak in the roles given here; nothing outside a kind's own file
matches on tensor names. Letters as in `mossquant.model`.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["SiteSpec", "StateSpec", "TensorSpec", "View"]


class View(Enum):
    """How a tensor is seen as a matrix [rows, columns] when it is quantized; groups lie along the columns."""

    MATRIX = "matrix"
    """[N, K] as it is: rows are outputs, columns are inputs."""
    VECTOR = "vector"
    """[n] as one row [1, n]."""
    CONV = "conv"
    """Depthwise convolution [E, 1, W] as [W, E]: groups lie along the channels."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint of some config must hold.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape in the checkpoint.
        role: what it is, e.g. ``ssm.expert.x_proj``; see the kinds' files for the list.
        view: how it is seen as a matrix.
        layer: the block it belongs to, None for embedding, head and final norm.
        expert: the expert it belongs to, None where there is none.
        site: the activation site whose values it is multiplied with (linears and head only).
    """

    name: str
    shape: tuple[int, ...]
    role: str
    view: View = View.MATRIX
    layer: int | None = None
    expert: int | None = None
    site: str | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix view."""
        if self.view is View.VECTOR:
            return (1, self.shape[0])
        if self.view is View.CONV:
            return (self.shape[2], self.shape[0])
        return (self.shape[0], self.shape[1])

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """The tensor seen as a matrix [rows, columns]."""
        if self.view is View.VECTOR:
            return tensor.unsqueeze(0)
        if self.view is View.CONV:
            return tensor.squeeze(1).transpose(0, 1)
        return tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`, contiguous."""
        if self.view is View.VECTOR:
            return matrix.squeeze(0).contiguous()
        if self.view is View.CONV:
            return matrix.transpose(0, 1).unsqueeze(1).contiguous()
        return matrix.contiguous()


@dataclass(frozen=True)
class StateSpec:
    """A state array that a block carries from token to token; `shape` is without the batch axis, values are fp32.

    The name is the same on every Runner, e.g. ``layers.3.mixer.ssm``.
    """

    name: str
    shape: tuple[int, ...]
    role: str

    def zeros(self, batch: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """The state before the first token, [batch, *shape]."""
        return torch.zeros((batch, *self.shape), dtype=dtype, device=device)


@dataclass(frozen=True)
class SiteSpec:
    """A vector that enters a linear layer, where a target may quantize it, e.g. ``layers.3.mixer.in_proj.input``.

    Attributes:
        name: its name.
        role: the role of the weights that read it, plus ``.input``.
        width: length of the vector.
        tensors: names of the weight tensors that are multiplied with it.
    """

    name: str
    role: str
    width: int
    tensors: tuple[str, ...]
