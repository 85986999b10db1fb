# SPDX-License-Identifier: Apache-2.0
"""The training text of the bundled model: the source of Python 3.11's standard library, with its tests.

The text is not shipped: it is read from the folder of the running interpreter. What is shipped is the split
(`assets/text/split.json`, made once by `bench/split_stdlib.py`), which names the modules that are never trained on:
the held-out modules, the calibration modules, and those that were left out of both sides because too much of them
also stands in the training text. A module is one file and its name is the path below the standard library's folder,
with forward slashes.
"""

import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from mossquant.errors import InputError

SPLIT_VERSION = 1
PYTHON = (3, 11)

# A module is followed by one newline wherever modules are joined: sources end in a newline, so this is a blank line.
SEPARATOR = b"\n"

# Not part of Python's source: installed packages, and files that a build writes with the paths of its own machine.
NOT_SOURCE = (
    "site-packages/*",
    "dist-packages/*",
    "lib-dynload/*",
    "config-*/*",
    "_sysconfigdata_*.py",
    "*/__pycache__/*",
)


@dataclass(frozen=True)
class Split:
    """Which modules are kept away from training, as paths below the standard library's folder.

    `python` is the version that the split was made on, `training_sha256` the digest of its training text
    (that of another 3.11.x differs, and so does what is trained on it).
    """

    python: str
    heldout: tuple[str, ...]
    calibration: tuple[str, ...]
    dropped: tuple[str, ...]
    training_sha256: str

    @property
    def withheld(self) -> frozenset[str]:
        """Every module that training must not read."""
        return frozenset((*self.heldout, *self.calibration, *self.dropped))


def load_split() -> Split:
    """The split that ships with the package. Raises `InputError` where its version is unknown."""
    stored: dict[str, Any] = json.loads((resources.files("mossquant") / "assets/text/split.json").read_bytes())
    if stored.get("version") != SPLIT_VERSION:
        raise InputError(
            f"assets/text/split.json has version {stored.get('version')!r}, this release reads {SPLIT_VERSION}: "
            "install the package again"
        )
    return Split(
        python=stored["python"],
        heldout=tuple(entry["path"] for entry in stored["heldout"]["modules"]),
        calibration=tuple(entry["path"] for entry in stored["calibration"]["modules"]),
        dropped=tuple(entry["path"] for entry in stored["dropped"]),
        training_sha256=stored["training"]["sha256"],
    )


def stdlib_folder() -> Path:
    """Where the running interpreter keeps its standard library.

    Raises `InputError` if it is not Python 3.11, or if its tests are not installed.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    running = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] != PYTHON:
        raise InputError(
            f"the bundled training text is the standard library of Python 3.11, and this is Python {running}: "
            "run mossquant with a full Python 3.11, or give --text PATH"
        )
    if not (folder / "test" / "test_typing.py").is_file():
        raise InputError(
            f"{folder}: this Python {running} was installed without its tests (test/test_typing.py is missing), "
            "which are three fifths of the training text: use a full install (python.org, pyenv, or Debian's "
            "libpython3.11-testsuite), or give --text PATH"
        )
    return folder


def stdlib_paths(folder: Path) -> Iterator[str]:
    """The names of the modules below `folder`, sorted, without those that match `NOT_SOURCE`."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for name in sorted(names):
        if not any(fnmatchcase(name, pattern) for pattern in NOT_SOURCE):
            yield name


def read_modules(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, text) of each module that has text; empty modules and those that are not UTF-8 are passed over."""
    for name in names:
        data = (folder / name).read_bytes()
        if data and _is_utf8(data):
            yield name, data


def training_text() -> list[tuple[str, bytes]]:
    """(name, text) of each training module, sorted by name: all modules but those that the split withholds.

    About 30 MB. Raises `InputError` as `stdlib_folder` does.
    """
    folder = stdlib_folder()
    withheld = load_split().withheld
    return list(read_modules(folder, (name for name in stdlib_paths(folder) if name not in withheld)))


def join_modules(texts: Iterable[bytes]) -> bytes:
    """The modules in the given order, each followed by `SEPARATOR`."""
    return b"".join(data + SEPARATOR for data in texts)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
