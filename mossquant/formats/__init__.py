# SPDX-License-Identifier: Apache-2.0
"""Number formats of weights by name, formats of activations, float types, and two 4-bit codes in a byte."""

from mossquant.formats.number_format import FORMATS, NumberFormat, QuantizedTensor, get_format

__all__ = ["FORMATS", "NumberFormat", "QuantizedTensor", "get_format"]
