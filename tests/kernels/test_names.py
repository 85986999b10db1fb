# SPDX-License-Identifier: Apache-2.0
"""Every kernel's name follows the grammar in kernels/NAMES.md, and stands in the file its name says."""

import re
from itertools import product
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
LISTS = sorted(KERNELS.glob("*/kernels.inc"))
ENTRY = re.compile(r"^MOSS_([A-Z_]+)_KERNEL\((\w+), (?:(.*), )?(\w+)\)$", re.MULTILINE)
CPP_TYPES = {"float": "f32", "double": "f64"}


def words(column: str) -> dict[str, tuple[str, ...]]:
    """The table of NAMES.md whose first column is headed `column`: first cell to the other cells."""
    lines = (KERNELS / "NAMES.md").read_text("utf-8").splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == column) + 2
    table = {}
    for row in rows[start:]:
        if not re.fullmatch(r"[a-z0-9_]+", row[0]) or row[0] in ("op", "word", "isa"):
            break
        table[row[0]] = tuple(row[1:])
    return table


def numbers_of(op: str) -> dict[str, tuple[str, ...]]:
    """What the grammar lets stand in the middle of the names of `op`, each with its words."""
    places = [place.strip("<>") for place in re.findall(r"<\w+?>", words("op")[op][1])]
    allowed = [[word for word, (_, where) in words("word").items() if place in where.split(", ")] for place in places]
    return {"_".join(chosen): chosen for chosen in product(*allowed)}


def test_the_tables_are_read() -> None:
    assert words("op").keys() == {path.parent.name for path in LISTS}
    assert {"f32", "f64", "int8_block", "int4_g128"} <= words("word").keys()
    assert {"avx2", "avx512", "portable", "scalar"} <= words("isa").keys()
    assert numbers_of("scan") == {"f32": ("f32",), "f64": ("f64",)}
    assert numbers_of("linear")["f32_int8_block_int4_g32"] == ("f32", "int8_block", "int4_g32")


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.parent.name)
def test_names_follow_the_grammar(path: Path) -> None:
    op, isas = path.parent.name, words("isa")
    numbers = numbers_of(op)
    text = path.read_text("utf-8")
    entries = ENTRY.findall(text)
    assert len(entries) == len(re.findall(r"^MOSS_", text, re.MULTILINE)), "an entry that is not understood"
    of_numbers: dict[str, list[str]] = {}
    for macro, flag, selectors, name in entries:
        assert op == macro.lower()
        found = re.fullmatch(f"moss_{op}_({'|'.join(numbers)})_({'|'.join(isas)})", name)
        assert found, f"{name} does not follow the grammar"
        middle, isa = found.groups()
        # What the list is told to choose the kernel by is what the name says last.
        chosen = [CPP_TYPES.get(word, word) for word in selectors.split(", ") if word]
        assert chosen == list(numbers[middle])[len(numbers[middle]) - len(chosen) :], f"{name} stands for {selectors}"
        assert isas[isa][1].strip("`") == flag, f"{name}: {flag}, NAMES.md says {isas[isa][1]}"
        source = (path.parent / f"{isa}.cc").read_text("utf-8")
        assert f" {name} = {{" in source, f"{name} is not defined in {op}/{isa}.cc"
        assert f'"{name}"' in source, f"{name} does not bear its own name"
        of_numbers.setdefault(middle, []).append(name)
    for middle, names in of_numbers.items():
        assert names[-1].endswith("_scalar"), f"the list of {middle} does not end with the scalar form"
