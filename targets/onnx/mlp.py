# SPDX-License-Identifier: Apache-2.0
"""Lowers the SwiGLU experts (`mossquant.model.mlp`) to ONNX: one `If` per expert, with its weights in the branch.

A branch gathers the rows that chose its expert, runs w1, w3 and w2 on them and adds the gated result to the residual
stream; where no row of the call chose the expert, nothing of it is computed. Letters as in `mossquant.model`.
"""

from collections.abc import Mapping

import onnx_ir as ir

from mossquant.model.tensors import TensorSpec
from mossquant.targets.onnx.graph import Graph, Value
from mossquant.targets.onnx.initializers import Initializers
from mossquant.targets.onnx.routing import route
from mossquant.targets.onnx.shapes import Shapes


def lower_mlp(
    graph: Graph,
    initializers: Initializers,
    shapes: Shapes,
    specs: list[TensorSpec],
    u: Value,
    x: Value,
    states: Mapping[str, Value],
) -> tuple[Value, dict[str, Value]]:
    """Append one channel mixer: u [B · T, D] normed, x [B · T, D] the residual stream → x + mlp(u), and no states."""
    config = initializers.weights.config
    layer = specs[0].layer
    assert layer is not None
    X, D = config.mlp_experts(layer), config.hidden_size
    names = {(spec.expert, spec.role): spec.name for spec in specs}
    if X == 1:
        return graph.op("Add", [x, _expert(graph, initializers, u, 0, names)]), {}
    gates = route(graph, initializers, shapes, u, names[None, "mlp.router"], config.mlp_chosen(layer))
    largest = graph.op("ReduceMax", [gates, graph.ints(0)], {"keepdims": 0})
    used = graph.split(graph.op("Cast", [largest], {"to": ir.DataType.BOOL}), [1] * X, 0)
    columns = graph.split(gates, [1] * X, 1)
    for e in range(X):
        then, skip = graph.inner(f"expert{layer}.{e}"), graph.inner(f"skip{layer}.{e}")
        rows = then.op("Gather", [then.op("NonZero", [columns[e]]), then.index(0)], {"axis": 0})
        own = _expert(then, initializers, then.op("Gather", [u, rows], {"axis": 0}), e, names)
        own = then.op("Mul", [own, then.op("Gather", [columns[e], rows], {"axis": 0})])
        where = then.op("Unsqueeze", [rows, then.ints(-1)])
        then.output(then.op("ScatterND", [x, where, own], {"reduction": "add"}), ir.DataType.FLOAT, ["R", D])
        skip.output(skip.op("Identity", [x]), ir.DataType.FLOAT, ["R", D])
        x = graph.op("If", [used[e]], {"then_branch": then.finish(), "else_branch": skip.finish()})
    return x, {}


def _expert(
    graph: Graph, initializers: Initializers, rows: Value, e: int, names: dict[tuple[int | None, str], str]
) -> Value:
    """w2(silu(w1(rows)) ⊙ w3(rows))."""
    w1, w3, w2 = (names[e, f"mlp.expert.{which}"] for which in ("w1", "w3", "w2"))
    hidden = graph.op(
        "Mul", [graph.silu(initializers.linear(graph, rows, [w1])), initializers.linear(graph, rows, [w3])]
    )
    return initializers.linear(graph, hidden, [w2])
