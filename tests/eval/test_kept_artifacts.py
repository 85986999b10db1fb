# SPDX-License-Identifier: Apache-2.0
"""Artifacts that an earlier commit wrote open, verify and run: people keep last month's to compare with."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from kept import KEPT, KEPT_ONNX, KEPT_PTE
from onnx import helper

from mossquant.eval import parity as parity_module
from mossquant.eval.info import info
from mossquant.eval.open import OpenModel, open_model, open_runner
from mossquant.eval.verify import verify
from mossquant.runner import Floats, LogitsWanted, Runner, State, Tokens
from mossquant.targets.onnx.metadata import graphs
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


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_what_an_older_onnx_needs_of_a_session(tmp_path: Path, activations: str) -> None:
    """Its scales are folded and its codes are not, which is wrong without folding where activations are int8."""
    proto = onnx.load(KEPT_ONNX)
    every = (node for graph in graphs(proto.graph) for node in graph.node)
    for node in every if activations == "fp32" else ():
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(proto, tmp_path / "model.onnx")
    shutil.copy(KEPT / "artifact" / "tokenizer.json", tmp_path)
    zero = {"int8": "constant folding on, else logits are zero: export again"}
    slow = "constant folding and prepacking on, else right but slow"
    assert dict(info(tmp_path / "model.onnx").facts)["session"] == zero.get(activations, slow)
    runner = open_runner(tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokens, state = np.arange(5)[None], runner.initial_state()
    found = session.run(["logits"], {"tokens": tokens, "first_logit": np.array([-1]), **runner.read(state)})[0]
    assert (found == 0).all() == (activations == "int8")


class Forgetful:
    """Does not carry its state from call to call."""

    def __init__(self, inner: Runner) -> None:
        self.inner, self.info, self.initial_state = inner, inner.info, inner.initial_state
        self.copy, self.read, self.write = inner.copy, inner.read, inner.write

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        return self.inner(tokens, state, logits=logits)[0], self.initial_state(tokens.shape[0])


@pytest.mark.parametrize("program", [KEPT_ONNX, KEPT_PTE], ids=["onnx", "executorch"])
def test_an_artifact_that_drops_its_state_fails(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*arguments: Any, **options: Any) -> OpenModel:
        opened = open_model(*arguments, **options)
        return replace(opened, runner=Forgetful(opened.runner)) if opened.path == str(program) else opened

    monkeypatch.setattr(parity_module, "open_model", forgetful)
    report = verify(KEPT / "int4", [program], text=TEXT, positions=20, stream=128, threads=1)
    failed = {check.name.partition(":")[0] for check in report.artifacts[0].checks if not check.passed}
    assert failed >= {"one step", "token by token against one call", "split against one call"}
