# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint, quantized checkpoint or program is: shapes, experts, bytes by format and role, ledger, hashes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mossquant.checkpoint.locate import Located
from mossquant.model.config import MossNetConfig
from mossquant.targets.metadata import ProgramMetadata
from mossquant.text.declared import DeclaredText


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
        sections: what the bytes of an artifact's program are for, and how many; empty for a checkpoint.
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
    sections: Mapping[str, int]
    facts: tuple[tuple[str, str], ...]
    ledger: tuple[Mapping[str, Any], ...]

    @property
    def bits_per_weight(self) -> float:
        """8 · bytes stored for the weights ÷ parameters."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def program_bytes(self) -> int:
        """Bytes of an artifact's program: the sum of its sections."""
        return sum(self.sections.values())

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
            "sections": [{"name": name, "bytes": size} for name, size in self.sections.items()],
            "facts": dict(self.facts),
            "ledger": [dict(entry) for entry in self.ledger],
        }


def file_rows(folder: Path, hashes: Mapping[str, str]) -> tuple[FileRow, ...]:
    """Files of a folder by name, with their hashes."""
    return tuple(FileRow(name, (folder / name).stat().st_size, digest) for name, digest in hashes.items())


def program_info(
    located: Located,
    metadata: ProgramMetadata,
    config: MossNetConfig,
    *,
    active_share: float,
    weight_bytes: int,
    files: Mapping[str, str],
    sections: Mapping[str, int],
    facts: Sequence[tuple[str, str]],
) -> InfoReport:
    """The report of a target's program.

    Args:
        located: the program.
        metadata: what it says about itself.
        config: the model's shape.
        active_share: share of the parameters that a decode step reads.
        weight_bytes: stored for the weights in it.
        files: file name → SHA-256, in the program's folder.
        sections: what its bytes are for.
        facts: what only this target has to say.
    """
    tokenizer = metadata.tokenizer_sha256
    return InfoReport(
        path=located.given,
        kind=located.kind,
        weights=metadata.weights,
        config=config,
        torch_dtype=str(metadata.config["torch_dtype"]),
        parameters=metadata.parameters,
        active_parameters=round(metadata.parameters * active_share),
        weight_bytes=weight_bytes,
        payload_bytes=metadata.payload_bytes,
        rows=(),
        files=file_rows(located.path.parent, files),
        sections=sections,
        facts=(
            ("made from", f"a {metadata.source_kind}: {short_hashes(metadata.source_files)}"),
            ("activations", metadata.activations),
            ("state", metadata.state_format),
            *facts,
            ("tokenizer", short_hashes({"tokenizer.json": tokenizer}) if tokenizer else "none"),
            *text_facts(metadata.text),
            ("written by", f"mossquant {metadata.release}"),
        ),
        ledger=(),
    )


def text_facts(declared: DeclaredText | None) -> list[tuple[str, str]]:
    """What a model declares about its text: (name, value)."""
    if declared is None:
        return []
    spelling = {token: f" {name}" for name, token in declared.special_tokens.items()}
    begin, put = declared.beginning_of_text, "" if declared.add_beginning_of_text else "not "
    facts = {
        "end of text": ", ".join(f"{token}{spelling.get(token, '')}" for token in declared.end_of_text),
        "beginning of text": "" if begin is None else f"{begin}{spelling.get(begin, '')}, {put}put in front of a text",
        "special tokens": ", ".join(f"{token}{spelling[token]}" for token in sorted(spelling)),
        "chat template": f"{len(declared.chat_template)} characters of Jinja" if declared.chat_template else "",
    }
    return [(name, value if len(value) < 400 else f"{value[:400]} …") for name, value in facts.items() if value]


def short_hashes(hashes: Mapping[str, str]) -> str:
    """Names with the first digits of their hashes, in one line."""
    return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(hashes.items()))
