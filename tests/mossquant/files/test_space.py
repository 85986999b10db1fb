# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows, and the check that there is room before work starts."""

import shutil
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.files import space
from mossquant.files.space import check_space, row_blocks, trim_heap


@pytest.mark.parametrize(
    ("rows", "columns", "weights", "sizes"),
    [
        (7, 10, 20, [2, 2, 2, 1]),
        (6, 10, 20, [2, 2, 2]),
        (3, 50, 20, [1, 1, 1]),
        (3, 50, 1000, [3]),
        (1, 10, 1, [1]),
        (2, 0, 20, [2]),
    ],
)
def test_row_blocks(rows: int, columns: int, weights: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "BLOCK_WEIGHTS", weights)
    blocks = list(row_blocks(rows, columns))
    assert [block.stop - block.start for block in blocks] == sizes
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))


def test_enough_is_not_mentioned(tmp_path: Path) -> None:
    check_space(tmp_path / "deep" / "er" / "out", disk_bytes=1, memory_bytes=1)
    trim_heap()


def test_too_little_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000 if path == tmp_path else -1))
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(space, "_MEMINFO", tmp_path / "meminfo")
    disk = f"the output takes 2.5 MB of disk, and {tmp_path} has 2.0 MB free"
    memory = "making it takes 1,234.5 MB of memory, and 2.0 MB are available"
    for needs, said in [
        ((2_500_000, 0), [disk]),
        ((0, 1_234_500_000), [memory]),
        ((2_500_000, 1_234_500_000), [disk, memory]),
    ]:
        with pytest.raises(InputError) as caught:
            check_space(tmp_path / "deep" / "out", disk_bytes=needs[0], memory_bytes=needs[1])
        advice = "Free some, or choose another disk or machine."
        assert str(caught.value) == f"there is too little room: {'; '.join(said)}. {advice}"


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "MemFree: 1 kB\n"):
        if text is not None:
            (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(space, "_MEMINFO", tmp_path / "meminfo")
        check_space(tmp_path, disk_bytes=0, memory_bytes=1 << 60)
