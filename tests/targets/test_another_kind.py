# SPDX-License-Identifier: Apache-2.0
"""A kind of block that is not ours, with three states of which one grows: the model, a checkpoint and .onnx hold it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import FORMS_FLOAT32, ONNX_FP32
from lowered import read_back, relative
from small import SMALL, random_model, random_tokens, write_model
from torch import Tensor, nn

from mossquant.errors import InputError
from mossquant.eval.one_step import one_step
from mossquant.model import blocks
from mossquant.model.block import Block
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.tensors import StateSpec, TensorSpec, Use
from mossquant.plan import capabilities
from mossquant.state_file import SavedState, load_state, save_state
from mossquant.targets.export import export
from mossquant.targets.onnx import lower, structure
from mossquant.targets.onnx.graph import Graph, Value
from mossquant.targets.onnx.initializers import Initializers
from mossquant.targets.onnx.runner import OnnxRunner
from mossquant.targets.onnx.shapes import Shapes
from mossquant.targets.torch.runner import TorchRunner

CONFIG = replace(SMALL, hidden_size=32, num_mlp_experts=0, mlp_intermediate_size=0)


class Cache(Block):
    """out = o · Σ_{s≤t} (u_t · k_s) k_s / 100, without softmax; the sum and the last of k are carried for show."""

    kind, norm_name = "cache", "norm3"

    def __init__(self, config: MossNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.k, self.o = (nn.Parameter(torch.empty(config.hidden_size, config.hidden_size)) for _ in range(2))

    @staticmethod
    def present(config: MossNetConfig, layer: int) -> bool:
        return True

    @classmethod
    def own_specs(cls, config: MossNetConfig, layer: int) -> list[TensorSpec]:
        at, shape, use = f"layers.{layer}.cache", (config.hidden_size, config.hidden_size), frozenset({Use.LINEAR})
        return [
            TensorSpec(
                f"backbone.{at}.{name}.weight", shape, f"cache.{name}", layer=layer, site=f"{at}.{name}", use=use
            )
            for name in ("k", "o")
        ]

    @classmethod
    def states(cls, config: MossNetConfig, layer: int) -> list[StateSpec]:
        at, D = f"layers.{layer}.cache", config.hidden_size
        shapes = {"keys": (0, D), "sum": (D,), "last": (1, D)}
        return [
            StateSpec(f"{at}.{name}", shape, f"cache.{name}", 0 if name == "keys" else None)
            for name, shape in shapes.items()
        ]

    def reset_parameters(self, generator: torch.Generator) -> None:
        for parameter in (self.k, self.o):
            parameter.uniform_(-0.2, 0.2, generator=generator)

    def forward(self, u: Tensor, state: Mapping[str, Tensor], run: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        keys, total, last = (spec.name for spec in self.states(self.config, self.layer))
        of_k, of_o = (spec.name for spec in self.own_specs(self.config, self.layer))
        k = run.linear(u, self.value("k", run), of_k)
        every = torch.cat([state[keys], k], 1)
        mixed = torch.tril(u @ every.transpose(1, 2), diagonal=state[keys].shape[1]) @ every * 0.01
        after = {keys: every, total: state[total] + k.sum(1), last: k[:, -1:]}
        return run.linear(mixed, self.value("o", run), of_o), after


def lower_cache(
    graph: Graph,
    initializers: Initializers,
    shapes: Shapes,
    specs: list[TensorSpec],
    u: Value,
    x: Value,
    states: Mapping[str, Value],
) -> tuple[Value, dict[str, Value]]:
    keys, total, last = (spec.name for spec in Cache.states(CONFIG, specs[0].layer or 0))
    k = shapes.steps(graph, initializers.linear(graph, u, [specs[0].name]))
    before = graph.op("Squeeze", [graph.slice(graph.op("Shape", [states[keys]]), 1, 2, 0)])
    every = graph.op("Concat", [states[keys], k], {"axis": 1})
    scores = graph.op("MatMul", [shapes.steps(graph, u), graph.op("Transpose", [every], {"perm": [0, 2, 1]})])
    mixed = graph.op("MatMul", [graph.op("Trilu", [scores, before], {"upper": 0}), every])
    mixed = graph.reshape(graph.op("Mul", [mixed, graph.number(0.01)]), -1, CONFIG.hidden_size)
    added = graph.op("Add", [states[total], graph.op("ReduceSum", [k, graph.ints(1)], {"keepdims": 0})])
    after = {keys: graph.op("Identity", [every]), total: added, last: graph.slice(k, -1, None, 1)}
    return graph.op("Add", [x, initializers.linear(graph, mixed, [specs[1].name])]), after


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(blocks, "KINDS", (*blocks.KINDS, Cache))
    known = capabilities.CAPABILITIES["onnx"]
    monkeypatch.setitem(capabilities.CAPABILITIES, "onnx", replace(known, blocks=(*known.blocks, "cache")))
    monkeypatch.setitem(lower.BLOCKS, Cache, lower_cache)
    monkeypatch.setitem(structure.OPERATORS, "", structure.OPERATORS[""] | {"MatMul", "Squeeze", "Trilu"})
    return write_model(tmp_path / "model", random_model(CONFIG))


def test_it_runs_in_pieces_and_is_carried_between_runtimes(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "app")
    assert read_back(folder, tmp_path / "app").differences == ()
    tokens = random_tokens(CONFIG, 2, 20).numpy()
    here, there = TorchRunner.open(folder), OnnxRunner(tmp_path / "app")
    whole, _ = here(tokens, here.initial_state(2), logits="all")
    arrays = []
    for runner in (here, there):
        state, parts = runner.initial_state(2), []
        for piece in (tokens[:, :7], tokens[:, 7:18], tokens[:, 18:19], tokens[:, 19:]):
            logits, state = runner(piece, state, logits="all")
            parts.append(logits)
        assert np.abs(np.concatenate(parts, 1) - whole).max() <= FORMS_FLOAT32
        arrays.append(runner.read(state))
        assert arrays[-1]["layers.1.cache.keys"].shape == (2, 20, 32)
    for name, array in arrays[0].items():
        assert np.max(relative(arrays[1][name], array)) <= ONNX_FP32, name
    logits, state = here(tokens[:1], here.initial_state(1))
    save_state(tmp_path / "state", here, SavedState(state, logits, 20))
    token = np.array([[3]])
    going_on, _ = there(token, load_state(tmp_path / "state", there).state)
    assert np.abs(going_on - here(token, state)[0]).max() <= FORMS_FLOAT32
    steps = one_step(TorchRunner.open(folder, dtype=torch.float64), there, tokens.flatten(), positions=20)
    assert len(steps.kl) >= 20
    assert not steps.unexplained.any()
    assert steps.state_error.max() <= ONNX_FP32


def test_a_target_that_cannot_lower_it_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"executorch cannot lower cache blocks \(it lowers ssm, mlp\)"):
        export(folder, tmp_path / "app", target="executorch")
