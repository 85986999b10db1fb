# SPDX-License-Identifier: Apache-2.0
"""The lines of a plan: one for a tensor, one for the input of linear layers, one for a state array."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pydantic import ConfigDict

from mossquant.formats import get_format
from mossquant.formats.activations import get_activation_format
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.tensors import SiteSpec, TensorSpec

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class DecayError:
    """What storing A_log did to decays: |exp(Δ A) − exp(Δ A')|, at the worst of the time steps Δ that a channel took on
    a text; the largest and the mean over channels and states.
    """

    __pydantic_config__ = _STRICT

    largest: float
    mean: float


@dataclass(frozen=True)
class TensorEntry:
    """What becomes of one tensor.

    Attributes:
        name: its name in the checkpoint.
        role: its role.
        shape: its shape in the checkpoint.
        rows: rows of its matrix view.
        columns: columns of its matrix view, without padding.
        padded_columns: columns as stored (those of the view where it is kept).
        format: its number format, None where it is kept.
        kept: the type in which it is kept, None where it is quantized.
        solver: how scales and codes are found, None where it is kept.
        reason: why this format, or why it is kept.
        stored_bytes: bytes in the checkpoint that it comes from.
        predicted_bytes: bytes of codes, padding and scales, or of the kept values.
        written_bytes: bytes written; None before the run.
        relative_error: ‖W − Q‖ / ‖W‖; None before the run.
        note: what its solver lacked and did instead; None, and then not stored, where there is nothing to say.
        decay_error: of a tensor of decays, where a text was run; None, and then not stored, elsewhere.
    """

    __pydantic_config__ = _STRICT

    name: str
    role: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    padded_columns: int
    format: str | None
    kept: str | None
    solver: str | None
    reason: str
    stored_bytes: int
    predicted_bytes: int
    written_bytes: int | None = None
    relative_error: float | None = None
    note: str | None = None
    decay_error: DecayError | None = None

    @classmethod
    def of(
        cls, spec: TensorSpec, storage: str, *, stored_bytes: int, reason: str, solver: str | None = None
    ) -> "TensorEntry":
        """The entry of a tensor before the run.

        Args:
            spec: the tensor.
            storage: its number format, or the float type in which it is kept.
            stored_bytes: bytes in the checkpoint that it comes from.
            reason: why this storage.
            solver: how scales and codes are found, None where it is kept.
        """
        rows, columns = spec.matrix_shape
        if storage in FLOAT_DTYPES:
            number_format, kept, padded = None, storage, columns
            size = spec.count * FLOAT_DTYPES[storage].itemsize
        else:
            number_format, kept, padded = storage, None, get_format(storage).padded_columns(columns)
            size = get_format(storage).payload_bytes(rows, columns)
        shapes = (spec.shape, rows, columns, padded)
        return cls(spec.name, spec.role, *shapes, number_format, kept, solver, reason, stored_bytes, size)

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def storage(self) -> str:
        """Format, or the type in which it is kept."""
        return self.format or self.kept or ""


@dataclass(frozen=True)
class SiteEntry:
    """The format of the vectors that enter some linear layers.

    Attributes:
        name: name of the site.
        role: its role.
        width: length of the vector.
        tensors: weights that it is multiplied with; those that are kept see it in fp32.
        format: activation format.
        block: values that share a scale, None where the format has no blocks.
        reason: why this format.
    """

    __pydantic_config__ = _STRICT

    name: str
    role: str
    width: int
    tensors: tuple[str, ...]
    format: str
    block: int | None
    reason: str

    @classmethod
    def of(cls, spec: SiteSpec, asked: str, *, blocks: AbstractSet[int], reason: str) -> "SiteEntry":
        """The entry of a site.

        Args:
            spec: the site.
            asked: the activation format that is asked for.
            blocks: values that share a scale by the formats of the weights that read it; none where all are kept.
            reason: why this format.
        """
        if not blocks and asked != "fp32":
            asked, reason = "fp32", "all weights that read it are kept"
        block = min(blocks) if blocks and get_activation_format(asked).blocked else None
        return cls(spec.name, spec.role, spec.width, spec.tensors, asked, block, reason)


@dataclass(frozen=True)
class StateEntry:
    """The format in which a state array is carried from token to token; `shape` is without the batch axis."""

    __pydantic_config__ = _STRICT

    name: str
    role: str
    shape: tuple[int, ...]
    format: str


@dataclass(frozen=True)
class FormatSummary:
    """What one format holds of a model; `bits_per_weight` is over its own weights."""

    storage: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes / weights."""
        return 8 * self.bytes / self.weights
