# SPDX-License-Identifier: Apache-2.0
"""Two 4-bit codes in a byte, in both orders."""

import numpy as np
import pytest

from mossquant.formats.nibbles import Half, pack_nibbles, unpack_nibbles

ORDERS: tuple[tuple[Half, list[int]], ...] = (("low", [0xF0, 0x98]), ("high", [0x0F, 0x89]))


@pytest.mark.parametrize(("first", "stored"), ORDERS)
def test_the_first_code_lies_where_it_is_asked_to(first: Half, stored: list[int]) -> None:
    codes = np.array([-8, 7, 0, 1], np.int8)
    assert pack_nibbles(codes, first=first).tolist() == stored
    every = np.arange(-8, 8, dtype=np.int8)
    pairs = np.stack(np.meshgrid(every, every), -1).reshape(4, -1)
    assert np.array_equal(unpack_nibbles(pack_nibbles(pairs, first=first), first=first), pairs)
