# SPDX-License-Identifier: Apache-2.0
"""Writes a .pte: one program with prefill, score and decode, its linears delegated to XNNPACK."""

from dataclasses import replace
from pathlib import Path

from mossquant.capabilities import Activations, check, get_target
from mossquant.checkpoint import Checkpoint
from mossquant.config import MossNetConfig
from mossquant.model import state_specs
from mossquant.outputs import file_sha256
from mossquant.quantized import QuantizedCheckpoint
from mossquant.space import check_space
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.executorch.lower import CHUNK, lower
from mossquant.targets.executorch.metadata import Metadata
from mossquant.targets.executorch.packages import EXECUTORCH, check_packages
from mossquant.targets.executorch.program_file import ProgramFile
from mossquant.targets.executorch.trial import try_apart
from mossquant.targets.executorch.verify import check_linears
from mossquant.targets.metadata import activations_of, changed_inputs, common_metadata
from mossquant.targets.program import METHODS, MethodName
from mossquant.targets.registry import Exported, Progress, Writer, exporter
from mossquant.targets.source import CheckpointSource, QuantizedSource, Source
from mossquant.tensors import TensorSpec

__all__ = ["PROGRAM", "export_executorch"]

PROGRAM = "model.pte"

_GRAPH_BYTES = 1 << 17
"""Of a layer: nodes and values of three methods and their delegates."""
_LOWERING_BYTES, _WEIGHT_BYTES = 10**9, 8
"""PyTorch's graphs with all that hangs on them; and codes, one a byte, in the copies that passes make."""


@exporter("executorch")
def export_executorch(
    source: Checkpoint | QuantizedCheckpoint,
    destination: Path,
    *,
    activations: Activations | None,
    progress: Progress | None,
) -> Writer:
    """Check that the target can hold the checkpoint; the writer writes the program.

    Raises:
        InputError: the quantized checkpoint holds something that the target cannot, packages are missing, or there is
            too little disk or memory.
    """
    check_packages()
    if isinstance(source, Checkpoint):
        tensors: Source = CheckpointSource(source)
    else:
        target = get_target("executorch")
        if activations is not None:
            target.rounded_to(activations)
        check(source.plan if activations is None else replace(source.plan, activations=()), ["executorch"])
        tensors = QuantizedSource(source, target, activations)
    specs = list(source.specs.values())
    linears = [spec.name for spec in specs if spec.site is not None]
    check_space(destination, disk_bytes=_disk_bytes(tensors, specs), memory_bytes=_memory_bytes(specs))

    def write(folder: Path) -> Exported:
        said = {"activations": activations_of(tensors, linears), "max_chunk": CHUNK}
        metadata = Metadata.model_validate(common_metadata(source) | said)
        lower(tensors, specs, metadata.model_dump(), folder / PROGRAM, progress)
        file = ProgramFile(folder / PROGRAM)
        check_linears(file, tensors, specs)
        try_apart(file.path, file_sha256(file.path))
        operators: dict[str, set[str]] = {}
        for method in file.methods.values():
            for name in method.operators:
                domain, _, operator = name.partition("::")
                operators.setdefault(domain, set()).add(operator)
        runtime = Runtime(
            name="executorch",
            minimum=EXECUTORCH,
            domains={},
            operators={"delegates": ["XnnpackBackend"]} | {key: sorted(names) for key, names in operators.items()},
        )
        methods: dict[str, MethodPorts] = {name: _ports(source.config, name) for name in METHODS}
        record = ProgramRecord(file=PROGRAM, methods=methods, runtime=runtime, model=metadata.model_dump())
        changed = changed_inputs(source, tensors, linears) if activations is None else ()
        return Exported(record, tuple(f"{PROGRAM}: {note}" for note in changed))

    return write


def _disk_bytes(tensors: Source, specs: list[TensorSpec]) -> int:
    """Room that the program takes, at most: codes as they are, what is decoded or kept in fp32, the table once more."""
    total = _GRAPH_BYTES * (2 + len({spec.layer for spec in specs}))
    for spec in specs:
        found = tensors.format(spec.name)
        own = 4 * spec.count if found is None or spec.site is None else found.payload_bytes(*spec.matrix_shape)
        # Scales of a table for look-ups are fp32.
        total += 3 * own if spec.role == "embedding" else own
    return total


def _memory_bytes(specs: list[TensorSpec]) -> int:
    """Memory that lowering takes, beside the interpreter with its imports: graphs, and weights some times over."""
    return _LOWERING_BYTES + _WEIGHT_BYTES * sum(spec.count for spec in specs)


def _ports(config: MossNetConfig, method: MethodName) -> MethodPorts:
    length: int | str = 1 if method == "decode" else "T"
    positions: int | str = "T" if method == "score" else 1
    states = [Port(name=spec.name, type="float", shape=[1, *spec.shape]) for spec in state_specs(config)]
    tokens = Port(name="tokens", type="int64", shape=[1, length])
    logits = Port(name="logits", type="float", shape=[1, positions, config.vocab_size])
    after = [Port(name=f"{state.name}.out", type="float", shape=state.shape) for state in states]
    return MethodPorts(inputs=[tokens, *states], outputs=[logits, *after])
