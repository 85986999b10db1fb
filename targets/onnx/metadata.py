# SPDX-License-Identifier: Apache-2.0
"""What an .onnx of ours says about itself, in `metadata_props` under one key, and the program that was read with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mossquant.checkpoint.manifest import FileName, FileRecord
from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL
from mossquant.files.outputs import file_sha256
from mossquant.model.config import MossNetConfig
from mossquant.targets.metadata import Count, ProgramMetadata, parsed

METADATA_KEY = "mossquant"
RUNTIME_MINIMUM = "1.23.2"
"""Oldest onnxruntime that runs these graphs: GatherBlockQuantized with `bits` is the newest operator in them."""

_AGAIN = "copy the artifact's folder again, or export again"
_LARGEST_PROGRAM = 1 << 29
"""Bytes; more than 200 MB of weights lie in a file beside the program."""


class DataFile(FileRecord):
    """The file of external weights that lies beside the program."""

    name: FileName


class Metadata(ProgramMetadata):
    """What the program is.

    Attributes:
        weight_bytes: bytes of codes, padding, scales and kept tensors in this program.
        data: the external weights, None where all are inside.
    """

    target: Literal["onnx"] = "onnx"
    runtime_minimum: str = RUNTIME_MINIMUM
    state_format: Literal["fp32"] = "fp32"
    activations: Literal["fp32", "int8_block", "mixed"]
    weight_bytes: Count
    data: DataFile | None = None

    def to_props(self) -> dict[str, str]:
        """As `metadata_props`."""
        return {METADATA_KEY: self.model_dump_json()}


@dataclass(frozen=True)
class Opened:
    """A program that was read, without its external weights.

    Attributes:
        path: the file.
        proto: its content.
        metadata: what it says about itself.
        config: the model's shape.
    """

    path: Path
    proto: onnx.ModelProto
    metadata: Metadata
    config: MossNetConfig

    @cached_property
    def hashes(self) -> dict[str, str]:
        """File name → SHA-256 of the program and its external weights."""
        names = [self.path.name] + ([self.metadata.data.name] if self.metadata.data else [])
        return {name: file_sha256(self.path.parent / name) for name in names}

    @property
    def bytes(self) -> int:
        """Bytes of the program and its external weights."""
        return self.path.stat().st_size + (self.metadata.data.bytes if self.metadata.data else 0)


def read_program(path: Path) -> Opened:
    """Read an .onnx of ours; of its graph nothing is checked.

    Raises:
        InputError: not ONNX, cut short, not written by this project, written by another release, or its external
            weights are missing or of another size.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give an .onnx that `mossquant export` wrote")
    if path.stat().st_size > _LARGEST_PROGRAM:
        raise InputError(f"{path} is larger than any .onnx that `mossquant export` writes; give one that it wrote")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        readable = _names_are_text(proto.graph)
    except DecodeError:
        readable = False
    if not readable:
        raise InputError(f"{path} is not a readable ONNX file (cut short, damaged or of another format); {_AGAIN}")
    text = next((prop.value for prop in proto.metadata_props if prop.key == METADATA_KEY), "")
    if not 0 < len(text) <= LARGEST_SMALL or not proto.HasField("graph"):
        raise InputError(
            f"{path} holds no mossquant metadata: it was cut short, or another program wrote it; "
            "give an .onnx that `mossquant export` wrote"
        )
    metadata = parsed(Metadata, text, path)
    _check_data(path, metadata)
    return Opened(path, proto, metadata, MossNetConfig.from_json(metadata.config, where=f"the metadata of {path}"))


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


def _names_are_text(graph: onnx.GraphProto) -> bool:
    """Whether every name is UTF-8: the library gives bytes where one is not."""
    names = [value.name for inner in graphs(graph) for value in (*inner.input, *inner.output)]
    for tensor in initializers(graph):
        names += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for node in (node for inner in graphs(graph) for node in inner.node):
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    return all(isinstance(name, str) for name in names)


def _check_data(path: Path, metadata: Metadata) -> None:
    if metadata.data is None:
        return
    data = path.parent / metadata.data.name
    if not data.is_file():
        raise InputError(f"{data} is missing, and the weights of {path.name} lie in it; {_AGAIN}")
    if data.stat().st_size != metadata.data.bytes:
        raise InputError(f"{data} has {data.stat().st_size} bytes, {path.name} needs {metadata.data.bytes}; {_AGAIN}")
