# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint, quantized checkpoint or artifact is: shapes, experts, bytes by format and role, ledger, hashes.

Of an artifact it explains the size of the file: what its bytes are for, and how they compare with the payload of the
checkpoint that it was lowered from. Nothing is run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mossquant.checkpoint.checkpoint import DTYPE_NAMES, Checkpoint
from mossquant.checkpoint.locate import Located, locate
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.bench import active_share
from mossquant.model.config import MossNetConfig

__all__ = ["FileRow", "InfoReport", "SectionRow", "WeightsRow", "info", "short_hashes"]


@dataclass(frozen=True)
class WeightsRow:
    """The tensors of one role in one format.

    Attributes:
        role: what they are.
        storage: number format, or the type in which they are kept.
        tensors: how many.
        weights: their elements.
        bytes: stored for them: codes, scales and padding, or values.
        relative_error: largest ‖W − Q‖ / ‖W‖ among them; None where nothing was quantized.
        reason: why they are stored like this; None in a checkpoint that is not quantized.
    """

    role: str
    storage: str
    tensors: int
    weights: int
    bytes: int
    relative_error: float | None = None
    reason: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes ÷ weights."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class FileRow:
    """One file: name, size in bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SectionRow:
    """A part of an artifact's program file and its bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class InfoReport:
    """What `info` found.

    Attributes:
        path: as given.
        kind: "checkpoint", "quantized checkpoint", "onnx" or "executorch".
        weights: stored type, or recipe name.
        config: the model's shape.
        torch_dtype: stored type of the full-precision model.
        parameters: of the full-precision model.
        active_parameters: those that one token uses.
        weight_bytes: stored for the weights.
        payload_bytes: the same in the checkpoint that an artifact was lowered from.
        rows: weights by role and format; empty for an artifact.
        files: every file with its hash.
        sections: what the bytes of an artifact's program are for; empty for a checkpoint.
        facts: what else the files say: (name, value).
        ledger: every tensor of a quantized checkpoint, as in `ledger.json`.
    """

    path: str
    kind: str
    weights: str
    config: MossNetConfig
    torch_dtype: str
    parameters: int
    active_parameters: int
    weight_bytes: int
    payload_bytes: int
    rows: tuple[WeightsRow, ...]
    files: tuple[FileRow, ...]
    sections: tuple[SectionRow, ...]
    facts: tuple[tuple[str, str], ...]
    ledger: tuple[Mapping[str, Any], ...]

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes stored for the weights ÷ parameters."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def program_bytes(self) -> int:
        """Bytes of an artifact's program: the sum of its sections."""
        return sum(section.bytes for section in self.sections)

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "version": 1,
            "path": self.path,
            "kind": self.kind,
            "weights": self.weights,
            "config": self.config.to_json(torch_dtype=self.torch_dtype),
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "weight_bytes": self.weight_bytes,
            "payload_bytes": self.payload_bytes,
            "bits_per_weight": self.bits_per_weight,
            "by_role": [asdict(row) for row in self.rows],
            "files": [asdict(row) for row in self.files],
            "sections": [asdict(row) for row in self.sections],
            "facts": dict(self.facts),
            "ledger": [dict(entry) for entry in self.ledger],
        }


def info(path: str | Path) -> InfoReport:
    """Say what is at a PATH argument.

    Raises:
        InputError: nothing that mossquant knows is there, or it is damaged.
    """
    located = locate(path)
    if located.kind == "checkpoint":
        return _of_checkpoint(located)
    if located.kind == "quantized checkpoint":
        return _of_quantized(located)
    if located.kind == "executorch":
        from mossquant.eval.executorch_info import executorch_info

        return executorch_info(located)
    # Only an .onnx needs the onnx library.
    from mossquant.eval.onnx_info import onnx_info

    return onnx_info(located)


def _of_checkpoint(located: Located) -> InfoReport:
    checkpoint = Checkpoint.open(located.path)
    rows = [
        WeightsRow(spec.role, DTYPE_NAMES[checkpoint.dtype(name)], 1, spec.count, checkpoint.tensor_bytes(name))
        for name, spec in checkpoint.specs.items()
    ]
    seen = checkpoint.seen_text()
    return InfoReport(
        path=located.given,
        kind=located.kind,
        weights=checkpoint.torch_dtype,
        config=checkpoint.config,
        torch_dtype=checkpoint.torch_dtype,
        parameters=checkpoint.parameters,
        active_parameters=round(checkpoint.parameters * active_share(checkpoint.config)),
        weight_bytes=checkpoint.stored_bytes,
        payload_bytes=checkpoint.stored_bytes,
        rows=_merged(rows),
        files=_files(located.path, checkpoint.hashes()),
        sections=(),
        facts=tuple(("trained on text with SHA-256", text) for text in seen[:1]),
        ledger=(),
    )


def _of_quantized(located: Located) -> InfoReport:
    quantized = QuantizedCheckpoint.open(located.path)
    entries = quantized.plan.tensors
    rows = [
        WeightsRow(
            entry.role,
            entry.storage,
            1,
            entry.count,
            entry.predicted_bytes,
            entry.relative_error if entry.format is not None else None,
            entry.reason,
        )
        for entry in entries
    ]
    parent = quantized.manifest.parent
    return InfoReport(
        path=located.given,
        kind=located.kind,
        weights=quantized.recipe_name,
        config=quantized.config,
        torch_dtype=quantized.manifest.parent.torch_dtype,
        parameters=quantized.parameters,
        active_parameters=round(quantized.parameters * active_share(quantized.config)),
        weight_bytes=quantized.payload_bytes,
        payload_bytes=quantized.payload_bytes,
        rows=_merged(rows),
        files=_files(located.path, quantized.hashes()),
        sections=(),
        facts=(
            ("recipe", quantized.recipe_name),
            ("targets", ", ".join(quantized.plan.targets)),
            ("activations", ", ".join(sorted({site.format for site in quantized.plan.activations}))),
            ("state", ", ".join(sorted({state.format for state in quantized.plan.state}))),
            ("made from", f"{parent.torch_dtype}, {parent.parameters} parameters, {parent.bytes} bytes"),
            ("written by", f"mossquant {quantized.manifest.release}"),
        ),
        ledger=tuple(asdict(entry) for entry in entries),
    )


def _merged(rows: Iterable[WeightsRow]) -> tuple[WeightsRow, ...]:
    """One row for each role and format, in the order in which they come."""
    merged: dict[tuple[str, str], WeightsRow] = {}
    for row in rows:
        old = merged.get((row.role, row.storage))
        if old is None:
            merged[row.role, row.storage] = row
            continue
        errors = [error for error in (old.relative_error, row.relative_error) if error is not None]
        merged[row.role, row.storage] = WeightsRow(
            row.role,
            row.storage,
            old.tensors + row.tensors,
            old.weights + row.weights,
            old.bytes + row.bytes,
            max(errors) if errors else None,
            old.reason,
        )
    return tuple(merged.values())


def _files(folder: Path, hashes: Mapping[str, str]) -> tuple[FileRow, ...]:
    return tuple(FileRow(name, (folder / name).stat().st_size, digest) for name, digest in hashes.items())


def short_hashes(hashes: Mapping[str, str]) -> str:
    """Names with the first digits of their hashes, in one line."""
    return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(hashes.items()))
