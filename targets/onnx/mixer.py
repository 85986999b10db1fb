# SPDX-License-Identifier: Apache-2.0
"""Lowers the Mamba-1 mixer with SSM experts (`mossquant.model.mixer`) to ONNX.

All SSM experts are computed, stacked: one matmul for every x_proj (experts along the outputs), gates on what it gives,
one matmul for every dt_proj (experts along the inputs, each padded to whole blocks so that no block belongs to two).
The gate of an expert that was not chosen is 0, and so are its codes.

The scan runs over the state as [B, N, E]: there the broadcasts run along E, which is twice as fast as along N. Outside
it is [B, E, N] like everywhere. Letters as in `mossquant.model`.
"""

from collections.abc import Mapping

import onnx_ir as ir

from mossquant.model.mixer import Mixer
from mossquant.model.tensors import TensorSpec
from mossquant.targets.onnx.graph import MICROSOFT, Attribute, Graph, Value
from mossquant.targets.onnx.initializers import Initializers
from mossquant.targets.onnx.routing import route
from mossquant.targets.onnx.shapes import Shapes


def lower_mixer(
    graph: Graph,
    initializers: Initializers,
    shapes: Shapes,
    specs: list[TensorSpec],
    u: Value,
    x: Value,
    states: Mapping[str, Value],
) -> tuple[Value, dict[str, Value]]:
    """Append one mixer.

    Args:
        graph: the model's graph.
        initializers: where its weights are put into the graph.
        shapes: batch and length at run time.
        specs: the tensors of this mixer.
        u: [B · T, D], the normed block input.
        x: [B · T, D], the residual stream.
        states: every state array before the call, by name.

    Returns:
        The residual stream with what the mixer adds to it, and the mixer's own states after the last token.
    """
    config = initializers.weights.config
    E, N, R = config.d_inner, config.state_size, config.time_step_rank
    layer = specs[0].layer
    assert layer is not None
    X = config.ssm_experts(layer)
    conv_spec, ssm_spec = Mixer.states(config, layer)
    of = {role: [spec.name for spec in specs if spec.role == f"ssm.{role}"] for role in _ROLES}

    inner, z = graph.split(initializers.linear(graph, u, of["in_proj"]), [E, E], 1)
    steps = shapes.steps(graph, inner)
    inner, conv = _convolve(graph, initializers, of, steps, states[conv_spec.name], config.conv_kernel)
    projected = _linears(graph, initializers, inner, of["expert.x_proj"])
    if X > 1:
        gates = route(graph, initializers, shapes, u, of["router"][0], config.ssm_chosen(layer))
        column = graph.op("Unsqueeze", [gates, graph.ints(-1)])
        mixed = graph.op("Mul", [graph.reshape(projected, -1, X, R + 2 * N), column])
        delta, bc = graph.split(mixed, [R, 2 * N], 2)
        bc = graph.op("ReduceSum", [bc, graph.ints(1)], {"keepdims": 0})
        dt = _dt(graph, initializers, of, delta, gates)
    else:
        delta, bc = graph.split(projected, [R, 2 * N], 2)
        bias = initializers.vector(graph, of["expert.dt_bias"][0])
        dt = initializers.linear(graph, delta, of["expert.dt_proj"], bias=bias)
    y, ssm = _scan(graph, initializers, shapes, of, inner, softplus(graph, dt), bc, states[ssm_spec.name])
    gated = graph.op("Mul", [graph.reshape(y, -1, E), graph.silu(z)])
    out = initializers.linear(graph, gated, of["out_proj"])
    return graph.op("Add", [x, out]), {conv_spec.name: conv, ssm_spec.name: ssm}


_ROLES = (
    "in_proj", "conv", "conv_bias", "router", "expert.x_proj", "expert.dt_proj", "expert.dt_bias", "A_log", "D",
    "out_proj",
)  # fmt: skip


def _convolve(
    graph: Graph, initializers: Initializers, of: dict[str, list[str]], x: Value, window: Value, W: int
) -> tuple[Value, Value]:
    """x [B, T, E], window [B, E, W−1] → silu(conv(x)) [B, T, E], window.

    A sum over the taps: at one token onnxruntime's Conv takes seven times as long, at many no less.
    """
    taps = initializers.decoded(graph, of["conv"])
    full = x
    if W > 1:
        full = graph.op("Concat", [graph.op("Transpose", [window], {"perm": [0, 2, 1]}), x], {"axis": 1})
        window = graph.op("Transpose", [graph.slice(full, 1 - W, None, 1)], {"perm": [0, 2, 1]})
    else:
        window = graph.op("Identity", [window])
    terms = []
    for tap in range(W):
        part = full if W == 1 else graph.slice(full, tap, tap - W + 1 or None, 1)
        terms.append(graph.op("Mul", [part, graph.slice(taps, tap, tap + 1, 0)]))
    total = graph.op("Sum", [*terms, initializers.vector(graph, of["conv_bias"][0])])
    return graph.silu(total), window


def _linears(graph: Graph, initializers: Initializers, x: Value, names: list[str]) -> Value:
    """Every expert's linear on the same input, their outputs side by side."""
    parts = [initializers.linear(graph, x, run) for run in initializers.runs(names)]
    return parts[0] if len(parts) == 1 else graph.op("Concat", parts, {"axis": -1})


def _dt(graph: Graph, initializers: Initializers, of: dict[str, list[str]], delta: Value, gates: Value) -> Value:
    """Gated δ [B · T, X, R] and gates [B · T, X] → Σ_e dt_proj[e](δ_e) + g_e · bias_e, [B · T, E]."""
    config = initializers.weights.config
    R, names = config.time_step_rank, of["expert.dt_proj"]
    biases = [initializers.decoded(graph, run) for run in initializers.runs(of["expert.dt_bias"])]
    bias = biases[0] if len(biases) == 1 else graph.op("Concat", biases, {"axis": 0})
    total: Value | None = None
    first = 0
    for run in initializers.runs(names):
        own = delta if len(run) == len(names) else graph.slice(delta, first, first + len(run), 1)
        width = initializers.padded_inputs(run[0]) if len(run) > 1 else R
        if width > R:
            own = graph.op("Pad", [own, graph.ints(0, 0, 0, 0, 0, width - R)])
        part = initializers.linear(graph, graph.reshape(own, -1, len(run) * width), run, stack="inputs")
        total = part if total is None else graph.op("Add", [total, part])
        first += len(run)
    return graph.op("Gemm", [gates, bias, total])


def softplus(graph: Graph, x: Value) -> Value:
    """log(1 + exp(x)) from vectorized kernels: onnxruntime's Softplus goes value by value and takes four times longer.

    With e = exp(x) and u = 1 + e rounded, log(1 + e) = log(u) + (e − (u − 1)) / u to within rounding, even for tiny e.
    """
    one = graph.number(1.0)
    e = graph.op("Exp", [graph.op("Min", [x, graph.number(80.0)])])
    u = graph.op("Add", [e, one])
    lost = graph.op("Sub", [e, graph.op("Sub", [u, one])])
    exact = graph.op("Add", [graph.op("Log", [u]), graph.op("Div", [lost, u])])
    return graph.op("Max", [exact, x])


def _scan(
    graph: Graph,
    initializers: Initializers,
    shapes: Shapes,
    of: dict[str, list[str]],
    x: Value,
    dt: Value,
    bc: Value,
    ssm: Value,
) -> tuple[Value, Value]:
    """x [B, T, E], Δ [..., E] and B|C [..., 2 N] of B · T rows, state [B, E, N] → y [B, T, 1, E], state."""
    config = initializers.weights.config
    E, N = config.d_inner, config.state_size
    A_log = graph.op("Transpose", [initializers.decoded(graph, of["A_log"])], {"perm": [1, 0]})
    A = graph.op("Neg", [graph.op("Exp", [A_log])])
    dt, x = shapes.rows(graph, dt), shapes.rows(graph, x)
    Bm, Cm = graph.split(shapes.columns(graph, bc), [N, N], 2)
    body = graph.inner(f"scan{of['D'][0].split('.')[2]}")
    h = body.input(None, ir.DataType.FLOAT, ["B", N, E])
    step_dt, step_dx = (body.input(None, ir.DataType.FLOAT, ["B", 1, E]) for _ in range(2))
    step_B, step_C = (body.input(None, ir.DataType.FLOAT, ["B", N, 1]) for _ in range(2))
    decayed = body.op("Mul", [body.op("Exp", [body.op("Mul", [step_dt, A])]), h])
    after = body.op("Add", [decayed, body.op("Mul", [step_dx, step_B])])
    read = body.op("FusedMatMul", [step_C, after], {"transA": 1}, domain=MICROSOFT)
    body.output(after, ir.DataType.FLOAT, ["B", N, E])
    body.output(read, ir.DataType.FLOAT, ["B", 1, E])
    start = graph.op("Transpose", [ssm], {"perm": [0, 2, 1]})
    attributes: dict[str, Attribute] = {
        "body": body.finish(),
        "num_scan_inputs": 4,
        "scan_input_axes": [1] * 4,
        "scan_output_axes": [1],
    }
    end, y = graph.ops("Scan", [start, dt, graph.op("Mul", [dt, x]), Bm, Cm], 2, attributes)
    y = graph.op("Add", [y, graph.op("Mul", [x, initializers.vector(graph, of["D"][0])])])
    return y, graph.op("Transpose", [end], {"perm": [0, 2, 1]})
