# SPDX-License-Identifier: Apache-2.0
"""What an XNNPACK delegate of a .pte holds: its linears with their codes, and its other constants.

A payload is a flatbuffer of its own ("XN01", schema.fbs) behind a header; its weights are named data of the program.
Slot numbers are those of the schema of ExecuTorch 1.4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossquant.formats.nibbles import unpack_nibbles
from mossquant.targets.executorch.flatbuffer import DamagedError, Table, root

_FULLY_CONNECTED = 2  # of the union XNodeUnion
_QUANTIZED_VALUE = 2  # of the union XValueUnion
_PER_CHANNEL, _PER_GROUP = 1, 4  # of the union XNNQuantParams
_FP32, _QCINT8, _QBINT4, _QDINT8 = 1, 6, 10, 9  # XNNDatatype
_MOST_SIZES = 4


@dataclass(frozen=True)
class Linear:
    """A fully connected node inside a delegate.

    Attributes:
        bits: bits of a code; None where the weight is fp32.
        group: inputs that share a scale; 0 for one scale a row, and where the weight is fp32.
        rounds_input: whether its input is rounded to int8 at run time, one range a row.
        shape: (N, K).
        stored: the weight as the file holds it; nothing is unpacked before it is asked for.
        stored_scales: the scales as the file holds them, fp32 or the upper halves of fp32, flat.
    """

    bits: int | None
    group: int
    rounds_input: bool
    shape: tuple[int, int]
    stored: memoryview
    stored_scales: NDArray[Any]

    @property
    def kind(self) -> tuple[object, ...]:
        """What it has in common with linears that may stand in its place."""
        dtype = np.dtype(np.float32 if self.bits is None else np.int8)
        return (self.bits, self.group, self.rounds_input, dtype, self.shape)

    @property
    def scales(self) -> NDArray[np.float32]:
        """fp32 [N, groups]; empty where the weight is fp32."""
        scales = self.stored_scales
        if scales.dtype == np.uint16:
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        return scales.reshape(self.shape[0], -1 if scales.size else 0)

    @property
    def codes(self) -> NDArray[Any]:
        """int8 [N, K], or fp32 values [N, K]."""
        rows, columns = self.shape
        if self.bits == 4:
            return unpack_nibbles(array(self.stored, 0, "u1", np.array([rows, columns // 2])))
        return array(self.stored, 0, "<f4" if self.bits is None else "i1", np.array(self.shape))


@dataclass(frozen=True)
class Delegate:
    """One XNNPACK payload: its linears, and its other fp32 constants, flat."""

    linears: tuple[Linear, ...]
    constants: tuple[NDArray[np.float32], ...]


def read_delegate(payload: memoryview, named: Mapping[str, memoryview]) -> Delegate:
    """Read one payload.

    Args:
        payload: its bytes.
        named: the program's named data.

    Raises:
        DamagedError: it points outside itself, or holds what mossquant does not write.
    """
    if bytes(payload[4:8]) != b"XH00":
        raise DamagedError("a delegate has no header")
    start, size = (int.from_bytes(payload[at : at + 4], "little") for at in (10, 14))
    if start + size > len(payload):
        raise DamagedError("a delegate is cut short")
    graph = root(payload[start : start + size], b"XN01")
    data = [_weights(entry, named) for entry in graph.tables(8)]
    values = {value.number(6): (value, params) for value, params in map(_value, graph.tables(2))}
    linears, filters = [], set()
    for node in graph.tables(1):
        kind, linear = node.union(1)
        if kind == _FULLY_CONNECTED and linear is not None:
            source, weight = linear.number(0), linear.number(1)
            filters.add(weight)
            rounds = values[source][0].number(0, "<i2") == _QDINT8
            linears.append(_linear(*values[weight], data, rounds_input=rounds))
    constants = [
        array(data[index], 0, "<f4", value.numbers(2))
        for number, (value, _) in values.items()
        if number not in filters and (index := value.number(3)) and index < len(data)
    ]
    return Delegate(tuple(linears), tuple(constants))


def _weights(entry: Table, named: Mapping[str, memoryview]) -> memoryview:
    key = entry.string(2)
    return named[key][: entry.number(1, "<u8")] if key else memoryview(b"")


def _value(value: Table) -> tuple[Table, tuple[int, Table | None]]:
    """(tensor value, (kind of quantization, its parameters)) of an XValue."""
    kind, table = value.union(1)
    tensor = table.table(0) if table is not None and kind == _QUANTIZED_VALUE else table
    if table is None or tensor is None:
        raise DamagedError("a value of a delegate is empty")
    return tensor, table.union(2) if kind == _QUANTIZED_VALUE else (0, None)


def _linear(value: Table, params: tuple[int, Table | None], data: list[memoryview], *, rounds_input: bool) -> Linear:
    dims, kind, index = value.numbers(2), value.number(0, "<i2"), value.number(3)
    if len(dims) != 2 or 0 in dims or not 0 < index < len(data):
        raise DamagedError("a linear has no constant matrix")
    rows, columns = map(int, dims)
    stored, (how, table) = data[index], params
    bits = {_FP32: None, _QCINT8: 8, _QBINT4: 4}.get(kind, 0)
    if bits != 0 and len(stored) * 8 < rows * columns * (bits or 32):
        raise DamagedError("the weight of a linear is cut short")
    if bits is None:
        return Linear(None, 0, rounds_input, (rows, columns), stored, np.empty(0, np.float32))
    if bits == 8 and how == _PER_CHANNEL and table is not None:
        group, scales = 0, _scales(table, 2, data, "<f4")
    elif bits == 4 and how == _PER_GROUP and table is not None:
        group, scales = table.number(2, "<i4"), _scales(table, 4, data, "<u2")
    else:
        raise DamagedError("a linear has weights of a kind that mossquant does not write")
    if scales.size % rows or (bits == 8 and scales.size != rows):
        raise DamagedError("a linear has scales that do not fit its rows")
    return Linear(bits, group, rounds_input, (rows, columns), stored, scales)


def _scales(table: Table, slot: int, data: list[memoryview], kind: str) -> NDArray[Any]:
    """Scales in the delegate's data, or in the graph itself."""
    index, count = table.number(slot), table.number(slot + 1)
    if count == 0:
        return table.numbers(0, "<f4")
    return array(data[index], 0, kind, np.array([count]))


def sizes(dims: NDArray[Any]) -> tuple[int, ...]:
    """The sizes of an array. Raises `DamagedError`: too many of them, or negative ones."""
    if len(dims) > _MOST_SIZES or (dims < 0).any():
        raise DamagedError("an array has sizes that mossquant does not write")
    return tuple(int(size) for size in dims)


def array(data: memoryview, offset: int, kind: str, dims: NDArray[Any]) -> NDArray[Any]:
    """An array of a numpy type in a part of the file. Raises `ValueError`: it is empty, or ends behind it."""
    shape = sizes(dims)
    count = math.prod(shape)
    if not 0 < count <= len(data):  # numpy's own check would overflow
        raise DamagedError("a constant is empty or cut short")
    return np.frombuffer(data, kind, count, offset).reshape(shape)
