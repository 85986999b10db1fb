# SPDX-License-Identifier: Apache-2.0
"""What a .pte is, and what each byte of it is for. The file is read, not run."""

from mossquant.checkpoint.locate import Located
from mossquant.targets.executorch.kernels.sections import sections
from mossquant.targets.executorch.open import Opened, open_program, weight_bytes
from mossquant.targets.executorch.target import TARGET
from mossquant.targets.info_report import InfoReport, program_info
from mossquant.targets.target import active_share


def info(located: Located) -> InfoReport:
    """Say what a .pte is. Raises `InputError` where it is none of ours, or not what its manifest says."""
    opened = open_program(located.path)
    file, metadata = opened.file, opened.metadata
    return program_info(
        located,
        metadata,
        opened.config,
        active_share=active_share(opened.config) if opened.own_kernels else TARGET.active_share(opened.config),
        weight_bytes=weight_bytes(opened),
        files=opened.hashes,
        sections=sections(opened) if opened.own_kernels else file.sections,
        facts=[
            ("methods", f"{', '.join(sorted(file.methods))}; up to {metadata.max_chunk} tokens a call"),
            *_runs_on(opened, max(method.planned_bytes for method in file.methods.values())),
        ],
    )


def _runs_on(opened: Opened, memory: int) -> list[tuple[str, str]]:
    runtime = f"ExecuTorch {opened.metadata.runtime_minimum}"
    if opened.own_kernels:
        return [
            ("memory planned", f"{memory:,} bytes for values; weights are read where the file is mapped"),
            ("runs on", f"{runtime} with the operators of mossquant and libmoss"),
            ("packed for", f"{opened.metadata.layout}; other machines refuse it"),
        ]
    return [
        ("memory planned", f"{memory:,} bytes for values, besides the weights that XNNPACK packs when it loads"),
        ("runs on", f"{runtime} with XNNPACK and the quantized kernels"),
    ]
