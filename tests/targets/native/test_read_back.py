# SPDX-License-Identifier: Apache-2.0
"""Reading back: it passes on what was exported, and names the first difference of what was changed."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from lowered import MODELS, Lowered, Workshop
from lowered import read_back as verify

from mossquant.errors import InputError
from mossquant.targets.native.open import open_program

LAYOUTS = ("x86", "arm", "rows")


@pytest.mark.parametrize(
    ("model", "recipe", "isa"),
    [
        *((model, recipe, None) for model in MODELS for recipe in (None, "int4")),
        *(("wide", recipe, isa) for recipe in ("int8", "g128", "one input") for isa in LAYOUTS),
    ],
)
def test_what_was_exported_passes(workshop: Workshop, model: str, recipe: str | None, isa: str | None) -> None:
    lowered = workshop(model, recipe, target="native", isa=isa)
    report = verify(lowered.checkpoint, lowered.artifact)
    assert (report.differences, report.summary) == ((), "all equal")


def _changed(lowered: Lowered, folder: Path, name: str, place: int, bits: int) -> Path:
    """A copy of the program with some bits of one byte of a tensor flipped; a place below 0 counts from its end."""
    opened, path = open_program(lowered.program), folder / "model.moss"
    data, span = bytearray(lowered.program.read_bytes()), opened.spans[name]
    data[(span.start if place >= 0 else span.stop) + place] ^= bits
    path.write_bytes(data)
    return path


AT = "backbone.layers.0.mixer"
CHANGES = [
    # The embedding is [80, 48] in two blocks of 32: strips of 16 rows, 32 columns in 16 · 16 bytes and scales in 64.
    ("backbone.embeddings.weight", 576 + 4 * 3 + 1, 0x10, r"embeddings\.weight: code \[19, 17\] is"),
    ("backbone.embeddings.weight", 512 + 2 * 5, 0x01, r"embeddings\.weight: scale \[5, 0\] is"),
    # Columns 48 to 63 fill the second block up: byte 256 holds columns 32 and 48 of row 0.
    ("backbone.embeddings.weight", 256, 0x10, r"embeddings\.weight: has padding that is not what"),
    ("backbone.embeddings.weight", 256, 0x01, r"embeddings\.weight: code \[0, 32\] is"),
    # Of in_proj [192, 48] the rows of z begin after six strips.
    (f"{AT}.in_proj.weight", 6 * 576, 0x01, r"in_proj\.weight: code \[96, 0\] is"),
    # x_proj has 44 rows: the last strip is filled up with four.
    (f"{AT}.experts.1.x_proj.weight", -1, 0x01, r"experts\.1\.x_proj\.weight: has padding that is not what"),
    (f"{AT}.conv1d.bias", 5, 0x04, r"conv1d\.bias: code \[0, 5\] is"),
    (f"{AT}.D", -1, 0x80, r"mixer\.D: has padding that is not what"),
    (f"{AT}.router.weight", 4, 0x01, r"router\.weight: value \[0, 1\] is"),
    ("backbone.norm_f.weight", 191, 0x80, r"norm_f\.weight: value \[0, 47\] is"),
]


@pytest.mark.parametrize(("name", "place", "bits", "message"), CHANGES)
def test_a_changed_bit_is_named(
    workshop: Workshop, tmp_path: Path, name: str, place: int, bits: int, message: str
) -> None:
    lowered = workshop("wide", "int4", target="native", isa="x86")
    report = verify(lowered.checkpoint, _changed(lowered, tmp_path, name, place, bits))
    assert len(report.differences) == 1
    assert re.search(message, report.differences[0])


@pytest.mark.parametrize(("recipe", "isa"), [(None, "x86"), *(("one input", isa) for isa in LAYOUTS)])
def test_every_byte_matters(workshop: Workshop, tmp_path: Path, recipe: str | None, isa: str) -> None:
    """Whatever byte of whatever tensor is changed, reading back sees it, padding included."""
    lowered, random = workshop("wide", recipe, target="native", isa=isa), np.random.default_rng(0)
    opened, data = open_program(lowered.program), bytearray(lowered.program.read_bytes())
    for span in opened.spans.values():
        data[int(random.integers(span.start, span.stop))] ^= 1 << int(random.integers(8))
    (tmp_path / "model.moss").write_bytes(data)
    found = [line.split(":")[0] for line in verify(lowered.checkpoint, tmp_path / "model.moss").differences]
    assert found == list(opened.specs)


def test_a_program_of_something_else(workshop: Workshop) -> None:
    int8 = workshop("wide", "int8", target="native")
    report = verify(workshop.checkpoint("wide", "int4"), int8.artifact)
    assert "embeddings.weight: is stored in int8, the checkpoint has int4_g32 (and " in report.summary
    assert report.another
    with pytest.raises(InputError, match="is a model of another shape than"):
        verify(workshop.checkpoint("experts", "int4"), int8.artifact)


def test_a_program_is_held_against_the_manifest_beside_it(workshop: Workshop, tmp_path: Path) -> None:
    lowered = workshop("wide", "int4", target="native", isa="x86")
    folder = Path(shutil.copytree(lowered.artifact, tmp_path / "artifact"))
    shutil.copy(_changed(lowered, tmp_path, f"{AT}.D", 0, 1), folder)
    with pytest.raises(InputError, match=r"is not what its manifest\.json says: model\.moss has another SHA-256"):
        verify(lowered.checkpoint, folder)
