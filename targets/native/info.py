# SPDX-License-Identifier: Apache-2.0
"""What a .moss is, and what each byte of it is for. The file is read, not run."""

from mossquant.checkpoint.locate import Located
from mossquant.formats import FORMATS
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.targets.info_report import InfoReport, program_info
from mossquant.targets.native.open import Opened, open_program
from mossquant.targets.native.target import TARGET


def info(located: Located) -> InfoReport:
    """Say what a .moss is. Raises `InputError` where it is none of ours, or not what its manifest says."""
    opened = open_program(located.path)
    metadata = opened.metadata
    return program_info(
        located,
        metadata,
        opened.config,
        active_share=TARGET.active_share(opened.config),
        weight_bytes=metadata.weight_bytes,
        files=opened.hashes,
        sections=sections(opened),
        facts=[
            ("runs on", f"libmoss of mossquant {metadata.runtime_minimum} and later"),
            ("packed for", f"{metadata.layout}; another machine packs it anew when it opens it"),
        ],
    )


def sections(opened: Opened) -> dict[str, int]:
    """What the bytes of a program are for; they add up to the file's size."""
    codes = scales = kept = 0
    for name, spec in opened.specs.items():
        storage, (rows, columns) = opened.formats[name], spec.matrix_shape
        if storage in FLOAT_DTYPES:
            kept += spec.count * FLOAT_DTYPES[storage].itemsize
            continue
        number_format = FORMATS[storage]
        block = number_format.activation_block
        codes += rows * (-(-columns // block) * block) * number_format.bits // 8
        scales += rows * number_format.groups(columns) * number_format.scale_dtype.itemsize
    stored = opened.metadata.weight_bytes
    return {
        "codes, rows in whole blocks": codes,
        "scales": scales,
        "tensors kept in a float type": kept,
        "padding to whole strips and lines": stored - codes - scales - kept,
        "header: names, config, recipe, hashes": opened.bytes - stored,
    }
