# SPDX-License-Identifier: Apache-2.0
"""Number formats by name: one file a code width, with group size and scale type as parameters."""

from mossquant.errors import InputError
from mossquant.formats.int4 import INT4_G32, INT4_G128
from mossquant.formats.int8 import INT8, INT8_G32
from mossquant.formats.number_format import NumberFormat, QuantizedTensor

__all__ = ["FORMATS", "NumberFormat", "QuantizedTensor", "get_format"]

FORMATS: dict[str, NumberFormat] = {known.name: known for known in (INT8, INT8_G32, INT4_G32, INT4_G128)}
"""Every number format, by the name that recipes use."""


def get_format(name: str) -> NumberFormat:
    """The number format of that name.

    Raises:
        InputError: no such format; the known names are listed.
    """
    if name not in FORMATS:
        raise InputError(f"unknown number format {name[:40]!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]
