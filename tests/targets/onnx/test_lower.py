# SPDX-License-Identifier: Apache-2.0
"""The graph itself: valid, made of old operators, folded when it is loaded, and sparse when it runs."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from lowered import MODELS, Lowered, Workshop

from mossquant.model.routing import Routing
from mossquant.targets.onnx.graph import Graph
from mossquant.targets.onnx.metadata import initializers
from mossquant.targets.onnx.mixer import softplus

EVERY = [(model, recipe) for model in MODELS for recipe in (None, "int4")] + [("wide", "int8"), ("wide", "mixed")]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


@pytest.mark.parametrize(("model", "recipe"), EVERY)
def test_valid_and_of_old_operators(workshop: Workshop, model: str, recipe: str | None) -> None:
    proto = workshop(model, recipe).proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {one.domain: one.version for one in proto.opset_import} == {"": 21, "com.microsoft": 1}
    assert proto.ir_version == 10


@pytest.mark.parametrize(("model", "recipe"), EVERY)
def test_weights_are_ready_when_it_is_loaded(
    workshop: Workshop, tmp_path: Path, model: str, recipe: str | None
) -> None:
    """No scale is cast or spread, and no small tensor decoded, at run time."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(workshop(model, recipe).program), options, providers=["CPUExecutionProvider"])
    proto = onnx.load(tmp_path / "optimized.onnx")
    types = {tensor.name: tensor.data_type for tensor in initializers(proto.graph)}
    floats, packed = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    for node in _nodes(proto.graph):
        found = {types[name] for name in node.input if name in types}
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            assert found == {floats, packed}
        else:
            assert found <= {floats, onnx.TensorProto.INT64}, node
        assert not all(name in types for name in node.input), node
        assert node.op_type not in ("Expand", "Neg"), node


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_levels_of_the_matmuls(workshop: Workshop, recipe: str) -> None:
    for activations, level in ((None, 4), ("int8", 4), ("fp32", 0)):
        proto = workshop("wide", recipe, activations).proto()
        levels = [
            {one.name: one for one in node.attribute}.get("accuracy_level", onnx.AttributeProto(i=0)).i
            for node in _nodes(proto.graph)
            if node.op_type == "MatMulNBits"
        ]
        assert len(levels) == 2 * 4 + (4 + 3) * 3 + 1
        assert set(levels) == {level}


def _expert_matmuls(lowered: Lowered, folder: Path, tokens: np.ndarray, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the matmuls of MLP experts that onnxruntime's profile of one run lists."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    session = ort.InferenceSession(str(lowered.program), options, providers=["CPUExecutionProvider"])
    session.run(None, {"tokens": tokens, "first_logit": np.array([-1]), **arrays})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [
        event["name"].removesuffix("_kernel_time")
        for event in events
        if event["name"].endswith("_kernel_time")
        and event["args"]["op_name"] in ("MatMulNBits", "FusedMatMul")
        and ".mlp.experts." in event["name"]
    ]


@pytest.mark.parametrize("model", ["wide", "experts", "pruned"])
def test_a_step_runs_the_chosen_mlp_experts_and_no_other(workshop: Workshop, tmp_path: Path, model: str) -> None:
    lowered = workshop(model, "int4")
    config, reference = lowered.config, lowered.reference()
    tokens, state = lowered.tokens(1, 6), reference.initial_state(1)
    seen, routings = set(), dict[str, Routing]()

    def watch(name: str, routing: Routing) -> Routing:
        routings[name] = routing
        return routing

    reference._forward = replace(reference._forward, reroute=watch)
    for time in range(tokens.shape[1]):
        now, arrays = tokens[:, time : time + 1], reference.read(state)
        _, state = reference(now, state)
        expected = []
        for layer in range(config.num_hidden_layers):
            chosen = _chosen(routings, layer, config.mlp_experts(layer), config.mlp_chosen(layer))
            seen |= {(layer, e) for e in chosen}
            expected += [f"layers.{layer}.mlp.experts.{e}.{which}" for e in chosen for which in ("w1", "w3", "w2")]
        assert sorted(_expert_matmuls(lowered, tmp_path, now, arrays)) == sorted(expected)
    if model != "pruned":
        assert len(seen) > config.num_hidden_layers * config.num_mlp_experts_per_tok, (
            "every step chose the same experts"
        )


def _chosen(routings: dict[str, Routing], layer: int, experts: int, chosen: int) -> list[int]:
    if experts < 2:
        return list(range(experts))
    logits = routings[f"layers.{layer}.mlp.router"].logits
    assert logits is not None
    return sorted(np.argsort(logits.numpy().reshape(-1))[::-1][:chosen].tolist())


def test_softplus_is_exact_at_both_ends() -> None:
    """The vectorized form keeps fp32's relative accuracy for tiny and for large inputs."""
    graph = Graph("softplus")
    x = graph.input("x", ir.DataType.FLOAT, ["n"])
    graph.output(softplus(graph, x), ir.DataType.FLOAT, ["n"], "y")
    model = ir.to_proto(ir.Model(graph.finish(), ir_version=10))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.concatenate([np.linspace(-86, 200, 100_001), -np.logspace(-8, 1, 10_001), np.logspace(-8, 1, 10_001)])
    inputs = values.astype(np.float32)
    expected = np.logaddexp(0, inputs.astype(np.float64))
    np.testing.assert_allclose(session.run(None, {"x": inputs})[0], expected, rtol=1e-6)
