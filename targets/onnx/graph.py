# SPDX-License-Identifier: Apache-2.0
"""Builds the nodes and initializers of an ONNX graph and of the branches inside it, on onnx_ir.

Values get the shortest names that are free (v0, v1, … over the whole model): in a small model a tenth of the file would
otherwise be names. Weights are lazy: they are read when the file is written, one at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10

Value = ir.Value
Inputs = Sequence[Value | None]
Attribute = int | float | str | Sequence[int] | ir.Graph | ir.TensorProtocol
Attributes = Mapping[str, Attribute] | None
_LAST = np.iinfo(np.int64).max


class Graph:
    """One graph under construction: the model's, or the body of a branch or loop (`inner`).

    Small constants live in the model's graph, where every branch sees them; each is stored once.
    """

    def __init__(self, name: str, outer: "Graph | None" = None) -> None:
        self._name = name
        self._outer = outer
        self._numbers: Iterator[int] = outer._numbers if outer is not None else count()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {} if outer is None else outer._constants
        self._nodes: list[ir.Node] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._initializers: list[Value] = []

    def inner(self, name: str) -> "Graph":
        """A graph inside this one."""
        return Graph(name, self)

    def input(self, name: str | None, dtype: ir.DataType, shape: Sequence[int | str]) -> Value:
        """Declare an input."""
        value = ir.val(name or self._free_name(), dtype, list(shape))
        self._inputs.append(value)
        return value

    def output(self, value: Value, dtype: ir.DataType, shape: Sequence[int | str], name: str | None = None) -> None:
        """Declare a value as output, under another name if one is given."""
        value.dtype, value.shape = dtype, ir.Shape(list(shape))
        if name is not None:
            value.name = name
        self._outputs.append(value)

    def weight(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], NDArray[np.generic]]
    ) -> Value:
        """An initializer of this graph, read when the file is written."""
        wanted = ir.Shape(list(shape))

        def tensor() -> ir.TensorProtocol:
            array = _Array(np.ascontiguousarray(read()), dtype, name=name)
            assert array.shape == wanted, (name, array.shape, wanted)
            return array

        lazy = ir.LazyTensor(tensor, dtype, wanted, name=name)
        value = ir.val(name, dtype, list(shape), const_value=lazy)
        self._initializers.append(value)
        return value

    def constant(self, array: NDArray[np.generic]) -> Value:
        """A small constant; equal ones are one initializer of the model's graph."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            top = self
            while top._outer is not None:
                top = top._outer
            name = self._free_name()
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            top._initializers.append(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def index(self, value: int) -> Value:
        """An int64 scalar."""
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> Value:
        """An fp32 scalar."""
        return self.constant(np.array(value, np.float32))

    def ops(
        self,
        kind: str,
        inputs: Inputs,
        outputs: int,
        attributes: Attributes = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> tuple[Value, ...]:
        """Append a node with several outputs. Only named nodes (the linears) carry a name."""
        node = ir.node(kind, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        for value in node.outputs:
            value.name = self._free_name()
        self._nodes.append(node)
        return tuple(node.outputs)

    def op(
        self, kind: str, inputs: Inputs, attributes: Attributes = None, *, domain: str = "", name: str = ""
    ) -> Value:
        """Append a node with one output."""
        return self.ops(kind, inputs, 1, attributes, domain=domain, name=name)[0]

    def reshape(self, x: Value, *shape: int) -> Value:
        """x in another shape; 0 keeps an axis, −1 is what is left."""
        return self.op("Reshape", [x, self.ints(*shape)])

    def slice(self, x: Value, start: Value | int, end: Value | int | None, axis: int) -> Value:
        """x[start:end] along an axis; end None is the end."""
        first = self.ints(start) if isinstance(start, int) else start
        last = self.ints(_LAST if end is None else end) if end is None or isinstance(end, int) else end
        return self.op("Slice", [x, first, last, self.ints(axis)])

    def split(self, x: Value, sizes: Sequence[int], axis: int) -> tuple[Value, ...]:
        """Cut x along an axis into pieces of these sizes."""
        return self.ops("Split", [x, self.ints(*sizes)], len(sizes), {"axis": axis})

    def silu(self, x: Value) -> Value:
        """x · sigmoid(x)."""
        return self.op("QuickGelu", [x], {"alpha": 1.0}, domain=MICROSOFT)

    def finish(self) -> ir.Graph:
        """The finished graph."""
        opsets = OPSETS if self._outer is None else {}
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=dict(opsets),
            name=self._name,
        )

    def _free_name(self) -> str:
        return f"v{next(self._numbers)}"


class _Array(ir.Tensor[NDArray[np.generic]]):
    """A tensor that is written as bytes are: the library's own way, numpy's, loses the error number of a full disk."""

    def tofile(self, file: Any) -> None:
        """Write the bytes to a binary file; nothing is copied."""
        file.write(self.numpy().reshape(-1).view(np.uint8).data)
