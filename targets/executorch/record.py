# SPDX-License-Identifier: Apache-2.0
"""What the manifest says of a .pte: its methods, and what the runtime must have."""

from mossquant.model.mossnet import state_specs
from mossquant.targets.artifact import MethodPorts, Port, ProgramRecord, Runtime
from mossquant.targets.executorch.open import Opened
from mossquant.targets.executorch.packages import EXECUTORCH
from mossquant.targets.program import METHODS, MethodName

PROGRAM = "model.pte"


def program_record(opened: Opened) -> ProgramRecord:
    """The entry of a program that was opened."""
    operators: dict[str, set[str]] = {} if opened.own_kernels else {"delegates": {"XnnpackBackend"}}
    for method in opened.file.methods.values():
        for name in method.operators:
            domain, _, operator = name.partition("::")
            operators.setdefault(domain, set()).add(operator)
    runtime = Runtime(
        name="executorch",
        minimum=EXECUTORCH,
        domains={},
        operators={domain: sorted(names) for domain, names in operators.items()},
    )
    methods: dict[str, MethodPorts] = {name: _ports(opened, name) for name in METHODS}
    return ProgramRecord(file=PROGRAM, methods=methods, runtime=runtime, model=opened.metadata.model_dump())


def _ports(opened: Opened, method: MethodName) -> MethodPorts:
    config = opened.config
    length: int | str = 1 if method == "decode" else "T"
    positions: int | str = "T" if method == "score" else 1
    states = [Port(name=spec.name, type="float", shape=[1, *opened.state_shape(spec)]) for spec in state_specs(config)]
    tokens = Port(name="tokens", type="int64", shape=[1, length])
    logits = Port(name="logits", type="float", shape=[1, positions, config.vocab_size])
    after = [Port(name=f"{state.name}.out", type="float", shape=state.shape) for state in states]
    return MethodPorts(inputs=[tokens, *states], outputs=[logits, *after])
