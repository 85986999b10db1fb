# SPDX-License-Identifier: Apache-2.0
"""What a .pte is, and what each byte of it is for. The file is read, not run."""

from mossquant.checkpoint.locate import Located
from mossquant.eval.bench import active_share
from mossquant.eval.info import FileRow, InfoReport, SectionRow, short_hashes
from mossquant.files.outputs import file_sha256
from mossquant.targets.artifact import check_listed, check_tokenizer
from mossquant.targets.executorch.metadata import open_program, weight_bytes

__all__ = ["executorch_info"]


def executorch_info(located: Located) -> InfoReport:
    """Say what a .pte is. Raises `InputError` where it is none of ours, or not what its manifest says."""
    opened = open_program(located.path)
    file, metadata, config = opened.file, opened.metadata, opened.config
    digest = file_sha256(located.path)
    check_listed(located.path, {located.path.name: digest}, model=metadata.model_dump())
    check_tokenizer(located.path, metadata.tokenizer_sha256)
    memory = max(method.planned_bytes for method in file.methods.values())
    tokenizer = metadata.tokenizer_sha256
    return InfoReport(
        path=located.given,
        kind=located.kind,
        weights=metadata.weights,
        config=config,
        torch_dtype=str(metadata.config["torch_dtype"]),
        parameters=metadata.parameters,
        active_parameters=round(metadata.parameters * active_share(config, kind="executorch")),
        weight_bytes=weight_bytes(opened),
        payload_bytes=metadata.payload_bytes,
        rows=(),
        files=(FileRow(located.path.name, located.path.stat().st_size, digest),),
        sections=tuple(SectionRow(name, size) for name, size in file.sections.items()),
        facts=(
            ("made from", f"a {metadata.source_kind}: {short_hashes(metadata.source_files)}"),
            ("activations", metadata.activations),
            ("state", metadata.state_format),
            ("methods", f"{', '.join(sorted(file.methods))}; up to {metadata.max_chunk} tokens a call"),
            ("memory planned", f"{memory:,} bytes for values, besides the weights that XNNPACK packs when it loads"),
            ("runs on", f"ExecuTorch {metadata.runtime_minimum} with XNNPACK and the quantized kernels"),
            ("tokenizer", short_hashes({"tokenizer.json": tokenizer}) if tokenizer else "none"),
            ("written by", f"mossquant {metadata.release}"),
        ),
        ledger=(),
    )
