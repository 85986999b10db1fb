# SPDX-License-Identifier: Apache-2.0
"""What an .onnx of ours says about itself, in `metadata_props` under one key: nothing but its path is needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mossquant.checkpoint.manifest import FileName, FileRecord
from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL
from mossquant.files.outputs import file_sha256
from mossquant.model.config import MossNetConfig
from mossquant.targets.metadata import Count, ProgramMetadata, parsed

__all__ = [
    "METADATA_KEY",
    "RUNTIME_MINIMUM",
    "DataFile",
    "Metadata",
    "Opened",
    "file_hashes",
    "graphs",
    "initializers",
    "read_metadata",
]

METADATA_KEY = "mossquant"
RUNTIME_MINIMUM = "1.23.2"
"""Oldest onnxruntime that runs these graphs: GatherBlockQuantized with `bits` is the newest operator in them."""

_AGAIN = "copy the artifact's folder again, or export again"
_GRAPH, _PROPS = 7, 14
_LARGEST_PROP = LARGEST_SMALL


class DataFile(FileRecord):
    """The file of external weights that lies beside the program."""

    name: FileName


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        target: always "onnx".
        runtime_minimum: oldest onnxruntime that runs it.
        activations: format of the inputs of quantized linears: "fp32", "int8_block", or "mixed".
        weight_bytes: bytes of codes, padding, scales and kept tensors in this program.
        data: the external weights, None where all are inside.
    """

    target: Literal["onnx"] = "onnx"
    runtime_minimum: str = RUNTIME_MINIMUM
    activations: Literal["fp32", "int8_block", "mixed"]
    weight_bytes: Count
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
    metadata = parsed(Metadata, text, path)
    _check_data(path, metadata)
    return metadata


def file_hashes(path: Path, metadata: Metadata) -> dict[str, str]:
    """File name → SHA-256 of a program and its external weights."""
    names = [path.name] + ([metadata.data.name] if metadata.data else [])
    return {name: file_sha256(path.parent / name) for name in names}


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and the branches and loops inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """All initializers of a graph and of the branches and loops inside it."""
    return [tensor for inner in graphs(graph) for tensor in inner.initializer]


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


def _check_data(path: Path, metadata: Metadata) -> None:
    if metadata.data is None:
        return
    data = path.parent / metadata.data.name
    if not data.is_file():
        raise InputError(f"{data} is missing, and the weights of {path.name} lie in it; {_AGAIN}")
    if data.stat().st_size != metadata.data.bytes:
        raise InputError(f"{data} has {data.stat().st_size} bytes, {path.name} needs {metadata.data.bytes}; {_AGAIN}")
