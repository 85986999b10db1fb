# SPDX-License-Identifier: Apache-2.0
"""What is lowered, behind one interface: a full-precision checkpoint, or a quantized one."""

from typing import Protocol

import torch
from torch import Tensor

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.model.config import MossNetConfig
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import Activations, Target, get_target
from mossquant.plan.plan import KEPT_DTYPES

__all__ = ["CheckpointSource", "QuantizedSource", "Source", "decoded", "open_checkpoint", "source_of"]


class Source(Protocol):
    """The tensors of a model."""

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """What a tensor is."""
        ...

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor, None where it is kept in a float type."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor that is kept."""
        ...

    def activations(self, name: str) -> str:
        """The activation format of the inputs of a linear, by its weight's name."""
        ...

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor's matrix view."""
        ...

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept, in its shape in the checkpoint."""
        ...


class CheckpointSource:
    """A full-precision checkpoint: everything is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        return self._checkpoint.config

    def spec(self, name: str) -> TensorSpec:
        """What a tensor is."""
        return self._checkpoint.specs[name]

    def format(self, name: str) -> NumberFormat | None:
        """None."""
        return None

    def dtype(self, name: str) -> torch.dtype:
        """The stored type."""
        return self._checkpoint.dtype(name)

    def activations(self, name: str) -> str:
        """fp32."""
        return "fp32"

    def quantized(self, name: str) -> QuantizedTensor:
        """Nothing is."""
        raise ValueError(f"{name} is not quantized")

    def kept(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self._checkpoint.tensor(name)


class QuantizedSource:
    """A quantized checkpoint, with its inputs as a target takes them.

    Args:
        checkpoint: what is lowered.
        target: what it is lowered to.
        activations: of all quantized linears: "int8", as the target rounds them, or "fp32"; None is as planned, or the
            target's own in place of a planned format that it does not have.
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, target: Target, activations: Activations | None = None) -> None:
        self._checkpoint, self._target, self._activations = checkpoint, target, activations

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        return self._checkpoint.config

    def spec(self, name: str) -> TensorSpec:
        """What a tensor is."""
        return self._checkpoint.specs[name]

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor, None where it is kept."""
        found = self._checkpoint.plan.by_name[name].format
        return None if found is None else get_format(found)

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor that is kept."""
        kept = self._checkpoint.plan.by_name[name].kept
        assert kept is not None
        return KEPT_DTYPES[kept]

    def activations(self, name: str) -> str:
        """The activation format of the inputs of a linear; fp32 where its weight is kept."""
        planned = self._checkpoint.input_format(name)
        if planned is None:
            return "fp32"
        if self._activations is not None:
            return self._target.rounded_to(self._activations)
        return self._target.taken(planned[0]) or planned[0]

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor's matrix view."""
        return self._checkpoint.quantized(name)

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept, in its shape in the checkpoint."""
        return self._checkpoint.kept(name)


def open_checkpoint(located: Located) -> Checkpoint | QuantizedCheckpoint:
    """Open what a PATH argument points at, of kind "checkpoint" or "quantized checkpoint". Raises `InputError`."""
    return (Checkpoint if located.kind == "checkpoint" else QuantizedCheckpoint).open(located.path)


def source_of(
    checkpoint: Checkpoint | QuantizedCheckpoint, target: str, activations: Activations | None = None
) -> Source:
    """The tensors of a checkpoint as a target takes them; arguments as `QuantizedSource`."""
    if isinstance(checkpoint, Checkpoint):
        return CheckpointSource(checkpoint)
    return QuantizedSource(checkpoint, get_target(target), activations)


def decoded(source: Source, name: str) -> Tensor:
    """A small tensor as fp32, in its shape in the checkpoint: what its codes mean, or what was kept."""
    if source.format(name) is None:
        return source.kept(name).float()
    return source.spec(name).from_matrix(source.quantized(name).dequantize())
