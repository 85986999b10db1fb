# SPDX-License-Identifier: Apache-2.0
"""What is lowered, behind one interface: a full-precision checkpoint, or a quantized one."""

from typing import Protocol

import torch
from torch import Tensor

from mossquant.checkpoint import Checkpoint
from mossquant.config import MossNetConfig
from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.plan import KEPT_DTYPES
from mossquant.quantized import QuantizedCheckpoint
from mossquant.tensors import TensorSpec

__all__ = ["CheckpointSource", "QuantizedSource", "Source"]


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

    def int8_activations(self, name: str) -> bool:
        """Whether the inputs of a quantized linear are rounded to int8 blocks."""
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

    def int8_activations(self, name: str) -> bool:
        """False."""
        return False

    def quantized(self, name: str) -> QuantizedTensor:
        """Nothing is."""
        raise ValueError(f"{name} is not quantized")

    def kept(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self._checkpoint.tensor(name)


class QuantizedSource:
    """A quantized checkpoint, with its inputs as planned or in another format.

    Args:
        checkpoint: what is lowered.
        activations: format of the inputs of all quantized linears, "int8_block" or "fp32"; None is as planned.
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, activations: str | None = None) -> None:
        self._checkpoint, self._activations = checkpoint, activations

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

    def int8_activations(self, name: str) -> bool:
        """Whether the inputs of a quantized linear are rounded to int8 blocks."""
        planned = self._checkpoint.input_format(name)
        return planned is not None and (self._activations or planned[0]) == "int8_block"

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor's matrix view."""
        return self._checkpoint.quantized(name)

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept, in its shape in the checkpoint."""
        return self._checkpoint.kept(name)
