# SPDX-License-Identifier: Apache-2.0
"""Lowers a model to one ExecuTorch program: prefill, score and decode over the same constants, delegated to XNNPACK."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mossquant.checkpoint.weights import Weights
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import get_capabilities
from mossquant.targets.executorch.matrices import XnnpackMatrices
from mossquant.targets.executorch.packages import check_packages
from mossquant.targets.executorch.program_file import METADATA
from mossquant.targets.executorch.scan import loop, step
from mossquant.targets.program import METHODS, Method, Model

__all__ = ["CHUNK", "lower", "lower_module"]

CHUNK = get_capabilities("executorch").limits.max_chunk or 1
"""Most tokens of one call of prefill or score. Memory is planned for so many, so that it is a limit of the file."""

_EXAMPLE = 16
_SCANS = {"prefill": loop, "score": loop, "decode": step}


def lower(
    weights: Weights,
    specs: list[TensorSpec],
    metadata: Mapping[str, Any],
    path: Path,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the program of `source`.

    Args:
        source: the tensors.
        specs: what they are, `mossquant.model.mossnet.tensor_specs` of the config.
        metadata: what the program is to say about itself.
        path: file to write.
        on_stage: called after each stage with its name, its number and how many there are.
    """
    stages = [*(f"exporting {name}" for name in METHODS), "delegating to XNNPACK", "writing"]
    done = 0

    def stage_done() -> None:
        nonlocal done
        done += 1
        if on_stage is not None:
            on_stage(stages[done - 1], done, len(stages))

    check_packages()
    model = Model(weights.config, specs, XnnpackMatrices(weights)).eval()
    programs: dict[str, torch.export.ExportedProgram] = {}
    with torch.no_grad():
        for name in METHODS:
            programs[name] = _exported(Method(model, _SCANS[name], last=name != "score"), weights.config, name)
            stage_done()
        _write(programs, {METADATA: json.dumps(metadata, sort_keys=True)}, path, stage_done)


def lower_module(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a program with one method, `forward`, for inputs of these very shapes: a part of a model, to be timed."""
    torch._dynamo.reset()
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, strict=False)
        _write({"forward": exported}, {}, path, lambda: None)


def _write(
    programs: Mapping[str, torch.export.ExportedProgram],
    constants: Mapping[str, str],
    path: Path,
    stage_done: Callable[[], None],
) -> None:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        dict(programs),
        partitioner={name: [_partitioner()] for name in programs},
        # The loop of the scan is not an operator that the verifier knows.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(constants),
    )
    stage_done()
    # Tables stay codes only if their look-ups are recognised, which this switch is for.
    lowered = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    with path.open("wb") as file:
        lowered.write_to_file(file)
    stage_done()


def _partitioner() -> Any:
    """XNNPACK's, without the passes for convolutions, pooling and attention over each delegate: none of these is in the
    program, and they take most of the time. A node that a pass would have had to rewrite is an error of the backend.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    only_linears = CompileSpec("dqlinear_partitioner", b"")
    partitioner.delegation_spec = DelegationSpec(partitioner.delegation_spec.backend_id, [only_linears])
    return partitioner


def _exported(method: nn.Module, config: MossNetConfig, name: str) -> torch.export.ExportedProgram:
    from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  defines the table operators

    # A length that was fixed for one method would be fixed for the next one too.
    torch._dynamo.reset()
    states: Sequence[Tensor] = [spec.zeros(1) for spec in state_specs(config)]
    length = 1 if name == "decode" else _EXAMPLE
    tokens = torch.zeros((1, length), dtype=torch.int64)
    dynamic = None if name == "decode" else ({1: torch.export.Dim("T", min=2, max=CHUNK)}, [None] * len(states))
    return torch.export.export(method, (tokens, states), dynamic_shapes=dynamic, strict=False)
