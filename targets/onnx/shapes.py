# SPDX-License-Identifier: Apache-2.0
"""Batch and length at run time, as shape tensors that all blocks share. Between blocks a value is rows [B · T, …]."""

import numpy as np
import onnx_ir as ir

from mossquant.targets.onnx.graph import Graph, Value


class Shapes:
    """Shape tensors made once from tokens [B, T]."""

    def __init__(self, graph: Graph, tokens: Value) -> None:
        self._graph = graph
        self._tokens = graph.op("Shape", [tokens])
        self._cached: dict[tuple[int, ...], Value] = {}
        self._zeros: dict[int, Value] = {}

    def steps(self, graph: Graph, x: Value) -> Value:
        """[B · T, n] → [B, T, n]."""
        return graph.op("Reshape", [x, self._shape(-1)])

    def rows(self, graph: Graph, x: Value) -> Value:
        """[…, n] → [B, T, 1, n]."""
        return graph.op("Reshape", [x, self._shape(1, -1)])

    def columns(self, graph: Graph, x: Value) -> Value:
        """[…, n] → [B, T, n, 1]."""
        return graph.op("Reshape", [x, self._shape(-1, 1)])

    def zeros(self, width: int) -> Value:
        """Zeros [B · T, width]."""
        if width not in self._zeros:
            count = self._graph.op("ReduceProd", [self._tokens], {"keepdims": 1})
            shape = self._graph.op("Concat", [count, self._graph.ints(width)], {"axis": 0})
            value = ir.tensor(np.zeros(1, np.float32))
            self._zeros[width] = self._graph.op("ConstantOfShape", [shape], {"value": value})
        return self._zeros[width]

    def _shape(self, *after: int) -> Value:
        if after not in self._cached:
            self._cached[after] = self._graph.op("Concat", [self._tokens, self._graph.ints(*after)], {"axis": 0})
        return self._cached[after]
