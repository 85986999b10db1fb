# SPDX-License-Identifier: Apache-2.0
"""JSON is read as it is meant: what Python's reader would let through is refused, in little memory."""

from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, parse_json, read_json


def test_values() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, true, "x"], "b": {}}') == {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert parse_json("[" * 32 + "1" + "]" * 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "key 'a' is given twice"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("9" * 5000, "digits"),
        ("[" * 33 + "]" * 33, "nested deeper than 32"),
        ("[" * 100_000, "nested without end"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[1]")
    assert read_json(path, largest=LARGEST_SMALL, advice="copy it again") == [1]
    with pytest.raises(InputError, match=r"is larger than 0 kB; copy it again"):
        read_json(path, largest=2, advice="copy it again")
    path.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"x\.json is not JSON \(.*\); copy it again"):
        read_json(path, largest=LARGEST_SMALL, advice="copy it again")
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\); copy it again"):
        read_json(tmp_path / "nothing", largest=LARGEST_SMALL, advice="copy it again")
