# SPDX-License-Identifier: Apache-2.0
"""What a kind of block declares about itself: its tensors, state arrays, activation sites and experts.

Recipes, plans, ledgers and reports speak in the roles given here; capabilities and lowering ask what a tensor is used
for. Nothing outside a kind's own file and its lowerings matches on names or roles. Letters as in `mossquant.model`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Use(Enum):
    """What a tensor is used for; a tied table has two uses."""

    LINEAR = "linear"
    """The matrix of a linear; where experts have one, each gives outputs of its own."""
    SUMMED = "summed linear"
    """The matrix of a linear whose outputs are summed over the experts."""
    TABLE = "table"
    """Rows are looked up."""
    ROUTER = "router"
    """The matrix of a router: a row for each expert."""
    NORM = "norm"
    """The weight of a norm."""
    SMALL = "small"
    """A convolution, a bias, or another tensor with few values."""


_MATRICES = {Use.LINEAR, Use.SUMMED, Use.TABLE, Use.ROUTER}


class Stored(Enum):
    """How the values that a model computes with follow from those that are stored."""

    AS_IS = "as is"
    LOG_OF_DECAY = "log of decay"
    """value = −exp(stored)"""

    def values(self, stored: Tensor) -> Tensor:
        """What the model computes with, in the type of what is stored."""
        return stored if self is Stored.AS_IS else -torch.exp(stored)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint of some config must hold.

    Quantization sees every tensor as a matrix [rows, columns] with groups along the columns: a matrix [N, K] of outputs
    and inputs as it is, a vector [n] as one row [1, n], a depthwise convolution [E, 1, W] as [W, E]: groups lie along
    the channels.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape in the checkpoint.
        role: what it is, e.g. ``ssm.expert.x_proj``; see the kinds' files for the list.
        layer: the block it belongs to, None for embedding, head and final norm.
        expert: the expert it belongs to, None where there is none.
        site: the activation site whose values it is multiplied with (linears and head only).
        use: what it is used for.
        stored: how the values that are computed with follow from what is stored.
        parts: (name, number of rows) of ranges of rows that mean different things, in their order; empty: all rows
            mean the same.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None = None
    expert: int | None = None
    site: str | None = None
    use: frozenset[Use] = frozenset({Use.SMALL})
    stored: Stored = Stored.AS_IS
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with vectors, or its rows are looked up."""
        return bool(self.use & _MATRICES)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix view."""
        rows, columns = (self.shape[2], self.shape[0]) if len(self.shape) == 3 else (1, *self.shape)[-2:]
        return rows, columns

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """The tensor seen as a matrix [rows, columns]."""
        return tensor.squeeze(1).T if len(self.shape) == 3 else tensor.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`, contiguous."""
        return (matrix.T if len(self.shape) == 3 else matrix).contiguous().view(self.shape)


def outside_blocks(specs: Iterable[TensorSpec]) -> dict[Use, TensorSpec]:
    """The table, the last norm and the head, by their use; a tied table is the head too."""
    return {use: spec for spec in specs if spec.layer is None for use in spec.use}


@dataclass(frozen=True)
class StateSpec:
    """A state array that a block carries from token to token; values are fp32.

    Attributes:
        name: the same on every Runner, e.g. ``layers.3.mixer.ssm``.
        shape: its shape before the first token, without the batch axis.
        role: what it is.
        grows: the axis of `shape` that gets longer by one with every token; None: the shape stays.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    grows: int | None = None

    def after(self, tokens: int) -> tuple[int, ...]:
        """The shape after so many tokens, without the batch axis."""
        return tuple(size + tokens * (axis == self.grows) for axis, size in enumerate(self.shape))

    def symbolic(self, length: str) -> list[int | str]:
        """The shape without the batch axis, the axis that grows called `length`."""
        return [length if axis == self.grows else size for axis, size in enumerate(self.shape)]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the array may have this shape, without the batch axis, after some number of tokens."""
        grown = 0 if self.grows is None or len(shape) != len(self.shape) else shape[self.grows] - self.shape[self.grows]
        return grown >= 0 and tuple(shape) == self.after(grown)

    def zeros(self, batch: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """The state before the first token, [batch, *shape]."""
        return torch.zeros((batch, *self.shape), dtype=dtype, device=device)


@dataclass(frozen=True)
class Experts:
    """The experts of one block, behind one router.

    Attributes:
        layer: the layer.
        kind: the kind of block, as in its roles: "ssm" or "mlp".
        counted_by: the field of the config that says how many there are, as one number or one a layer.
        router: name of the router's weight; None where there is one expert.
        members: names of each expert's tensors.
        chosen: K, how many of them a token goes to.
        giving: name of the weight of each expert whose product, times the gate, is what the expert gives to the mix.
    """

    layer: int
    kind: str
    counted_by: str
    router: str | None
    members: tuple[tuple[str, ...], ...]
    chosen: int
    giving: tuple[str, ...]

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], *, kind: str, counted_by: str, chosen: int, giving: str) -> "Experts":
        """The experts among the tensors of one block; `giving` is a role."""
        members: dict[int, list[str]] = {}
        for spec in specs:
            if spec.expert is not None:
                members.setdefault(spec.expert, []).append(spec.name)
        router = next((spec.name for spec in specs if Use.ROUTER in spec.use), None)
        assert specs[0].layer is not None
        named = tuple(tuple(members[expert]) for expert in sorted(members))
        gives = tuple(spec.name for spec in specs if spec.role == giving)
        return cls(specs[0].layer, kind, counted_by, router, named, chosen, gives)

    @property
    def count(self) -> int:
        """X."""
        return len(self.members)

    @property
    def routing(self) -> str | None:
        """What a pass calls the router; None where there is one expert."""
        return None if self.router is None else self.router.removeprefix("backbone.").removesuffix(".weight")


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
