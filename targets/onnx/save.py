# SPDX-License-Identifier: Apache-2.0
"""Writes a program to disk, and says before what that takes.

Weights above 200 MB go to a file of their own, one tensor at a time. Below, they are part of the protobuf, which is
held once and written piece by piece: the library's own way holds it three times.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mossquant.files.outputs import file_sha256
from mossquant.targets.onnx.metadata import DataFile

DATA = "model.onnx.data"
EXTERNAL_ABOVE = 200 * 10**6
"""Bytes of weights above which they lie in a file of their own, which onnxruntime maps into memory."""

_PAGE = 4096

# At most, of a node or an initializer: its names and shapes in the file, and its objects in memory.
_FRAME_BYTES = 400
_OBJECT_BYTES = 4096
_REST_BYTES = 1 << 24


def external(weight_bytes: int) -> bool:
    """Whether so many bytes of weights go to a file of their own."""
    return weight_bytes > EXTERNAL_ABOVE


def disk_bytes(model: ir.Model, weight_bytes: int) -> int:
    """Room that program and weights take, at most."""
    frames = _parts(model) * (_FRAME_BYTES + (_PAGE if external(weight_bytes) else 0))
    return weight_bytes + frames


def memory_bytes(model: ir.Model, weight_bytes: int) -> int:
    """Anonymous memory that writing takes: the largest weight with its codes one a byte, and what lies inside."""
    largest = max(tensor.nbytes for tensor in _initializers(model))
    inside = 0 if external(weight_bytes) else weight_bytes
    return 3 * largest + inside + _parts(model) * _OBJECT_BYTES + _REST_BYTES


def save_data(model: ir.Model, folder: Path) -> DataFile:
    """Move every tensor above a page into its own pages of one file, one tensor at a time."""
    ir.external_data.unload_from_model(
        model, folder, DATA, size_threshold_bytes=_PAGE, alignment=_PAGE, align_threshold=_PAGE
    )
    path = folder / DATA
    return DataFile(name=DATA, sha256=file_sha256(path), bytes=path.stat().st_size)


def save_program(model: ir.Model, path: Path) -> None:
    """Write the protobuf: the bytes of its `SerializeToString`, without a second copy of the whole."""
    with path.open("wb") as file:
        for piece in _pieces(ir.to_proto(model)):
            file.write(piece)


def _pieces(message: Any) -> Iterator[bytes]:
    """The encoded fields of a model or graph, in the order of their numbers."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            alone = type(message)()
            setattr(alone, field.name, value)
            yield alone.SerializeToString()
            continue
        for item in value if field.is_repeated else [value]:
            if field.name == "graph":
                # Not its ByteSize, which the library finds by encoding all of it.
                yield _varint(field.number << 3 | 2) + _varint(sum(map(len, _pieces(item))))
                yield from _pieces(item)
            else:
                encoded = item.SerializeToString()
                yield _varint(field.number << 3 | 2) + _varint(len(encoded))
                yield encoded


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _parts(model: ir.Model) -> int:
    """Nodes, initializers, inputs and outputs."""
    inside = sum(len(graph) + len(graph.inputs) + len(graph.outputs) for graph in model.graphs())
    return inside + sum(1 for _ in _initializers(model))
