# SPDX-License-Identifier: Apache-2.0
"""The split of the standard library: what it lists, and that the text of this interpreter obeys it."""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mossquant.errors import InputError
from mossquant.text import stdlib_text
from mossquant.text.text import bundled_text

WINDOW = 50
LARGEST_SHARE = 0.05

Hashes = npt.NDArray[np.uint64]


def split_json() -> dict:  # type: ignore[type-arg]
    folder = Path(stdlib_text.__file__).parents[1] / "assets" / "text"
    return json.loads((folder / "split.json").read_bytes())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def training() -> list[tuple[str, bytes]]:
    try:
        stdlib_text.stdlib_folder()
    except InputError as error:
        pytest.skip(str(error))
    return stdlib_text.training_text()


def window_hashes(data: bytes) -> Hashes:
    """One 64-bit polynomial hash (modulus 2^64) for each window of 50 characters, by doubling: 50 = 32 + 16 + 2."""
    characters = np.frombuffer(data.decode("utf-8").encode("utf-32-le"), np.uint32).astype(np.uint64)
    # Mixed first, so that neighbouring characters are far apart.
    single = (characters + 1) * np.uint64(0x9E3779B97F4A7C15)
    hashes = {1: single ^ (single >> np.uint64(29))}
    for length in (2, 4, 8, 16, 32):
        hashes[length] = joined(hashes[length // 2], length // 2, hashes[length // 2])
    return joined(joined(hashes[32], 32, hashes[16]), 48, hashes[2])


def joined(left: Hashes, length: int, right: Hashes) -> Hashes:
    """The hashes of windows of `length` followed by the windows of `right`, from the hashes of both."""
    count = max(0, min(len(left), len(right) - length))
    factor = np.uint64(pow(0xD1342543DE82EF95, length, 1 << 64))
    return left[:count] + right[length : length + count] * factor


def test_window_hashes_tell_windows_apart() -> None:
    text = ("abcdefghij" * 7 + "é" + "abcdefghij" * 6).encode()
    hashes = window_hashes(text)
    string = text.decode()
    windows = [string[i : i + WINDOW] for i in range(len(string) - WINDOW + 1)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows))
    assert hashes[0] == hashes[10] == window_hashes(string[71:121].encode())[0]
    assert len(window_hashes(b"a" * 49)) == 0


def test_split_lists_enough_and_nothing_twice() -> None:
    split = stdlib_text.load_split()
    stored = split_json()
    assert len(split.heldout) >= 40
    assert stored["heldout"]["bytes"] >= 1_000_000
    assert stored["calibration"]["bytes"] >= 500_000
    names = [*split.heldout, *split.calibration, *split.dropped]
    assert len(names) == len(set(names)) == len(split.withheld)
    assert sum("test" in name for name in split.heldout) >= 15
    assert sum("test" not in name for name in split.heldout) >= 15
    for part in ("heldout", "calibration"):
        assert all(module["shared_share"] <= LARGEST_SHARE for module in stored[part]["modules"])
    assert all(module["shared_share"] > LARGEST_SHARE for module in stored["dropped"])
    assert all(module["shared_with_calibration"] <= LARGEST_SHARE for module in stored["heldout"]["modules"])


@pytest.mark.slow
def test_shares_hold_against_the_training_text(training: list[tuple[str, bytes]]) -> None:
    """Counted anew, by another method than the one that made the split."""
    stored = split_json()
    same_python = platform.python_version() == stored["python"]
    modules: list[tuple[dict, Hashes]] = []  # type: ignore[type-arg]
    for part in ("heldout", "calibration"):
        data = bundled_text(part).data
        start = 0
        for module in stored[part]["modules"]:
            modules.append((module, window_hashes(data[start : start + module["bytes"]])))
            start += module["bytes"] + 1
    # Most windows of the training text are told from ours by 24 of their bits; the rest are compared whole.
    mask = np.uint64((1 << 24) - 1)
    maybe = np.zeros(1 << 24, np.bool_)
    for _, hashes in modules:
        maybe[hashes & mask] = True
    trained = (window_hashes(data) for _, data in training)
    known = np.unique(np.concatenate([hashes[maybe[hashes & mask]] for hashes in trained]))
    for module, hashes in modules:
        share = (known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes).mean()
        assert share <= LARGEST_SHARE, (module["path"], share)
        if same_python:
            assert share == pytest.approx(module["shared_share"], abs=1e-5), module["path"]


def test_training_text_leaves_out_what_is_withheld(training: list[tuple[str, bytes]]) -> None:
    names = [name for name, _ in training]
    assert names == sorted(names)
    assert not stdlib_text.load_split().withheld & set(names)
    assert not any(name.startswith(("site-packages/", "_sysconfigdata")) for name in names)
    assert sum(len(data) for _, data in training) > 25_000_000
    if platform.python_version() == split_json()["python"]:
        stored = split_json()["training"]
        assert len(training) == stored["modules"]
        joined_text = stdlib_text.join_modules(data for _, data in training)
        assert hashlib.sha256(joined_text).hexdigest() == stored["sha256"]


def test_only_source_is_listed(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/c.py",
        "site-packages/x.py",
        "_sysconfigdata__linux.py",
        "config-3.11-arm/python-config.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "data.txt").write_text("x\n")
    assert list(stdlib_text.stdlib_paths(tmp_path)) == ["a/c.py", "b.py"]


def test_modules_without_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    names = list(stdlib_text.stdlib_paths(tmp_path))
    assert names == ["a.py", "empty.py", "latin.py"]
    assert list(stdlib_text.read_modules(tmp_path, names)) == [("a.py", b"x = 1\n")]


def test_an_install_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossquant.text.stdlib_text.sys.version_info", (3, 11, 9))
    monkeypatch.setattr("mossquant.text.stdlib_text.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match=r"3\.11\.9 was installed without its tests.*--text PATH") as caught:
        stdlib_text.training_text()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossquant.text.stdlib_text.sys.version_info", (3, 12, 1))
    with pytest.raises(InputError, match=r"Python 3\.11, and this is Python 3\.12\.1: run mossquant with"):
        stdlib_text.training_text()
