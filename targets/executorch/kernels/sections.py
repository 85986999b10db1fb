# SPDX-License-Identifier: Apache-2.0
"""What the bytes of a program with kernels of ours are for."""

from mossquant.formats import FORMATS
from mossquant.targets.executorch.kernels.chain import constants
from mossquant.targets.executorch.open import Opened
from mossquant.targets.executorch.program_file import CONSTANTS
from mossquant.targets.native.blocks.calls import Matrix
from mossquant.targets.program import METHODS


def sections(opened: Opened) -> dict[str, int]:
    """Bytes by what they are for; together they are the file."""
    file = opened.file
    held = {
        one.array.__array_interface__["data"][0]: one
        for name in METHODS
        for one in constants(file, name, opened.config)
    }
    codes = scales = kept = small = 0
    for one in held.values():
        if not isinstance(one.constant, Matrix):
            small += one.array.nbytes
        elif one.storage == "float32":
            kept += one.array.nbytes
        else:
            number_format, (rows, columns) = FORMATS[one.storage], one.constant.spec.matrix_shape
            block = number_format.activation_block
            codes += rows * (-(-columns // block) * block) * number_format.bits // 8
            scales += rows * number_format.groups(columns) * number_format.scale_dtype.itemsize
    return {
        "methods": file.program_bytes,
        "codes, rows in whole blocks": codes,
        "scales": scales,
        "matrices kept in a float type": kept,
        "small tensors, as kernels read them": small,
        "padding to whole strips and lines": file.sections[CONSTANTS] - codes - scales - kept - small,
        "alignment": file.sections["alignment"],
    }
