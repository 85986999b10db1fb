# SPDX-License-Identifier: Apache-2.0
"""Lowers a whole model to one ONNX graph that serves prefill and decode, with the state as inputs and outputs.

Inputs and outputs are those of `mossquant.targets.onnx.ports`. Letters as in `mossquant.model`.

Built by hand and not from `mossquant.targets.program`: a decode step branches on the chosen experts, codes stay in
onnxruntime's own operators, and one graph holds every batch and length, none of which an exported program can say.
"""

from collections.abc import Callable

import onnx_ir as ir

from mossquant.checkpoint.weights import Weights
from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec, Use, outside_blocks
from mossquant.progress import Progress
from mossquant.targets.onnx.graph import IR_VERSION, Graph, Value
from mossquant.targets.onnx.initializers import Initializers, Scales
from mossquant.targets.onnx.mixer import lower_mixer
from mossquant.targets.onnx.mlp import lower_mlp
from mossquant.targets.onnx.ports import FIRST_LOGIT, LOGITS, STATE_OUT, TOKENS, state_shape
from mossquant.targets.onnx.shapes import Shapes

BLOCKS: dict[type[Block], Callable[..., tuple[Value, dict[str, Value]]]] = {Mixer: lower_mixer, Mlp: lower_mlp}
"""How each kind of block is lowered.

    (graph, initializers, shapes, specs, u, x, states) → x with what the block adds to it, and its own states

of rows u [B · T, D] normed, the residual stream x [B · T, D], the block's tensors and every state array by name.
"""


def lower(
    weights: Weights, specs: list[TensorSpec], progress: Progress | None = None, scales: Scales = "folded"
) -> tuple[ir.Model, int]:
    """The model of `weights`, which are not yet read, and the bytes of its initializers.

    Args:
        weights: the tensors.
        specs: what they are, `mossquant.model.mossnet.tensor_specs` of the config.
        progress: called when a weight is read, which is when the model is written.
        scales: how those of matmuls are stored.
    """
    config = weights.config
    graph, initializers = Graph("mossnet"), Initializers(weights, progress, scales)
    tokens = graph.input(TOKENS, ir.DataType.INT64, ["B", "T"])
    first_logit = graph.input(FIRST_LOGIT, ir.DataType.INT64, [1])
    carried_specs = state_specs(config)
    states = {
        spec.name: graph.input(spec.name, ir.DataType.FLOAT, state_shape(spec, out=False)) for spec in carried_specs
    }
    after: dict[str, Value] = {}
    shapes = Shapes(graph, tokens)
    outer = outside_blocks(specs)
    x = initializers.table(graph, tokens, outer[Use.TABLE].name)
    for layer, kind in blocks_of(config):
        norm, *own = kind.specs(config, layer)
        u = _norm(graph, initializers, x, norm.name)
        x, carried = BLOCKS[kind](graph, initializers, shapes, own, u, x, states)
        after |= carried
    wanted = graph.slice(shapes.steps(graph, x), first_logit, None, 1)
    wanted = _norm(graph, initializers, wanted, outer[Use.NORM].name)
    logits = initializers.linear(graph, wanted, [outer[Use.LINEAR].name])
    graph.output(logits, ir.DataType.FLOAT, ["B", "positions", config.vocab_size], LOGITS)
    for spec in carried_specs:
        graph.output(after[spec.name], ir.DataType.FLOAT, state_shape(spec, out=True), spec.name + STATE_OUT)
    model = ir.Model(graph.finish(), ir_version=IR_VERSION, producer_name="mossquant")
    return model, initializers.stored_bytes


def _norm(graph: Graph, initializers: Initializers, x: Value, name: str) -> Value:
    """RMSNorm in the shape that onnxruntime fuses into one kernel."""
    square = graph.op("Pow", [x, graph.number(2.0)])
    mean = graph.op("ReduceMean", [square, graph.ints(-1)], {"keepdims": 1})
    root = graph.op("Sqrt", [graph.op("Add", [mean, graph.number(initializers.weights.config.rms_norm_eps)])])
    return graph.op("Mul", [graph.op("Div", [x, root]), initializers.vector(graph, name)])
