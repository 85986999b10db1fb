# SPDX-License-Identifier: Apache-2.0
"""8-bit codes −127…127, with an fp32 scale per row or a bf16 scale per group of columns.

−128 is not used: the range is symmetric, and no kernel meets (−128)², of which two overflow an int16.
"""

import torch

from mossquant.formats.number_format import NumberFormat

__all__ = ["INT8", "INT8_G32"]

INT8 = NumberFormat("int8", 8, None, torch.float32, -127, 127)
"""One scale a row: 8 + 32/columns bits a weight before padding to whole words of four codes."""

INT8_G32 = NumberFormat("int8_g32", 8, 32, torch.bfloat16, -127, 127)
"""Groups of 32: 8.5 bits a weight before padding."""
