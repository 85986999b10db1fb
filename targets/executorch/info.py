# SPDX-License-Identifier: Apache-2.0
"""What a .pte is, and what each byte of it is for. The file is read, not run."""

from mossquant.checkpoint.locate import Located
from mossquant.targets.executorch.open import open_program, weight_bytes
from mossquant.targets.executorch.target import TARGET
from mossquant.targets.info_report import InfoReport, program_info


def info(located: Located) -> InfoReport:
    """Say what a .pte is. Raises `InputError` where it is none of ours, or not what its manifest says."""
    opened = open_program(located.path)
    file, metadata = opened.file, opened.metadata
    memory = max(method.planned_bytes for method in file.methods.values())
    return program_info(
        located,
        metadata,
        opened.config,
        active_share=TARGET.active_share(opened.config),
        weight_bytes=weight_bytes(opened),
        files=opened.hashes,
        sections=file.sections,
        facts=[
            ("methods", f"{', '.join(sorted(file.methods))}; up to {metadata.max_chunk} tokens a call"),
            ("memory planned", f"{memory:,} bytes for values, besides the weights that XNNPACK packs when it loads"),
            ("runs on", f"ExecuTorch {metadata.runtime_minimum} with XNNPACK and the quantized kernels"),
        ],
    )
