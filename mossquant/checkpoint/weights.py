# SPDX-License-Identifier: Apache-2.0
"""The weights of a model, behind one interface: what is quantized, lowered, run and compared.

A full-precision checkpoint and a quantized one are `Weights`, and so is a `View` of either, which answers some of the
questions in another way (the inputs as a target takes them, some experts gone, other values under calibration). Whoever
takes `Weights` asks what it needs and never what kind they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from mossquant.formats import NumberFormat, QuantizedTensor
from mossquant.model.config import MossNetConfig
from mossquant.model.tensors import TensorSpec
from mossquant.text.declared import TEXT_FILE, TEXT_FILES, DeclaredText, read_declared_text

BESIDE = (*TEXT_FILES, "training.json")
"""What may lie beside the tensors of a checkpoint, and is taken along by what is made of it."""


@dataclass(frozen=True)
class Origin:
    """What weights come from.

    Attributes:
        path: as a user knows them, for messages and reports.
        kind: "checkpoint" or "quantized checkpoint".
        recipe: name of the recipe that made them, None where nothing is quantized.
        torch_dtype: stored type of the full-precision model ("bfloat16").
        parameters: parameters of the full-precision model, a tied table once.
        payload_bytes: stored for the weights: codes, padding, scales and kept tensors.
        file_bytes: on disk, of the tensor files.
        files: file name → SHA-256 of config and tensor files. A view that changes tensors names what makes it another
            model in their place, e.g. `model-pruned` → a hash of what it was made from and of what is gone: a saved
            state and a program are told from those of other models by these.
        training_text: SHA-256 of the texts that the model was trained on, as far as is known.
        calibration_text: SHA-256 of the texts that it was calibrated on.
        beside: those of `BESIDE` that there are.
    """

    path: str
    kind: str
    recipe: str | None
    torch_dtype: str
    parameters: int
    payload_bytes: int
    file_bytes: int
    files: Mapping[str, str]
    training_text: tuple[str, ...]
    calibration_text: tuple[str, ...]
    beside: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The recipe's name, or the stored type."""
        return self.recipe or self.torch_dtype

    @property
    def seen_text(self) -> tuple[str, ...]:
        """SHA-256 of every text that the model has seen."""
        return (*self.training_text, *self.calibration_text)

    @property
    def tokenizer(self) -> Path | None:
        """The `tokenizer.json`, if there is one."""
        return next((path for path in self.beside if path.name == "tokenizer.json"), None)

    def declared_text(self, vocab_size: int) -> DeclaredText | None:
        """What the model, with `vocab_size` entries, declares about its text; None where nothing.

        Raises:
            InputError: `text.json` is damaged, or names ids that the model has not.
        """
        path = next((path for path in self.beside if path.name == TEXT_FILE), None)
        return None if path is None else read_declared_text(path.parent, vocab_size)


class Weights(Protocol):
    """The tensors of a model, by their names in the checkpoint."""

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Tensor name → what it is, in processing order."""
        ...

    @property
    def origin(self) -> Origin:
        """What they come from."""
        ...

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor, None where it is kept in a float type."""
        ...

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor's matrix view. Raises `ValueError` where it is kept."""
        ...

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept, in its own type and the checkpoint's shape. Raises `ValueError` where it is none."""
        ...

    def activation(self, site: str) -> str:
        """The activation format of a site, e.g. of "layers.0.mixer.in_proj.input"; kept weights see fp32 there."""
        ...

    def state(self, name: str) -> str:
        """The format in which a state array is carried."""
        ...


class View:
    """Weights that answer as others do; a subclass says what is different.

    Args:
        weights: what is looked at.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        return self._weights.config

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Tensor name → what it is."""
        return self._weights.specs

    @property
    def origin(self) -> Origin:
        """What they come from."""
        return self._weights.origin

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor."""
        return self._weights.format(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor."""
        return self._weights.quantized(name)

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept."""
        return self._weights.kept(name)

    def activation(self, site: str) -> str:
        """The activation format of a site."""
        return self._weights.activation(site)

    def state(self, name: str) -> str:
        """The format of a state array."""
        return self._weights.state(name)


def value(weights: Weights, name: str) -> Tensor:
    """The fp32 values of a tensor in its shape in the checkpoint: what its codes mean, or what was kept."""
    if weights.format(name) is None:
        return weights.kept(name).float()
    return weights.specs[name].from_matrix(weights.quantized(name).dequantize())
