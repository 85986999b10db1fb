# SPDX-License-Identifier: Apache-2.0
"""Reads flatbuffers by slot numbers; numpy refuses every access outside the buffer (`ValueError`).

Offsets of a small buffer may all point at the same place, so that reading it takes any amount of memory. Nothing is
counted here: a file is first read in a child process with limits (`mossquant.targets.trial`).

A table lies at a position and begins with the distance back to its vtable: sizes, then the offset of each slot from the
table, 0 for a slot that is absent. Strings, vectors and tables in a slot lie at a distance forward.
Source: https://flatbuffers.dev/internals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DamagedError(ValueError):
    """A flatbuffer that points outside itself, or is none of ours."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        data: the whole buffer.
        position: where the table begins.
    """

    data: memoryview
    position: int

    def number(self, slot: int, kind: str = "<u4", default: int = 0) -> int:
        """A whole number, of a numpy type."""
        at = self._at(slot)
        return default if at is None else int(_scalar(self.data, at, kind))

    def real(self, slot: int) -> float:
        """A number in float64."""
        at = self._at(slot)
        return 0.0 if at is None else float(_scalar(self.data, at, "<f8"))

    def table(self, slot: int) -> "Table | None":
        """A table, None where it is absent."""
        at = self._at(slot)
        return None if at is None else Table(self.data, _forward(self.data, at))

    def tables(self, slot: int) -> Iterator["Table"]:
        """A vector of tables."""
        at = self._at(slot)
        if at is not None:
            first, count = self._vector(at)
            yield from (Table(self.data, _forward(self.data, first + 4 * index)) for index in range(count))

    def string(self, slot: int) -> str:
        """A name, empty where it is absent."""
        return self.numbers(slot, "u1").tobytes().decode()

    def numbers(self, slot: int, kind: str = "<u4") -> NDArray[Any]:
        """A vector of numbers of a numpy type; a string is one of bytes."""
        at = self._at(slot)
        if at is None:
            return np.empty(0, kind)
        first, count = self._vector(at)
        return np.frombuffer(self.data, kind, count, first) if count else np.empty(0, kind)

    def union(self, slot: int) -> tuple[int, "Table | None"]:
        """(type, table) of a union; its type lies in the slot before."""
        return self.number(slot - 1, "u1"), self.table(slot)

    def _at(self, slot: int) -> int | None:
        vtable = self.position - int(_scalar(self.data, self.position, "<i4"))
        size = int(_scalar(self.data, vtable, "<u2"))
        entry = 4 + 2 * slot
        offset = int(_scalar(self.data, vtable + entry, "<u2")) if entry + 2 <= size else 0
        return self.position + offset if offset else None

    def _vector(self, at: int) -> tuple[int, int]:
        """Where a vector's first element lies, and how many there are."""
        start = _forward(self.data, at)
        return start + 4, int(_scalar(self.data, start, "<u4"))


def root(data: memoryview, identifier: bytes) -> Table:
    """The root table. Raises `DamagedError`: too short, or another kind of flatbuffer."""
    if len(data) < 8 or bytes(data[4:8]) != identifier:
        raise DamagedError(f"the identifier {identifier.decode()} is missing")
    return Table(data, _forward(data, 0))


def _scalar(data: memoryview, at: int, kind: str) -> Any:
    return np.frombuffer(data, kind, 1, at)[0]


def _forward(data: memoryview, at: int) -> int:
    return at + int(_scalar(data, at, "<u4"))
