# SPDX-License-Identifier: Apache-2.0
"""Reads weights back from an .onnx on disk: from its nodes, what each of them sees, not from how it was written.

Initializers are taken from the protobuf or the file of external weights; the few nodes between them and the node that
uses them (Cast, Expand, Mul, …) are evaluated here, in numpy.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from mossquant.formats.nibbles import unpack_nibbles
from mossquant.targets.onnx.metadata import Opened, graphs

Array = NDArray[Any]
# What comes of sizes, types or attributes that do not fit: the file is damaged, and holds no such value.
_DAMAGE = (ValueError, LookupError, TypeError, OverflowError)
_DEEPEST = 64
"""Nodes between an initializer and the node that uses it; there are six at most."""
_LARGEST_GROWTH, _ROOM = 16, 1 << 16
"""Elements that may be held at a time: so many times those of the largest initializer, and some more."""
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_RANGE = re.compile(r"^(.*\.experts\.)(\d{1,4})-(\d{1,4})(\..*)$", re.ASCII)


def expanded(name: str) -> Iterator[str]:
    """The names that a name with a range of experts stands for: `experts.0-2.w1` → `experts.0.w1`, …

    One by one, because a range that was not checked may be long.
    """
    match = _RANGE.match(name)
    if match is None:
        yield name
    else:
        before, first, last, after = match.groups()
        yield from (f"{before}{number}{after}" for number in range(int(first), int(last) + 1))


def holders(names: Iterable[str], tensors: Collection[str]) -> dict[str, list[tuple[str, int, int]]]:
    """Which of these names stand for each tensor: (name, the tensor's place among those it stands for, how many)."""
    places: dict[str, list[tuple[str, int, int]]] = {}
    for name in names:
        members = list(takewhile(lambda member: member in tensors, expanded(name)))
        for index, member in enumerate(members):
            places.setdefault(member, []).append((name, index, len(members)))
    return places


@dataclass(frozen=True)
class Matrix:
    """What a matmul or a table sees.

    Attributes:
        bits: bits of a code, None where the values are floats.
        block: columns that share a scale, 0 where the values are floats.
        codes: [N, blocks · block] signed codes; or [N, K] float values.
        scales: [N, blocks] fp32; empty where the values are floats.
    """

    bits: int | None
    block: int
    codes: Array
    scales: Array


class FileGraph:
    """The nodes and initializers of a program, branches and loops included; names are unique over all of them.

    Attributes:
        named: name → node, of the nodes that have one.
        lookups: nodes that gather rows, of a table or of something that is known at run time only.
        stored: name → initializer.
        read: names of the initializers that were looked at.
    """

    def __init__(self, opened: Opened) -> None:
        self.named: dict[str, onnx.NodeProto] = {}
        self.lookups: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        self.read: set[str] = set()
        self._producer: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        self._values: dict[str, Array | None] = {}
        self._folder = opened.path.parent
        self._nodes: list[onnx.NodeProto] = []
        for graph in graphs(opened.proto.graph):
            self._add(graph)
        largest = max((math.prod(tensor.dims) for tensor in self.stored.values()), default=0)
        self._most = _ROOM + _LARGEST_GROWTH * largest
        self._held = self._depth = 0

    def _add(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
        for node in graph.node:
            self._nodes.append(node)
            if node.name:
                self.named[node.name] = node
            if node.op_type in _LOOKUPS:
                self.lookups.append(node)
            for name in node.output:
                self._producer[name] = node
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """The nodes with this operator."""
        return [node for node in self._nodes if node.op_type == operator]

    def value(self, name: str) -> Array | None:
        """A value that depends on initializers alone; None where it is known at run time only.

        None, too, where a graph of a stranger goes too deep, or would take more memory than weights do.
        """
        if name not in self._values:
            self._depth += 1
            array = self._evaluate(name) if self._depth <= _DEEPEST else None
            self._depth -= 1
            self._held += 0 if array is None else array.size
            self._values[name] = array if self._held <= self._most else None
        return self._values[name]

    def forget(self) -> None:
        """Drop the values that are held so far."""
        self._values.clear()
        self._held = 0

    def _evaluate(self, name: str) -> Array | None:
        node = self._producer.get(name)
        try:
            if name in self.stored:
                self.read.add(name)
                return stored_array(self.stored[name], self._folder)
            if node is None or node.op_type not in _OPERATORS:
                return None
            inputs = [value for name in node.input if (value := self.value(name)) is not None]
            room = sum(value.size for value in inputs) + self._held <= self._most
            return _OPERATORS[node.op_type](node, *inputs) if room and len(inputs) == len(node.input) else None
        except _DAMAGE:
            return None

    def used(self, name: str) -> list[Array]:
        """What the nodes that run see of an initializer: every last constant value that follows from it."""
        last: list[Array] = []
        waiting, seen = [name], {name}
        while waiting:
            name, follow = waiting.pop(), []
            own = self.value(name)
            for node in self._consumers.get(name, []):
                after = node.output[0] if node.output else ""
                if after and self.value(after) is not None:
                    follow += [after] if after not in seen else []
                    seen.add(after)
                elif own is not None:
                    last.append(own)
            waiting += reversed(follow)
        return last

    def matrix(self, node: onnx.NodeProto) -> Matrix | None:
        """The weights of a matmul or table; None where it has none that are constant."""
        try:
            return self._matrix(node)
        except _DAMAGE:
            return None

    def _matrix(self, node: onnx.NodeProto) -> Matrix | None:
        at = 0 if node.op_type in _LOOKUPS else 1
        data = self.value(node.input[at])
        if data is None:
            return None
        if node.op_type in ("Gather", "FusedMatMul"):
            return Matrix(None, 0, data, np.empty(0, np.float32))
        scales = self.value(node.input[2])
        if scales is None:
            return None
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block = sizes["bits"], sizes["block_size"]
        codes = (data ^ np.uint8(128)).view(np.int8) if bits == 8 else unpack_nibbles(data)
        return Matrix(bits, block, codes.reshape(len(data), -1), scales.reshape(len(data), -1))


def stored_array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The values of an initializer, bfloat16 as its own type."""
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where["offset"]))
        data = file.read(int(where["length"]))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def _reshape(node: onnx.NodeProto, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _slice(node: onnx.NodeProto, x: Array, starts: Array, ends: Array, axes: Array) -> Array:
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x[(slice(None),) * axis + (slice(start, min(end, x.shape[axis])),)]
    return x


# All casts are to fp32, from bfloat16, float16 and int8: exact.
_OPERATORS: dict[str, Callable[..., Array]] = {
    "Cast": lambda node, x: x.astype(np.float32),
    "Concat": lambda node, *parts: np.concatenate(parts, node.attribute[0].i),
    "Identity": lambda node, x: x,
    "Exp": lambda node, x: np.exp(x),
    "Expand": lambda node, x, shape: np.broadcast_to(x, tuple(shape)),
    "Mul": lambda node, x, y: x * y,
    "Neg": lambda node, x: -x,
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": lambda node, x: x.transpose(node.attribute[0].ints),
}
