# SPDX-License-Identifier: Apache-2.0
"""Every mutator changes its file, follows its seed, and gives other damage for another seed."""

import struct
from pathlib import Path
from random import Random

import pytest
from hardening.flatbuffer_files import mutate_flatbuffer, tables
from hardening.kinds import KINDS, Kind

SEEDS = range(30)
# Some damage is none: a value may be replaced by its like.
CHANGED = 0.8

# Root offset 16, identifier; a vtable (8 bytes, table of 12, fields at 4 and 8); the table, back to it by 8.
FLATBUFFER = struct.pack("<I4sHHHHiII", 16, b"TEST", 8, 12, 4, 8, 8, 7, 9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damage(kind: Kind, samples: Path) -> None:
    data = (samples / kind.folder / kind.file).read_bytes()
    damages = [kind.mutate(Random(seed), data) for seed in SEEDS]
    assert damages == [kind.mutate(Random(seed), data) for seed in SEEDS]
    assert sum(damage.data != data for damage in damages) >= CHANGED * len(damages)
    assert len({damage.data for damage in damages}) > CHANGED / 2 * len(damages)
    assert all(damage.what for damage in damages)


def test_the_tables_of_a_flatbuffer() -> None:
    assert list(tables(FLATBUFFER)) == [(16, 8, [20, 24])]


def test_damage_to_a_flatbuffer() -> None:
    damages = [mutate_flatbuffer(Random(seed), FLATBUFFER) for seed in range(200)]
    said = {damage.what.split(" ")[0] for damage in damages}
    assert {"word", "length", "vtable", "back", "root", "identifier"} <= said
    assert sum(damage.data != FLATBUFFER for damage in damages) > CHANGED * len(damages)
