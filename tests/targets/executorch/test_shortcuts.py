# SPDX-License-Identifier: Apache-2.0
"""The shorter ways through ExecuTorch come to the same program."""

import random
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lowered import Workshop
from torch.fx import Graph, GraphModule

from mossquant.targets.executorch import lower
from mossquant.targets.executorch.shortcuts import shortcuts
from mossquant.targets.export import export


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("mamba", None), pytest.param("wide", "by expert", marks=pytest.mark.slow)],
)
def test_the_same_bytes(
    workshop: Workshop, model: str, recipe: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = workshop(model, recipe, target="executorch")
    monkeypatch.setattr(lower, "shortcuts", nullcontext)
    artifact = export(lowered.checkpoint, tmp_path / "the-long-way", target="executorch")
    assert artifact.program("executorch").read_bytes() == lowered.program.read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_the_same_partitions(seed: int) -> None:
    """Of random graphs, where some nodes stay outside and some belong together."""
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    draw = random.Random(seed)
    graph = Graph()
    nodes = [graph.placeholder(f"input_{number}") for number in range(3)]
    for _ in range(40):
        nodes.append(graph.call_function(torch.add, (draw.choice(nodes[-8:]), draw.choice(nodes))))
    graph.output(tuple(nodes[-3:]))
    inside = [node for node in nodes[3:] if draw.random() < 0.7]
    draw.shuffle(inside)
    groups = [inside[:3], inside[3:5]]
    module = GraphModule(torch.nn.Module(), graph)
    support = SimpleNamespace(is_node_supported=lambda _, node: node in inside)

    def proposed() -> list[set[torch.fx.Node]]:
        partitioner = group_partitioner.GroupBasedPartitioner(
            module, support, node_groups=groups, allows_single_node_partition=True
        )
        return [set(partition.nodes) for partition in partitioner.propose_partitions()]

    expected = proposed()
    with shortcuts():
        assert proposed() == expected
    assert len(expected) > 1


def test_nothing_stays_replaced() -> None:
    """Also where the lowering fails."""
    from executorch.exir.backend.canonical_partitioners.group_partitioner import GroupBasedPartitioner

    before = GraphModule.recompile, GroupBasedPartitioner._merge_partitions
    with shortcuts():
        assert GraphModule.recompile is not before[0]
    with suppress(ZeroDivisionError), shortcuts():
        raise ZeroDivisionError
    assert before == (GraphModule.recompile, GroupBasedPartitioner._merge_partitions)


def test_a_graph_is_compiled_when_it_is_called() -> None:
    """And its Python is that of the graph as it then is."""
    graph = Graph()
    x = graph.placeholder("x")
    output = graph.output(graph.call_function(torch.add, (x, x)))
    with shortcuts():
        module = GraphModule(torch.nn.Module(), graph)
    output.replace_input_with(output.args[0], x)
    assert module(torch.tensor(3)) == 3
