# SPDX-License-Identifier: Apache-2.0
"""Artifacts that an earlier commit wrote open, verify and run: people keep last month's to compare with."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from kept import KEPT, KEPT_ONNX, KEPT_PTE
from onnx import helper

from mossquant.eval.info import info
from mossquant.eval.open import open_runner
from mossquant.eval.verify import verify
from mossquant.text.text import Text

TEXT = Text.of("text", b"def first(value):\n    return value + 1\n\n\n" * 20)


def _opens_verifies_and_runs(program: Path) -> None:
    assert info(program).weights == "int4"
    assert verify(KEPT / "int4", [program], weights_only=True).failures() == []
    assert verify(KEPT / "int4", [program], text=TEXT, positions=20, stream=128, threads=1).failures() == []
    runner = open_runner(program, threads=1)
    logits, _ = runner(np.arange(5)[None], runner.initial_state(), logits="all")
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("program", [KEPT_ONNX, KEPT_PTE], ids=["onnx", "executorch"])
def test_a_kept_artifact(program: Path) -> None:
    _opens_verifies_and_runs(program)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node needs, those of its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)


def _reorder(graph: onnx.GraphProto, random: np.random.Generator) -> None:
    """Put the nodes in another order in which each comes after those that it needs."""
    waiting, nodes = list(graph.node), list[onnx.NodeProto]()
    missing = {name for node in waiting for name in node.output}
    while waiting:
        ready = [node for node in waiting if missing.isdisjoint(_read(node))]
        node = ready[random.integers(len(ready))]
        waiting.remove(node)
        nodes.append(node)
        missing -= set(node.output)
    del graph.node[:]
    graph.node.extend(nodes)


def test_an_onnx_with_nodes_reordered_and_identities_added(tmp_path: Path) -> None:
    """As another release would have written it: in front of codes, of a scale's cast, and of a value at run time."""
    proto = onnx.load(KEPT_ONNX)
    before = [node.output[0] for node in proto.graph.node]
    named = next(node for node in proto.graph.node if node.name == "layers.0.mixer.in_proj")
    cast = next(node for node in proto.graph.node if node.input[0] == "layers.1.mixer.D.scale")
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    for number, (node, at) in enumerate(((named, 1), (cast, 0), (add, 0))):
        proto.graph.node.append(helper.make_node("Identity", [node.input[at]], [f"same{number}"]))
        node.input[at] = f"same{number}"
    _reorder(proto.graph, np.random.default_rng(0))
    assert [node.output[0] for node in proto.graph.node][: len(before)] != before
    prop = proto.metadata_props[0]
    prop.value = json.dumps(json.loads(prop.value) | {"release": "0.0.9"})
    onnx.save(proto, tmp_path / "model.onnx")
    shutil.copy(KEPT / "artifact" / "tokenizer.json", tmp_path)
    _opens_verifies_and_runs(tmp_path / "model.onnx")
