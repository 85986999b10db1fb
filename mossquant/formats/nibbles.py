# SPDX-License-Identifier: Apache-2.0
"""Two 4-bit codes in a byte, each stored as code + 8; targets differ in which of the two lies in the low half."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Half = Literal["low", "high"]
"""Half of a byte."""


def pack_nibbles(codes: NDArray[np.int8], *, first: Half = "low") -> NDArray[np.uint8]:
    """Codes −8…7 int8 [..., n], n even → bytes [..., n / 2].

    Args:
        codes: the codes.
        first: the half of the byte that holds the first of two codes.
    """
    unsigned = codes.view(np.uint8) + np.uint8(8)
    even, odd = unsigned[..., 0::2], unsigned[..., 1::2]
    low, high = (even, odd) if first == "low" else (odd, even)
    return low | high << np.uint8(4)


def unpack_nibbles(packed: NDArray[np.uint8], *, first: Half = "low") -> NDArray[np.int8]:
    """The inverse of `pack_nibbles`. Holds half of its result beside it."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    low = 0 if first == "low" else 1
    codes[..., low::2] = packed & 15
    codes[..., 1 - low :: 2] = packed >> 4
    codes -= 8
    return codes.view(np.int8)
