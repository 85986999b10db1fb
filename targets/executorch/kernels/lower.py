# SPDX-License-Identifier: Apache-2.0
"""Lowers a model to one ExecuTorch program whose blocks are operators of libmoss: a graph of few nodes a layer."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mossquant.checkpoint.weights import Weights
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import StateSpec
from mossquant.progress import Progress
from mossquant.targets.executorch.kernels.operators import NAMESPACE
from mossquant.targets.executorch.program_file import METADATA
from mossquant.targets.native.blocks.calls import Call, Constant, Matrix, Packed, Small, calls
from mossquant.targets.native.blocks.constants import held
from mossquant.targets.native.blocks.states import held_shape
from mossquant.targets.native.metadata import Layout
from mossquant.targets.program import METHODS, MethodName

_EXAMPLE = 16
_ALIGNMENT = 64
"""Of constants: a line of the cache, and the widest vector."""
_STAGES = (
    "compiling the operators, once",
    "packing tensors",
    "tracing",
    "planning memory",
    "writing",
    "written",
)


class _Constants(nn.Module):
    """The tensors of all methods, each once; the head of a tied model is the table."""

    def __init__(self, weights: Weights, layout: Layout) -> None:
        super().__init__()
        self._weights, self._layout = weights, layout
        self._known: dict[Matrix | Small, str] = {}

    def add(self, constant: Matrix | Small) -> None:
        """Make it, if it is not there yet."""
        if constant not in self._known:
            self._known[constant] = f"constant_{len(self._known)}"
            self.register_buffer(self._known[constant], held(self._weights, constant, self._layout))

    def of(self, constant: Constant) -> Any:
        """A tensor, a list of them, or None."""
        if isinstance(constant, tuple):
            return [self.of(one) for one in constant]
        return None if constant is None else getattr(self, self._known[constant])


class _Method(nn.Module):
    """prefill, score or decode: tokens [1, T], states → logits, states."""

    def __init__(self, constants: _Constants, chain: Sequence[tuple[Call, Packed]]) -> None:
        super().__init__()
        self.constants, self._chain = constants, chain
        for call, _ in chain:
            for constant in call.held:
                constants.add(constant)

    def forward(self, tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        rest, x = iter(states), tokens
        after: list[Tensor] = []
        for call, packed in self._chain:
            operator = getattr(getattr(torch.ops, NAMESPACE), call.operator).default
            constants = [self.constants.of(constant) for constant in call.constants]
            given = operator(x, *islice(rest, call.states), *constants, *call.settings, *packed)
            x, *own = given if call.states else (given,)
            after += own
        return (x, *after)


def lower(
    weights: Weights,
    formats: Mapping[str, str],
    layout: Layout,
    chunk: int,
    metadata: Mapping[str, Any],
    path: Path,
    on_stage: Progress | None = None,
) -> None:
    """Write the program of a model.

    Args:
        weights: the tensors.
        formats: name of every matrix → what it is stored in.
        layout: what quantized matrices are packed for.
        chunk: most tokens of one call of prefill or score.
        metadata: what the program is to say about itself.
        path: file to write.
        on_stage: called when a stage begins with its name, how many are done and how many there are; and at the end.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    begins(on_stage, "packing tensors")
    constants, specs = _Constants(weights, layout), state_specs(weights.config)
    modules = {}
    for name in METHODS:
        chain = calls(weights.config, last=name != "score")
        modules[name] = _Method(constants, [(call, call.packed(formats, layout)) for call in chain])
    begins(on_stage, "tracing")
    with torch.no_grad():
        programs = {name: _exported(module, name, specs, chunk) for name, module in modules.items()}
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        said = {METADATA: json.dumps(metadata, sort_keys=True)}
        edge = to_edge(programs, constant_methods=said, compile_config=config)
    begins(on_stage, "planning memory")
    # The caller's own arrays are read and written: states are not copied into memory of a method and out of it.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    lowered = edge.to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning, constant_tensor_alignment=_ALIGNMENT)
    )
    begins(on_stage, "writing")
    with path.open("wb") as file:
        lowered.write_to_file(file)
    begins(on_stage, "written")


def begins(on_stage: Progress | None, stage: str) -> None:
    """Say which stage begins."""
    if on_stage is not None:
        on_stage(stage, _STAGES.index(stage), len(_STAGES) - 1)


def _exported(
    module: _Method, name: MethodName, specs: Sequence[StateSpec], chunk: int
) -> torch.export.ExportedProgram:
    # A length that was fixed for one method would be fixed for the next one too.
    torch._dynamo.reset()
    length = 1 if name == "decode" else _EXAMPLE
    tokens = torch.zeros((1, length), dtype=torch.int64)
    states = [torch.zeros(1, *held_shape(spec)) for spec in specs]
    dynamic: Any = None
    if name != "decode":
        dynamic = ({1: torch.export.Dim("T", min=2, max=chunk)}, (None,) * len(states))
    return torch.export.export(module, (tokens, *states), dynamic_shapes=dynamic, strict=False)
