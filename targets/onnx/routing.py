# SPDX-License-Identifier: Apache-2.0
"""Lowers top-k routing (`mossquant.model.routing`) to ONNX, in fp32."""

from mossquant.targets.onnx.graph import Graph, Value
from mossquant.targets.onnx.initializers import Initializers
from mossquant.targets.onnx.shapes import Shapes


def route(graph: Graph, initializers: Initializers, shapes: Shapes, u: Value, router: str, chosen: int) -> Value:
    """Gates [B · T, X] of rows u [B · T, D]: softmax over the `chosen` largest logits, zero elsewhere."""
    experts = initializers.weights.specs[router].matrix_shape[0]
    logits = initializers.linear(graph, u, [router])
    if chosen == experts:
        return graph.op("Softmax", [logits], {"axis": -1})
    largest, which = graph.ops("TopK", [logits, graph.ints(chosen)], 2, {"axis": -1})
    gates = graph.op("Softmax", [largest], {"axis": -1})
    return graph.op("ScatterElements", [shapes.zeros(experts), which, gates], {"axis": 1})
