# SPDX-License-Identifier: Apache-2.0
"""Every kernel's name follows the grammar in kernels/NAMES.md, and stands in the file its name says."""

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
LISTS = sorted(KERNELS.glob("*/kernels.inc"))
ENTRY = re.compile(r"^MOSS_([A-Z]+)_KERNEL\((\w+), (\w+), (\w+)\)$", re.MULTILINE)


def words(column: str) -> dict[str, tuple[str, ...]]:
    """The table of NAMES.md whose first column is headed `column`: first cell to the other cells."""
    lines = (KERNELS / "NAMES.md").read_text().splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == column) + 2
    table = {}
    for row in rows[start:]:
        if not re.fullmatch(r"[a-z0-9]+", row[0]) or row[0] in ("op", "type", "isa"):
            break
        table[row[0]] = tuple(row[1:])
    return table


def test_the_tables_are_read() -> None:
    assert words("op").keys() == {path.parent.name for path in LISTS}
    assert words("type").keys() == {"f32", "f64"}
    assert {"avx2", "avx512", "portable", "scalar"} <= words("isa").keys()


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.parent.name)
def test_names_follow_the_grammar(path: Path) -> None:
    operations, types, isas = words("op"), words("type"), words("isa")
    text = path.read_text()
    entries = ENTRY.findall(text)
    assert len(entries) == len(re.findall(r"^MOSS_", text, re.MULTILINE)), "an entry that is not understood"
    for macro, flag, real, name in entries:
        moss, op, kind, isa = name.split("_")
        assert moss == "moss"
        assert op in operations
        assert op == path.parent.name == macro.lower()
        assert types[kind] == ({"float": "float32", "double": "float64"}[real] + " throughout",)
        assert isas[isa][1].strip("`") == flag, f"{name}: {flag}, NAMES.md says {isas[isa][1]}"
        source = (path.parent / f"{isa}.cc").read_text()
        assert f" {name} = {{" in source, f"{name} is not defined in {path.parent.name}/{isa}.cc"
        assert f'"{name}"' in source, f"{name} does not bear its own name"
    for kind in ("f32", "f64"):
        names = [name for *_, name in entries if f"_{kind}_" in name]
        assert names[-1].endswith("_scalar"), f"the list of {kind} does not end with the scalar form"
