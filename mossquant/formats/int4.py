# SPDX-License-Identifier: Apache-2.0
"""4-bit codes −8…7 with a bf16 scale per group of columns, two codes a byte where they are stored.

The range has one code more below zero than above. `absmax_scales` uses ±7 and leaves −8 to solvers that search.
"""

import torch

from mossquant.formats.number_format import NumberFormat

__all__ = ["INT4_G32", "INT4_G128"]

INT4_G32 = NumberFormat("int4_g32", 4, 32, torch.bfloat16, -8, 7)
"""Groups of 32: 4.5 bits a weight before padding."""

INT4_G128 = NumberFormat("int4_g128", 4, 128, torch.bfloat16, -8, 7)
"""Groups of 128: 4.125 bits a weight before padding."""
