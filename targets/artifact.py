# SPDX-License-Identifier: Apache-2.0
"""An artifact, what ships: a folder with a program for each target, `tokenizer.json` if there is one, `manifest.json`.

The manifest says what a consumer has to know without opening a program: files with size and hash, inputs and outputs of
its methods, the operators that the runtime must have, and the oldest release of it that does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mossquant.checkpoint.manifest import FileName, FileRecord, record_offenders
from mossquant.errors import InputError
from mossquant.files.json import read_stored
from mossquant.files.outputs import file_sha256, write_json
from mossquant.model.config import MAX_VOCABULARY
from mossquant.targets.metadata import ProgramMetadata
from mossquant.text.declared import TEXT_FILE, TEXT_FILES, read_declared_text
from mossquant.text.tokenizer_checks import check_tokenizer_size

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

_AGAIN = "Copy the folder again, or export again."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Port(_Strict):
    """An input or output: name, element type, and sizes, symbolic ones by name ("B" batch, "T" time)."""

    name: str
    type: str
    shape: list[int | str]


class Runtime(_Strict):
    """What runs the program: operators by domain, the version of each domain, the oldest release that has them.

    `session` says what must be on in the runtime for the activations of the plan and for speed; nothing if empty.
    """

    name: str
    minimum: str
    domains: dict[str, int]
    operators: dict[str, list[str]]
    session: list[str] = Field(default=[], exclude_if=lambda needs: not needs)


class MethodPorts(_Strict):
    """What a method takes and gives, in order."""

    inputs: list[Port]
    outputs: list[Port]


class ProgramRecord(_Strict):
    """One target's program; `model` is what the program says about itself."""

    file: FileName
    methods: dict[str, MethodPorts]
    runtime: Runtime
    model: dict[str, Any]


class ArtifactManifest(_Strict):
    """`manifest.json` of an artifact: its programs by target, and every file."""

    version: Literal[1] = 1
    kind: Literal["artifact"] = "artifact"
    release: str
    programs: dict[str, ProgramRecord]
    files: dict[FileName, FileRecord]


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        notes: what the user should know about it, one line each.
    """

    folder: Path
    manifest: ArtifactManifest
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that it has a program for."""
        return tuple(self.manifest.programs)

    def program(self, target: str) -> Path:
        """The program file of a target."""
        return self.folder / self.manifest.programs[target].file

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """File name → size and SHA-256."""
        return self.manifest.files

    @property
    def bytes(self) -> int:
        """Bytes of the programs and their weights, without the tokenizer and what is declared about text."""
        return sum(record.bytes for name, record in self.files.items() if name not in TEXT_FILES)

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """Open an artifact folder and compare every file with the manifest.

        Raises:
            InputError: no manifest, or files that are missing, of another size or hash: all offenders at once.
        """
        manifest = read_artifact_manifest(folder / MANIFEST)
        offenders = record_offenders(folder, manifest.files)
        if offenders:
            raise InputError.listing(f"{folder} is damaged", offenders, _AGAIN)
        return cls(folder, manifest)


def read_artifact_manifest(path: Path) -> ArtifactManifest:
    """Read and check a `manifest.json`. Raises `InputError`: missing, of another version, or not an artifact's."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing, so {path.parent} is not an artifact; give a folder that `mossquant export` wrote"
        )
    return read_stored(path, ArtifactManifest, noun="the manifest of an artifact", advice=_AGAIN)


def check_beside(program: Path, files: Mapping[str, str], metadata: ProgramMetadata) -> None:
    """Compare a program with the manifest and the tokenizer beside it, where there are any.

    Args:
        program: the program file.
        files: name → SHA-256 of its files, which lie in the same folder.
        metadata: what the program says about itself.

    Raises:
        InputError: the manifest is none, does not list these files with these hashes, or says something else about the
            program; the tokenizer or what is declared about text is another one, or too large, or the program has none.
    """
    if program.with_name(MANIFEST).is_file():
        _check_listed(program, files, metadata)
    check_tokenizer(program, metadata.tokenizer_sha256)
    declared = read_declared_text(program.parent, MAX_VOCABULARY)  # whose ids are held against the program's
    if declared is not None and declared != metadata.text:
        raise InputError(f"{program.with_name(TEXT_FILE)} is not what {program.name} was exported with. {_AGAIN}")


def _check_listed(program: Path, files: Mapping[str, str], metadata: ProgramMetadata) -> None:
    path = program.with_name(MANIFEST)
    manifest = read_artifact_manifest(path)
    listed = {name: record.sha256 for name, record in manifest.files.items()}
    changed = [
        f"{name} {'has another SHA-256' if name in listed else 'is not listed there'}"
        for name, sha256 in files.items()
        if listed.get(name) != sha256
    ]
    if changed:
        raise InputError.listing(f"{program.parent} is not what its manifest.json says", changed, _AGAIN)
    records = [record for record in manifest.programs.values() if record.file == program.name]
    # A release that knew more said more: what this one knows decides.
    try:
        said = [type(metadata).model_validate_json(json.dumps(record.model)) for record in records]
    except ValidationError:
        said = []
    if said != [metadata]:
        raise InputError(f"{path} says something else about {program.name} than the program itself. {_AGAIN}")


def check_tokenizer(program: Path, expected: str | None) -> None:
    """Compare the tokenizer beside a program, if there is one, with its SHA-256, None where the model has none.

    Raises:
        InputError: it is another one, or too large for one, or the program has none.
    """
    tokenizer = program.with_name(TOKENIZER)
    if not tokenizer.is_file():
        return
    if expected is None:
        raise InputError(
            f"{tokenizer} does not belong to {program.name}, whose model has no tokenizer; take it away, "
            "or export again"
        )
    check_tokenizer_size(tokenizer)
    if file_sha256(tokenizer) != expected:
        raise InputError(f"{tokenizer} is not the tokenizer of {program.name} (another SHA-256). {_AGAIN}")


def write_artifact_manifest(folder: Path, *, release: str, programs: dict[str, ProgramRecord]) -> ArtifactManifest:
    """Write the manifest of what lies in `folder`, which is written aside."""
    files = {
        path.name: FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = ArtifactManifest(release=release, programs=programs, files=files)
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest
