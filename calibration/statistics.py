# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model's linears on calibration text: second moments of what enters each, for every expert apart.

    H = Σ_t g_t² x_t x_tᵀ           g: the gate with which the expert acted, 1 where there are no experts

What an error E of the weights does to the outputs is then tr(E H Eᵀ). Every eighth window is held out of H: of its
inputs X [n, K] a sketch S = R X [s, K] is kept, R random signs [s, n], and E‖S Eᵀ‖² = s · ‖X Eᵀ‖² judges what was
learned from the others (Achlioptas 2003). Effective tokens are (Σ g²)² / Σ g⁴ (Kish 1965).

On disk: `manifest.json`, and in `statistics.safetensors` (or shards) for every input the lower triangle of H, row by
row, and S, both float64.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field
from torch import Tensor

from mossquant.calibration.solver import Statistics as OfTensor
from mossquant.checkpoint.manifest import FileName, FileRecord, Sha256, record_offenders
from mossquant.checkpoint.tensorfiles import (
    SHARD_BYTES,
    NeededTensor,
    TensorFiles,
    TensorWriter,
    all_finite,
    tensor_offenders,
)
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.json import LARGEST, read_json, read_stored
from mossquant.files.outputs import file_sha256, write_json
from mossquant.model.tensors import TensorSpec, Use
from mossquant.release import release

STEM = "statistics"
"""What the names of the tensor files begin with."""
MOST_SKETCHED = 128
"""Most rows of a sketch."""
SAMPLED_ROWS = 64
"""Rows of a matrix on which a solver tries what it has to choose."""

_AGAIN = "Copy the folder again, or run `mossquant calibrate` again."


@dataclass(frozen=True)
class Input:
    """What enters some linears, of one expert where there are experts.

    Attributes:
        name: its site, with the expert's number.
        site: its site.
        layer: its layer, None for the head's.
        expert: its expert, None where there are none.
        width: K.
        tensors: the weights that are multiplied with it.
        own: whether the expert's inputs are its own: they are made inside it, and others' are of another meaning.
    """

    name: str
    site: str
    layer: int | None
    expert: int | None
    width: int
    tensors: tuple[str, ...]
    own: bool

    @property
    def moments(self) -> str:
        """Name of the stored triangle of H: [K · (K + 1) / 2]."""
        return f"{self.name}.moments"

    @property
    def sketch(self) -> str:
        """Name of the stored S: [s, K]."""
        return f"{self.name}.sketch"

    @property
    def sketched(self) -> int:
        """s."""
        return min(self.width, MOST_SKETCHED)

    @property
    def count(self) -> int:
        """Values of the stored triangle."""
        return self.width * (self.width + 1) // 2

    @property
    def stored_bytes(self) -> int:
        """Bytes of both."""
        return 8 * (self.count + self.sketched * self.width)


def inputs_of(specs: Iterable[TensorSpec]) -> list[Input]:
    """What enters the linears among these tensors, in the order in which it is first read."""
    readers: dict[tuple[str, int | None], list[TensorSpec]] = {}
    for spec in specs:
        if spec.site is not None:
            readers.setdefault((spec.site, spec.expert), []).append(spec)
    inputs = []
    for (site, expert), of in readers.items():
        name = site if expert is None else f"{site}.experts.{expert}"
        own, width = Use.SUMMED in of[0].use, of[0].matrix_shape[1]
        inputs.append(Input(name, site, of[0].layer, expert, width, tuple(spec.name for spec in of), own))
    return inputs


def triangle(matrix: Tensor) -> Tensor:
    """[K, K] → its lower triangle, row by row: [K · (K + 1) / 2]."""
    return torch.cat([row[: i + 1] for i, row in enumerate(matrix)])


def symmetric(packed: Tensor, width: int) -> Tensor:
    """The inverse of `triangle`."""
    matrix = torch.empty((width, width), dtype=packed.dtype)
    for i in range(width):
        row = packed[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
        matrix[i, : i + 1] = row
        matrix[: i + 1, i] = row
    return matrix


@dataclass(frozen=True)
class Hessian:
    """What is known of the inputs of one matrix.

    Attributes:
        mean: H / Σ g², float64 [K, K].
        effective: effective tokens that it was made from, 0 where none came.
        needed: the quota of effective tokens.
        sketch: S of held-out inputs, float64 [s, K]; all zeros where none came.
        others: the same mean over all experts of the layer, which have the same inputs; None where they have not.
    """

    mean: Tensor
    effective: float
    needed: float
    sketch: Tensor
    others: Tensor | None = None


class InputRecord(BaseModel):
    """How much text one input was measured on.

    Attributes:
        name: of the input.
        layer: its layer, None for the head's.
        expert: its expert, None where there are none.
        width: K.
        tokens: tokens that came, without those held out.
        squares: Σ g² of them.
        effective: (Σ g²)² / Σ g⁴.
        needed: the quota.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    name: str
    layer: int | None
    expert: int | None
    width: int
    tokens: Annotated[int, Field(ge=0)]
    squares: Annotated[float, Field(ge=0)]
    effective: Annotated[float, Field(ge=0)]
    needed: float

    @property
    def lacks(self) -> bool:
        """Whether the quota was not reached."""
        return self.effective < self.needed


class Manifest(BaseModel):
    """`manifest.json` of statistics: what was measured, on which text, of which model.

    Attributes:
        version: of the stored form.
        kind: "statistics".
        release: that wrote it.
        files: the tensor files.
        parent: file name → SHA-256 of the model.
        text: SHA-256 of each text.
        tokens: tokens read, with those held out.
        window: tokens a window; the state is zero at the beginning of each.
        quota: effective tokens that were asked for, in multiples of an input's width.
        inputs: how much of the text reached each input.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    version: Literal[1]
    kind: Literal["statistics"]
    release: str
    files: dict[FileName, FileRecord]
    parent: dict[FileName, Sha256]
    text: list[Sha256]
    tokens: int
    window: int
    quota: float
    inputs: Annotated[list[InputRecord], FailFast()]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read it, and check that what it names is whole. Raises `InputError`: all that is wrong at once."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no statistics; give a folder that `mossquant calibrate` wrote")
        values = read_json(path, largest=LARGEST, advice="copy the folder again, or calibrate again")
        kind = values.get("kind") if isinstance(values, dict) else None
        if kind != "statistics":
            said = f"is a {kind[:40]}" if isinstance(kind, str) else "is of no kind that is known"
            raise InputError(f"{folder} {said}, not statistics; give a folder that `mossquant calibrate` wrote")
        manifest = read_stored(path, cls, noun="a manifest of statistics", advice=_AGAIN, largest=LARGEST)
        offenders = record_offenders(folder, manifest.files)
        if offenders:
            raise InputError.listing(f"{folder} is damaged", offenders, _AGAIN)
        return manifest

    @property
    def shortfalls(self) -> list[InputRecord]:
        """Inputs whose quota was not reached."""
        return [record for record in self.inputs if record.lacks]

    def to_json(self) -> dict[str, Any]:
        """What is stored."""
        return self.model_dump()


def measured_of(
    entry: Input,
    matrix: Tensor,
    inputs: Iterable[Input],
    records: Mapping[str, InputRecord],
    stored: Callable[[str], Tensor],
) -> OfTensor:
    """What is known of one matrix, for its solver.

    Args:
        entry: what enters it.
        matrix: [N, K], in its stored type.
        inputs: all that were measured in its layer, or more.
        records: by the inputs' names.
        stored: gives the triangle of an input's H and its sketch, by their names.
    """
    record, others = records[entry.name], None
    if record.lacks and record.effective > 0 and entry.expert is not None and not entry.own:
        alike = [other for other in inputs if other.site == entry.site]
        total = torch.zeros(entry.count, dtype=torch.float64)
        for other in alike:
            total += stored(other.moments)
        others = symmetric(total / sum(records[other.name].squares for other in alike), entry.width)
    mean = symmetric(stored(entry.moments), entry.width) / (record.squares or 1.0)
    hessian = Hessian(mean, record.effective, record.needed, stored(entry.sketch), others)
    return {"hessian": hessian, "rows": matrix[:: -(-len(matrix) // SAMPLED_ROWS)].float().contiguous()}


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model, memory-mapped.

    Attributes:
        folder: where they lie.
        manifest: what they are.
    """

    folder: Path
    manifest: Manifest
    _weights: Weights
    _inputs: Mapping[str, Input] = field(repr=False)
    _files: TensorFiles = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, weights: Weights) -> "Statistics":
        """Open statistics and check that they are whole, and of this model.

        Raises:
            InputError: none, damaged or of another model: what is wrong with them all at once.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.parent != dict(weights.origin.files):
            raise InputError(
                f"{folder} holds statistics of another model than {weights.origin.path}; "
                "run `mossquant calibrate` on this one"
            )
        inputs, files = inputs_of(weights.specs.values()), TensorFiles(folder, stem=STEM)
        needed = {entry.moments: NeededTensor((entry.count,), (torch.float64,)) for entry in inputs}
        needed |= {entry.sketch: NeededTensor((entry.sketched, entry.width), (torch.float64,)) for entry in inputs}
        offenders = tensor_offenders(needed, files.shapes, files.dtypes)
        offenders += [f"manifest.json does not list {name}" for name in files.files if name not in manifest.files]
        said_of = sorted((record.name, record.width) for record in manifest.inputs)
        if said_of != sorted((entry.name, entry.width) for entry in inputs):
            offenders.append("manifest.json speaks of other inputs than this model has")
        if offenders:
            raise InputError.listing(f"{folder} contradicts itself", offenders, _AGAIN)
        readers = {name: entry for entry in inputs for name in entry.tensors}
        return cls(folder, manifest, weights, readers, files)

    @cached_property
    def records(self) -> Mapping[str, InputRecord]:
        """Input's name → how much text it was measured on."""
        return {record.name: record for record in self.manifest.inputs}

    @property
    def shortfalls(self) -> list[InputRecord]:
        """Inputs whose quota was not reached."""
        return self.manifest.shortfalls

    @property
    def memory_bytes(self) -> int:
        """What a solver holds of the widest input, at most: H, its factors and what they are made with."""
        return 8 * 8 * max(entry.width for entry in self._inputs.values()) ** 2

    def measured(self, tensor: str) -> OfTensor:
        """What was measured for a tensor.

        "hessian": `Hessian`, None for one that no linear multiplies; "rows": fp32 [≤ 64, K], some of its rows.

        Raises:
            InputError: it is not finite.
        """
        entry = self._inputs.get(tensor)
        if entry is None:
            return {"hessian": None, "rows": None}
        if not all(all_finite(self._files.tensor(name)) for name in (entry.moments, entry.sketch)):
            raise InputError(f"{self.folder}: what was measured of {entry.name} is not finite. {_AGAIN}")
        matrix = self._weights.specs[tensor].to_matrix(self._weights.kept(tensor))
        return measured_of(entry, matrix, dict.fromkeys(self._inputs.values()), self.records, self._files.tensor)

    def to_json(self) -> dict[str, Any]:
        """What the manifest says, without the hashes of the tensor files."""
        return self.manifest.model_dump(exclude={"files"})


class StatisticsWriter:
    """Writes statistics into an existing, empty folder (itself written aside), input by input.

    Args:
        folder: where.
        inputs: all that will come, in this order.
    """

    def __init__(self, folder: Path, inputs: Iterable[Input]) -> None:
        self._folder = folder
        total = sum(entry.stored_bytes for entry in inputs)
        # What is held until a file is full adds to what a block takes, and is not to grow with the model.
        self._files = TensorWriter(folder, total_bytes=total, stem=STEM, one_file_bytes=SHARD_BYTES)

    def add(self, entry: Input, moments: Tensor, sketch: Tensor) -> None:
        """Store one input's triangle and sketch."""
        self._files.add(entry.moments, moments)
        self._files.add(entry.sketch, sketch)

    def finish(
        self,
        weights: Weights,
        *,
        text: Iterable[str],
        tokens: int,
        window: int,
        quota: float,
        records: Iterable[InputRecord],
    ) -> None:
        """Write what is left, and the manifest."""
        self._files.close()
        files = {
            path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            for path in sorted(self._folder.iterdir())
        }
        content = {
            "version": 1,
            "kind": "statistics",
            "release": release(),
            "files": files,
            "parent": dict(weights.origin.files),
            "text": list(text),
            "tokens": tokens,
            "window": window,
            "quota": quota,
            "inputs": [record.model_dump() for record in records],
        }
        write_json(self._folder / "manifest.json", content)
