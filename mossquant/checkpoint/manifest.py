# SPDX-License-Identifier: Apache-2.0
"""`manifest.json` of a quantized checkpoint: what the folder holds, what it was made from and by, what it has seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from mossquant.errors import InputError
from mossquant.files.inputs import is_pointer
from mossquant.files.json import read_stored
from mossquant.files.outputs import file_sha256
from mossquant.text.declared import TEXT_FILES

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class FileRecord(_Strict):
    """Size and hash of one file."""

    sha256: Sha256
    bytes: int


class Parent(_Strict):
    """The full-precision checkpoint that a quantized one was made from: stored type, size, and file name → SHA-256."""

    torch_dtype: str
    parameters: int
    bytes: int
    files: dict[FileName, Sha256]


class SeenText(_Strict):
    """SHA-256 of the texts that the model was trained and calibrated on."""

    training: list[Sha256]
    calibration: list[Sha256]


class Manifest(_Strict):
    """`manifest.json`. `payload_bytes` are codes, padding, scales and kept tensors; headers and shapes come on top."""

    version: Literal[1]
    kind: Literal["quantized checkpoint"]
    release: str
    recipe: str
    payload_bytes: int
    files: dict[FileName, FileRecord]
    parent: Parent
    text: SeenText


_REQUIRED = ("config.json", "recipe.yaml", "ledger.json")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`. Raises `InputError`: missing, of another version, or not a manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no manifest.json, so mossquant did not write it; give a folder that it wrote")
    return read_stored(path, Manifest, noun="a manifest", advice="Copy the folder again, or quantize again.")


def file_offenders(folder: Path, manifest: Manifest) -> list[str]:
    """What differs between a folder and its manifest."""
    offenders = [f"manifest.json does not list {name}" for name in _REQUIRED if name not in manifest.files]
    return offenders + record_offenders(folder, manifest.files)


def record_offenders(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Which of these files of a folder are missing, or of another size or hash.

    A tokenizer or a text.json that is not listed is one too: it would be used, and other files that are not listed are
    not.
    """
    foreign = (name for name in TEXT_FILES if name not in files and (folder / name).exists())
    offenders = [f"{name} does not belong to it, take it away" for name in foreign]
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            offenders.append(f"{name} is missing")
        elif is_pointer(path):
            offenders.append(f"{name} is a Git LFS pointer, run `git lfs pull`")
        elif path.stat().st_size != record.bytes:
            offenders.append(f"{name} has {path.stat().st_size} bytes, the manifest says {record.bytes}")
        elif file_sha256(path) != record.sha256:
            offenders.append(f"{name} has another SHA-256 than the manifest says")
    return offenders
