# SPDX-License-Identifier: Apache-2.0
"""Make the split of Python 3.11's standard library into training, held-out and calibration text.

    python bench/split_stdlib.py [-o mossquant/assets/text]

Needs nothing but an interpreter with the tests installed (Python 3.11.7 made the split that ships). It was run once,
before the bundled model was trained; running it again on the same Python writes the same bytes.

1. Candidates are the modules of 4 to 64 kB that are source and not data (`NOT_CANDIDATES`), in the order of the sha256
   of their path: a fixed shuffle that looks at no text.
2. The first n candidates are taken away from training; everything else is the training side. For each of them the
   share of its 50-character windows (one at every position) that also occur in a module of the training side is
   measured. Above 5 % the module is dropped: neither trained nor measured on.
3. The others are dealt in order, to held-out or calibration, whichever is further from its goal. n is the smallest
   number that fills both.

Shares therefore hold against the final training side, whose modules do not include the dropped ones. What held-out
modules share with calibration ones is measured too.
"""

import argparse
import hashlib
import json
import lzma
import platform
import sys
from bisect import bisect_left
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mossquant.text.stdlib_text import (  # noqa: E402
    join_modules,
    read_modules,
    stdlib_folder,
    stdlib_paths,
)

WINDOW = 50
LARGEST_SHARE = 0.05
HELDOUT_BYTES = 1_080_000
HELDOUT_MODULES = 40
CALIBRATION_BYTES = 500_000
CANDIDATE_BYTES = range(4_000, 64_001)
# Shares are exact for as many candidates as fit here; the others stay on the training side.
RANKED_BYTES = 5_000_000

# Tables, generated files, and inputs of tests: text that says little about a language model of source code.
NOT_CANDIDATES = (
    "encodings/*",
    "pydoc_data/*",
    "lib2to3/*",
    "html/entities.py",
    "stringprep.py",
    "locale.py",
    "keyword.py",
    "token.py",
    "__phello__/*",
    "test/bad*",
    "test/encoded_modules/*",
    "test/test_importlib/data*",
    "test/*_data/*",
    "test/test_tools/*",
    "test/test_unicode_identifiers.py",
    "*/tests/data/*",
)


@dataclass(frozen=True)
class Candidate:
    """A module in the running: `last_seen` is the sorted highest rank of a module with each of its windows.

    The rank of a module is its place among the candidates; modules that are no candidates have the rank `endless`.
    """

    path: str
    data: bytes
    last_seen: tuple[int, ...]

    def share(self, withheld: int) -> float:
        """The share of the windows that also occur outside the first `withheld` candidates."""
        return 1 - bisect_left(self.last_seen, withheld) / len(self.last_seen)


def windows(data: bytes) -> list[str]:
    text = data.decode("utf-8")
    return [text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1)]


def rank_candidates(modules: dict[str, bytes]) -> list[Candidate]:
    """The candidates in their order, with the windows of each looked up in every module."""
    eligible = [
        path
        for path, data in modules.items()
        if len(data) in CANDIDATE_BYTES and not any(fnmatchcase(path, pattern) for pattern in NOT_CANDIDATES)
    ]
    eligible.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    ranked: list[str] = []
    size = 0
    for path in eligible:
        size += len(modules[path])
        if size > RANKED_BYTES:
            break
        ranked.append(path)
    endless = len(ranked)
    highest: dict[str, int] = {}
    for rank, path in enumerate(ranked):
        for window in windows(modules[path]):
            highest[window] = rank
    withheld = set(ranked)
    for path, data in modules.items():
        if path not in withheld:
            for window in windows(data):
                if window in highest:
                    highest[window] = endless
    return [
        Candidate(path, modules[path], tuple(sorted(highest[window] for window in windows(modules[path]))))
        for path in ranked
    ]


def deal(candidates: list[Candidate], withheld: int) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """(held-out, calibration, dropped) among the first `withheld` candidates."""
    heldout: list[Candidate] = []
    calibration: list[Candidate] = []
    dropped: list[Candidate] = []
    for candidate in candidates[:withheld]:
        if candidate.share(withheld) > LARGEST_SHARE:
            dropped.append(candidate)
        elif total(heldout) / HELDOUT_BYTES <= total(calibration) / CALIBRATION_BYTES:
            heldout.append(candidate)
        else:
            calibration.append(candidate)
    return heldout, calibration, dropped


def total(candidates: list[Candidate]) -> int:
    return sum(len(candidate.data) for candidate in candidates)


def choose(candidates: list[Candidate]) -> tuple[int, list[Candidate], list[Candidate], list[Candidate]]:
    """The smallest number of withheld candidates that fills both texts, and the three lists."""
    for withheld in range(1, len(candidates) + 1):
        heldout, calibration, dropped = deal(candidates, withheld)
        enough = total(heldout) >= HELDOUT_BYTES and total(calibration) >= CALIBRATION_BYTES
        if enough and len(heldout) >= HELDOUT_MODULES:
            return withheld, heldout, calibration, dropped
    raise SystemExit(f"{len(candidates)} candidates do not fill the two texts: raise RANKED_BYTES")


def overlaps(modules: list[Candidate], others: list[Candidate]) -> list[float]:
    """The share of each module's windows that also occur in `others`."""
    there = {window for other in others for window in windows(other.data)}
    counts = []
    for module in modules:
        own = windows(module.data)
        counts.append(sum(window in there for window in own) / len(own))
    return counts


def entry(candidate: Candidate, withheld: int) -> dict[str, Any]:
    return {
        "path": candidate.path,
        "bytes": len(candidate.data),
        "sha256": hashlib.sha256(candidate.data).hexdigest(),
        "shared_share": round(candidate.share(withheld), 5),
    }


def write_text(folder: Path, name: str, candidates: list[Candidate]) -> dict[str, Any]:
    """Write `name`.txt.xz and return what split.json says of it."""
    text = join_modules(candidate.data for candidate in candidates)
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    (folder / f"{name}.txt.xz").write_bytes(packed)
    return {
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
        "xz_9e_bytes": len(packed),
        "xz_9e_bits_per_byte": round(8 * len(packed) / len(text), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="split Python 3.11's standard library into the three texts")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "mossquant" / "assets" / "text")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    stdlib = stdlib_folder()
    names = list(stdlib_paths(stdlib))
    modules = dict(read_modules(stdlib, names))
    empty = sum((stdlib / name).stat().st_size == 0 for name in names)
    candidates = rank_candidates(modules)
    withheld, heldout, calibration, dropped = choose(candidates)
    away = {candidate.path for candidate in candidates[:withheld]}
    training = [data for path, data in modules.items() if path not in away]

    heldout_entries = [
        entry(candidate, withheld) | {"shared_with_calibration": round(share, 5)}
        for candidate, share in zip(heldout, overlaps(heldout, calibration), strict=True)
    ]
    split = {
        "version": 1,
        "python": platform.python_version(),
        "rule": {
            "window_characters": WINDOW,
            "largest_share": LARGEST_SHARE,
            "candidate_bytes": [CANDIDATE_BYTES.start, CANDIDATE_BYTES.stop - 1],
            "not_candidates": list(NOT_CANDIDATES),
            "order": "sha256 of the path",
            "separator": "\n",
        },
        "source": {
            "modules": len(names),
            "empty": empty,
            "not_utf8": len(names) - empty - len(modules),
            "bytes": sum(len(data) for data in modules.values()),
        },
        "training": {
            "modules": len(training),
            "bytes": sum(len(data) for data in training),
            "sha256": hashlib.sha256(join_modules(training)).hexdigest(),
        },
        "heldout": write_text(folder, "heldout", heldout) | {"modules": heldout_entries},
        "calibration": write_text(folder, "calibration", calibration)
        | {"modules": [entry(candidate, withheld) for candidate in calibration]},
        "dropped": [entry(candidate, withheld) for candidate in dropped],
    }
    (folder / "split.json").write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
    (folder / "LICENSE-python.txt").write_bytes((stdlib / "LICENSE.txt").read_bytes())
    for name, part in (("held-out", heldout), ("calibration", calibration), ("dropped", dropped)):
        largest = max((candidate.share(withheld) for candidate in part), default=0.0)
        print(f"{name:12s} {len(part):4d} modules {total(part):9,d} bytes, largest share {largest:.4f}")
    print(f"{'training':12s} {len(training):4d} modules {sum(map(len, training)):9,d} bytes")


if __name__ == "__main__":
    main()
