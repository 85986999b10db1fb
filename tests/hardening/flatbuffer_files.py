# SPDX-License-Identifier: Apache-2.0
"""Damage to a flatbuffer without its schema: tables are found by their vtables, and their fields changed in place.

A table begins with a signed offset back to its vtable; a vtable is its own size, the table's size, and an offset for
every field. Every place that looks like a table is taken for one: a mistaken guess is damage too.
"""

import struct
from collections.abc import Iterator
from random import Random

from hardening.case import Damage, one_of
from hardening.raw import mutate_bytes

_LARGEST_TABLE = 512
_WORDS = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, 1 << 20)


def tables(data: bytes) -> Iterator[tuple[int, int, list[int]]]:
    """(place, place of the vtable, places of the fields) of everything that reads like a table."""
    for at in range(0, len(data) - 4, 4):
        (back,) = struct.unpack_from("<i", data, at)
        vtable = at - back
        if back == 0 or not 0 <= vtable <= len(data) - 4:
            continue
        size, table_size = struct.unpack_from("<HH", data, vtable)
        if not 4 <= size <= _LARGEST_TABLE or size % 2 or not 4 <= table_size <= _LARGEST_TABLE:
            continue
        if vtable + size > len(data) or at + table_size > len(data):
            continue
        offsets = struct.unpack_from(f"<{(size - 4) // 2}H", data, vtable + 4)
        if offsets and all(offset == 0 or 4 <= offset < table_size for offset in offsets):
            yield at, vtable, [at + offset for offset in offsets if offset]


def _field(random: Random, data: bytes) -> Damage:
    found = list(tables(data))
    changed = bytearray(data)
    if not found:
        return mutate_bytes(random, data)
    at, vtable, fields = random.choice(found)
    kind = random.choice(("word", "word", "word", "length", "shared", "vtable", "back", "root", "identifier"))
    place = random.choice(fields) if fields else at
    word = random.choice((*_WORDS, random.randrange(len(data)), random.getrandbits(32)))
    if kind == "vtable":
        struct.pack_into("<H", changed, vtable + random.choice((0, 2, 4)), word & 0xFFFF)
    elif kind == "back":
        struct.pack_into("<I", changed, at, word)
    elif kind == "root":
        struct.pack_into("<I", changed, 0, word)
    elif kind == "identifier" and len(data) >= 8:
        changed[4:8] = random.randbytes(4)
    elif kind == "shared":
        _share(random, changed, place)
    elif place + 4 <= len(data):
        # A field is a number, or an offset to a vector or text, which begins with its length.
        (offset,) = struct.unpack_from("<I", data, place)
        target = place + offset if kind == "length" and place + offset + 4 <= len(data) else place
        struct.pack_into("<I", changed, target, word)
    return Damage(bytes(changed), f"{kind} of the table at {at}, field at {place}: {word:#x}")


def _share(random: Random, data: bytearray, place: int) -> None:
    """Make a vector's offsets, and as many more as fit, point at one table."""
    if place + 4 > len(data):
        return
    start = place + struct.unpack_from("<I", data, place)[0]
    if start + 8 > len(data):
        return
    count = random.choice((struct.unpack_from("<I", data, start)[0], (len(data) - start) // 8))
    target = start + 4 + struct.unpack_from("<I", data, start + 4)[0]
    count = min(count, (len(data) - start) // 4 - 1)
    struct.pack_into("<I", data, start, count)
    for at in range(start + 4, start + 4 + 4 * count, 4):
        struct.pack_into("<I", data, at, (target - at) & 0xFFFFFFFF)


mutate_flatbuffer = one_of((3, _field), (1, mutate_bytes))
