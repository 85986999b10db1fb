# SPDX-License-Identifier: Apache-2.0
"""Lowers a model to one ExecuTorch program: prefill, score and decode over the same constants, delegated to XNNPACK."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mossquant.checkpoint.weights import Weights
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import get_capabilities
from mossquant.progress import Progress
from mossquant.targets.executorch.blocks import Traced, repeated
from mossquant.targets.executorch.matrices import XnnpackMatrices
from mossquant.targets.executorch.packages import check_packages
from mossquant.targets.executorch.program_file import METADATA
from mossquant.targets.executorch.scan import loop, step
from mossquant.targets.executorch.shortcuts import shortcuts
from mossquant.targets.program import Model, Scan

CHUNK = get_capabilities("executorch").limits.max_chunk or 1
"""Most tokens of one call of prefill or score. Memory is planned for so many, so that it is a limit of the file."""

_EXAMPLE = 16
_STAGES = (
    "reading tensors",
    "tracing prefill and score",
    "tracing decode",
    "delegating to XNNPACK",
    "planning memory",
    "writing",
    "written",
)


def lower(
    weights: Weights, specs: list[TensorSpec], metadata: Mapping[str, Any], path: Path, on_stage: Progress | None = None
) -> None:
    """Write the program of a model.

    Args:
        weights: the tensors.
        specs: what they are, `mossquant.model.mossnet.tensor_specs` of the config.
        metadata: what the program is to say about itself.
        path: file to write.
        on_stage: called when a stage begins with its name, how many are done and how many there are; and at the end.
    """
    begins = partial(_begin, on_stage)
    check_packages()
    begins("reading tensors")
    model = Model(weights.config, specs, XnnpackMatrices(weights)).eval()
    programs: dict[str, torch.export.ExportedProgram] = {}
    begins("tracing prefill and score")
    with torch.no_grad(), shortcuts():
        program, module = _traced(model, loop, weights.config)
        for name in ("prefill", "score"):
            programs[name] = repeated(program, module, model, last=name == "prefill")
        begins("tracing decode")
        program, module = _traced(model, step, weights.config)
        programs["decode"] = repeated(program, module, model, last=True)
        _write(programs, {METADATA: json.dumps(metadata, sort_keys=True)}, path, begins)


def _begin(on_stage: Progress | None, name: str) -> None:
    """Say which stage begins."""
    if on_stage is not None:
        on_stage(name, _STAGES.index(name), len(_STAGES) - 1)


def lower_module(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a program with one method, `forward`, for inputs of these very shapes: a part of a model, to be timed."""
    torch._dynamo.reset()
    with torch.no_grad(), shortcuts():
        exported = _edge(torch.export.export(module.eval(), inputs, strict=False))
        _write({"forward": exported}, {}, path, lambda name: None)


def _write(
    programs: Mapping[str, torch.export.ExportedProgram],
    constants: Mapping[str, str],
    path: Path,
    begins: Callable[[str], None],
) -> None:
    """Delegate programs in the edge dialect, and write them."""
    begins("delegating to XNNPACK")
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchBackendConfig

    edge = EdgeProgramManager(dict(programs), dict(constants), _edge_config())
    with _sorted_once():
        edge = edge.to_backend({name: _partitioner() for name in programs})
    begins("planning memory")
    # Every tensor is contiguous: the pass that looks for other orders changes nothing, and runs all delegates.
    edge.compile_config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    # Tables stay codes only if their look-ups are recognised, which this switch is for.
    lowered = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    begins("writing")
    with path.open("wb") as file:
        lowered.write_to_file(file)
    begins("written")


@contextmanager
def _sorted_once() -> Iterator[None]:
    """Meanwhile ExecuTorch sorts a graph after its last delegate is cut out of it, and not the whole graph after each.

    No setting of it says so (1.4.1, which `check_packages` asks for): its own functions are wrapped as long as this
    lasts.
    """
    from executorch.exir.backend import backend_api
    from torch.fx.passes.tools_common import legalize_graph

    cut_out, cut_all = backend_api.create_submodule_from_nodes, backend_api._create_partitions_in_graph_module

    def sorted_after(module: torch.fx.GraphModule, *args: Any, **options: Any) -> dict[str, list[torch.fx.Node]]:
        delegates = cut_all(module, *args, **options)
        targets = {backend: {node.target for node in nodes} for backend, nodes in delegates.items()}
        legalize_graph(module)  # makes every node anew
        calls = [node for node in module.graph.nodes if node.op == "call_module"]
        return {backend: [node for node in calls if node.target in names] for backend, names in targets.items()}

    backend_api.create_submodule_from_nodes = partial(cut_out, skip_legalize_graph=True)
    backend_api._create_partitions_in_graph_module = sorted_after
    try:
        yield
    finally:
        backend_api.create_submodule_from_nodes, backend_api._create_partitions_in_graph_module = cut_out, cut_all


def _edge_config() -> Any:
    from executorch.exir import EdgeCompileConfig

    # Linears go to XNNPACK as they are. The loop of the scan is not an operator that the verifier knows.
    return EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[torch.ops.aten.linear.default])


def _edge(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program in the dialect that delegates take."""
    from executorch.exir import to_edge

    edge: torch.export.ExportedProgram = to_edge(program, compile_config=_edge_config()).exported_program()
    return edge


def _partitioner() -> Any:
    """XNNPACK's, which asks for one pass over each delegate, that for linears: there is nothing for the others, for
    convolutions, pooling and attention, to do. A node that a pass would have had to rewrite is an error of the backend.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    only_linears = CompileSpec("dqlinear_partitioner", b"")
    partitioner.delegation_spec = DelegationSpec(partitioner.delegation_spec.backend_id, [only_linears])
    # It warns of graphs whose linears may have been taken apart; `_edge_config` keeps them.
    partitioner._check_if_called_from_to_backend = lambda: False
    return partitioner


def _traced(model: Model, scan: Scan, config: MossNetConfig) -> tuple[torch.export.ExportedProgram, Traced]:
    """One block of each structure in the edge dialect, for any number of tokens (`loop`) or for one (`step`)."""
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  defines the table operators

    # A length that was fixed for one method would be fixed for the next one too.
    torch._dynamo.reset()
    module, rest = Traced(model, scan).eval(), iter(state_specs(config))
    every = [[spec.zeros(1) for spec in islice(rest, count)] for *_, count in model.order]
    states = [every[module.kinds.index(kind)] for kind in range(len(module.order))]
    length, dynamic = 1, None
    if scan is loop:
        length, fixed = _EXAMPLE, [[None] * len(own) for own in states]
        dynamic = ({1: torch.export.Dim("T", min=2, max=CHUNK)}, fixed)
    tokens = torch.zeros((1, length), dtype=torch.int64)
    exported = torch.export.export(module, (tokens, states), dynamic_shapes=dynamic, strict=False)
    return _edge(exported), module
