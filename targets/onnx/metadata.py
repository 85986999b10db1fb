# SPDX-License-Identifier: Apache-2.0
"""What an .onnx of ours says about itself, in `metadata_props` under one key: nothing but its path is needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mossquant.config import MossNetConfig
from mossquant.errors import InputError
from mossquant.jsonfile import LARGEST_SMALL, parse_json
from mossquant.manifest import FileName, FileRecord, Sha256
from mossquant.outputs import file_sha256

__all__ = [
    "METADATA_KEY",
    "RUNTIME_MINIMUM",
    "DataFile",
    "Metadata",
    "Opened",
    "file_hashes",
    "initializers",
    "read_metadata",
]

METADATA_KEY = "mossquant"
RUNTIME_MINIMUM = "1.23.2"
"""Oldest onnxruntime that runs these graphs: GatherBlockQuantized with `bits` is the newest operator in them."""

_AGAIN = "copy the artifact's folder again, or export again"
_GRAPH, _PROPS = 7, 14
_LARGEST_PROP = LARGEST_SMALL


Count = Annotated[int, Field(gt=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataFile(FileRecord):
    """The file of external weights that lies beside the program."""

    name: FileName


class Metadata(_Strict):
    """What the program is.

    Attributes:
        version: of this content.
        kind: always "artifact".
        target: always "onnx".
        release: of mossquant, that wrote it.
        runtime_minimum: oldest onnxruntime that runs it.
        config: the model's config, as in `config.json`.
        weights: name of the recipe, or the stored type of a full-precision checkpoint.
        activations: format of the inputs of quantized linears: "fp32", "int8_block", or "mixed".
        state_format: format in which the state is carried.
        parameters: parameters of the full-precision model, a tied table once.
        payload_bytes: bytes of codes, padding, scales and kept tensors in the checkpoint that was lowered.
        weight_bytes: bytes of the same in this program.
        source_kind: "checkpoint" or "quantized checkpoint".
        source_files: file name → SHA-256 of what was lowered.
        tokenizer_sha256: of the `tokenizer.json` that belongs to it, None where there is none.
        seen_text: SHA-256 of texts that the model was trained or calibrated on.
        data: the external weights, None where all are inside.
    """

    version: Literal[1] = 1
    kind: Literal["artifact"] = "artifact"
    target: Literal["onnx"] = "onnx"
    release: str
    runtime_minimum: str = RUNTIME_MINIMUM
    config: dict[str, Any]
    weights: str
    activations: Literal["fp32", "int8_block", "mixed"]
    state_format: Literal["fp32"] = "fp32"
    parameters: Count
    payload_bytes: Count
    weight_bytes: Count
    source_kind: Literal["checkpoint", "quantized checkpoint"]
    source_files: dict[FileName, Sha256]
    tokenizer_sha256: Sha256 | None
    seen_text: list[Sha256]
    data: DataFile | None = None

    def to_props(self) -> dict[str, str]:
        """As `metadata_props`."""
        return {METADATA_KEY: self.model_dump_json()}


class Opened:
    """A program that was read and checked, without its external weights.

    Attributes:
        path: the file.
        proto: its content.
        metadata: what it says about itself.
        config: the model's shape.
    """

    def __init__(self, path: Path, proto: onnx.ModelProto, metadata: Metadata) -> None:
        self.path, self.proto, self.metadata = path, proto, metadata
        self.config = MossNetConfig.from_json(metadata.config, where=f"the metadata of {path}")

    def hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the program and its external weights."""
        return file_hashes(self.path, self.metadata)

    @property
    def bytes(self) -> int:
        """Bytes of the program and its external weights."""
        return self.path.stat().st_size + (self.metadata.data.bytes if self.metadata.data else 0)


def read_metadata(path: Path) -> Metadata:
    """What an .onnx says about itself. The graph is skipped, not read: a file of any size is looked at in no time.

    Raises:
        InputError: not ONNX, cut short, not written by this project, written by another release, or its external
            weights are missing or of another size.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give an .onnx that `mossquant export` wrote")
    text, has_graph = None, False
    try:
        with path.open("rb") as file:
            for number, value in _fields(file, path.stat().st_size):
                has_graph = has_graph or number == _GRAPH
                if number == _PROPS and value is not None:
                    prop = onnx.StringStringEntryProto.FromString(value)
                    text = prop.value if prop.key == METADATA_KEY else text
    except (DecodeError, _NotProtobuf):
        raise InputError(
            f"{path} is not a readable ONNX file (cut short, damaged or of another format); {_AGAIN}"
        ) from None
    if text is None or not has_graph:
        raise InputError(
            f"{path} holds no mossquant metadata: it was cut short, or another program wrote it; "
            "give an .onnx that `mossquant export` wrote"
        )
    metadata = _parsed(path, text)
    _check_data(path, metadata)
    return metadata


def file_hashes(path: Path, metadata: Metadata) -> dict[str, str]:
    """File name → SHA-256 of a program and its external weights."""
    names = [path.name] + ([metadata.data.name] if metadata.data else [])
    return {name: file_sha256(path.parent / name) for name in names}


def initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """All initializers of a graph and of the branches and loops inside it."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += initializers(attribute.g)
    return found


class _NotProtobuf(Exception):
    pass


def _fields(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes | None]]:
    """(number, content) of the fields of a protobuf message; content only of small length-delimited ones."""
    while file.tell() < size:
        key = _varint(file)
        number, wire = key >> 3, key & 7
        content: bytes | None = None
        if wire == 0:
            _varint(file)
        elif wire == 2:
            length = _varint(file)
            if file.tell() + length > size:
                raise _NotProtobuf
            if number == _PROPS and length <= _LARGEST_PROP:
                content = file.read(length)
            else:
                file.seek(length, 1)
        else:
            raise _NotProtobuf
        yield number, content


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _NotProtobuf
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise _NotProtobuf


def _parsed(path: Path, text: str) -> Metadata:
    try:
        return Metadata.model_validate(parse_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])) or "metadata", first["msg"].lower()
    except ValueError as error:
        where, what = "metadata", str(error)
    raise InputError(
        f"{path}: its metadata cannot be read ({where[:80]}: {what[:120]}); "
        "another release of mossquant wrote it: use that one, or export again"
    )


def _check_data(path: Path, metadata: Metadata) -> None:
    if metadata.data is None:
        return
    data = path.parent / metadata.data.name
    if not data.is_file():
        raise InputError(f"{data} is missing, and the weights of {path.name} lie in it; {_AGAIN}")
    if data.stat().st_size != metadata.data.bytes:
        raise InputError(f"{data} has {data.stat().st_size} bytes, {path.name} needs {metadata.data.bytes}; {_AGAIN}")
