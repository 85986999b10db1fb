# SPDX-License-Identifier: Apache-2.0
"""Reads flatbuffers by slot numbers, every access checked against the buffer, so that a damaged file is an error here.

What a buffer says once it may show a million times, by offsets that all point at the same place. So a vector may hold
a table once, names are short, and all that is read of a file, in whatever buffer it lies, is counted against a budget
before anything is made of it.

A table lies at a position and begins with the distance back to its vtable: sizes, then the offset of each slot from the
table, 0 for a slot that is absent. Strings, vectors and tables in a slot lie at a distance forward.
Source: https://flatbuffers.dev/internals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Budget", "DamagedError", "Table", "root"]


_LONGEST_NAME = 256
_MOST_ENTRIES = 1 << 18
"""Of the vectors of one file, every reading counted: a model has a thousand a block, with an expert a linear three."""


class DamagedError(ValueError):
    """A flatbuffer that points outside itself, or is none of ours."""


class Budget:
    """How many entries of vectors may still be read of one file; each costs some microseconds and hundreds of bytes."""

    def __init__(self, most: int = _MOST_ENTRIES) -> None:
        self._most, self._left = most, most

    def spend(self, count: int) -> None:
        """Take `count` entries. Raises `DamagedError`: there are not so many left."""
        self._left -= count
        if self._left < 0:
            raise DamagedError(f"its parts have more than {self._most:,} entries together")


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        data: the whole buffer.
        position: where the table begins.
        budget: of the file.
    """

    data: memoryview
    position: int
    budget: Budget

    def number(self, slot: int, kind: str = "<u4", default: int = 0) -> int:
        """A whole number, of a numpy type."""
        at = self._at(slot)
        return default if at is None else int(_scalar(self.data, at, kind))

    def table(self, slot: int) -> "Table | None":
        """A table, None where it is absent."""
        at = self._at(slot)
        return None if at is None else Table(self.data, _forward(self.data, at), self.budget)

    def tables(self, slot: int) -> Iterator["Table"]:
        """A vector of tables, each of which is there once."""
        at = self._at(slot)
        if at is None:
            return
        first, count = self._vector(at, 4)
        self.budget.spend(count)
        places = np.arange(first, first + 4 * count, 4) + np.frombuffer(self.data, "<u4", count, first)
        if len(np.unique(places)) != count:
            raise DamagedError("a vector holds one table twice")
        yield from (Table(self.data, int(place), self.budget) for place in places)

    def string(self, slot: int) -> str:
        """A name, empty where it is absent."""
        found = self.bytes(slot)
        if len(found) > _LONGEST_NAME:
            raise DamagedError(f"a name has {len(found)} bytes")
        try:
            return bytes(found).decode()
        except UnicodeDecodeError:
            raise DamagedError("a string is not UTF-8") from None

    def bytes(self, slot: int) -> memoryview:
        """A vector of bytes, or a string as bytes."""
        at = self._at(slot)
        if at is None:
            return self.data[:0]
        first, count = self._vector(at, 1)
        return self.data[first : first + count]

    def numbers(self, slot: int, kind: str = "<u4") -> NDArray[Any]:
        """A vector of numbers of a numpy type."""
        at = self._at(slot)
        if at is None:
            return np.empty(0, kind)
        first, count = self._vector(at, np.dtype(kind).itemsize)
        return np.frombuffer(self.data, kind, count, first)

    def union(self, slot: int) -> tuple[int, "Table | None"]:
        """(type, table) of a union; its type lies in the slot before."""
        return self.number(slot - 1, "u1"), self.table(slot)

    def _at(self, slot: int) -> int | None:
        vtable = self.position - int(_scalar(self.data, self.position, "<i4"))
        size = int(_scalar(self.data, vtable, "<u2"))
        entry = 4 + 2 * slot
        offset = int(_scalar(self.data, vtable + entry, "<u2")) if entry + 2 <= size else 0
        return self.position + offset if offset else None

    def _vector(self, at: int, size: int) -> tuple[int, int]:
        start = _forward(self.data, at)
        count = int(_scalar(self.data, start, "<u4"))
        if start + 4 + count * size > len(self.data):
            raise DamagedError("a vector ends behind the buffer")
        return start + 4, count


def root(data: memoryview, identifier: bytes, budget: Budget) -> Table:
    """The root table. Raises `DamagedError`: too short, or another kind of flatbuffer."""
    if len(data) < 8 or bytes(data[4:8]) != identifier:
        raise DamagedError(f"the identifier {identifier.decode()} is missing")
    return Table(data, _forward(data, 0), budget)


def _scalar(data: memoryview, at: int, kind: str) -> Any:
    found = np.dtype(kind)
    if not 0 <= at <= len(data) - found.itemsize:
        raise DamagedError("an offset points outside the buffer")
    return np.frombuffer(data, found, 1, at)[0]


def _forward(data: memoryview, at: int) -> int:
    return at + int(_scalar(data, at, "<u4"))
