# SPDX-License-Identifier: Apache-2.0
"""Lowers a whole model to one ONNX graph that serves prefill and decode, with the state as inputs and outputs.

Inputs and outputs are those of `mossquant.targets.onnx.ports`. Letters as in `mossquant.model`.

Built by hand and not from `mossquant.targets.program`: a decode step branches on the chosen experts, codes stay in
onnxruntime's own operators, and one graph holds every batch and length, none of which an exported program can say.
"""

import onnx_ir as ir

from mossquant.checkpoint.weights import Weights as Source
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.targets.onnx.graph import IR_VERSION, Graph, Value
from mossquant.targets.onnx.mixer import lower_mixer
from mossquant.targets.onnx.mlp import lower_mlp
from mossquant.targets.onnx.ports import FIRST_LOGIT, LOGITS, STATE_OUT, TOKENS
from mossquant.targets.onnx.shapes import Shapes
from mossquant.targets.onnx.weights import Progress, Weights

__all__ = ["lower"]


def lower(source: Source, specs: list[TensorSpec], progress: Progress | None = None) -> tuple[ir.Model, int]:
    """The model of `source`, its weights not yet read, and the bytes of its weights.

    Args:
        source: the tensors.
        specs: what they are, `mossquant.model.mossnet.tensor_specs` of the config.
        progress: called when a weight is read, which is when the model is written.
    """
    config = source.config
    graph, weights = Graph("mossnet"), Weights(source, progress)
    tokens = graph.input(TOKENS, ir.DataType.INT64, ["B", "T"])
    first_logit = graph.input(FIRST_LOGIT, ir.DataType.INT64, [1])
    carried_specs = state_specs(config)
    states = {spec.name: graph.input(spec.name, ir.DataType.FLOAT, ["B", *spec.shape]) for spec in carried_specs}
    after: dict[str, Value] = {}
    shapes = Shapes(graph, tokens)
    of_role = {spec.role: spec.name for spec in specs if spec.layer is None}
    x = weights.table(graph, tokens, of_role["embedding"])
    for i in range(config.num_hidden_layers):
        own = [spec for spec in specs if spec.layer == i]
        norms = {spec.role: spec.name for spec in own}
        out, carried = lower_mixer(graph, weights, shapes, own, _norm(graph, weights, x, norms["ssm.norm"]), states)
        x, after = graph.op("Add", [x, out]), after | carried
        if config.mlp_experts(i):
            x = lower_mlp(graph, weights, shapes, own, _norm(graph, weights, x, norms["mlp.norm"]), x)
    wanted = graph.slice(shapes.steps(graph, x), first_logit, None, 1)
    head = of_role.get("head", of_role["embedding"])
    logits = weights.linear(graph, _norm(graph, weights, wanted, of_role["norm_f"]), [head])
    graph.output(logits, ir.DataType.FLOAT, ["B", "positions", config.vocab_size], LOGITS)
    for spec in carried_specs:
        graph.output(after[spec.name], ir.DataType.FLOAT, ["B", *spec.shape], spec.name + STATE_OUT)
    model = ir.Model(graph.finish(), ir_version=IR_VERSION, producer_name="mossquant")
    return model, weights.stored_bytes


def _norm(graph: Graph, weights: Weights, x: Value, name: str) -> Value:
    """RMSNorm in the shape that onnxruntime fuses into one kernel."""
    square = graph.op("Pow", [x, graph.number(2.0)])
    mean = graph.op("ReduceMean", [square, graph.ints(-1)], {"keepdims": 1})
    root = graph.op("Sqrt", [graph.op("Add", [mean, graph.number(weights.source.config.rms_norm_eps)])])
    return graph.op("Mul", [graph.op("Div", [x, root]), weights.vector(graph, name)])
