# SPDX-License-Identifier: Apache-2.0
"""The demo on the bundled model and a few tokens: what it writes, keeps and refuses. Timing has a test of its own."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small import SMALL, random_model, write_model

from mossquant.checkpoint import locate
from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.errors import InputError
from mossquant.eval.bench import BenchReport, Speed, Timing
from mossquant.eval.report import demo as module
from mossquant.eval.report.demo import demo
from mossquant.eval.report.demo_report import DemoReport, demo_table
from mossquant.files.outputs import json_bytes

SUFFIXES = {"onnx": ".onnx", "executorch": ".pte", "native": ".moss"}


def _bench(paths: Sequence[str | Path], **options: Any) -> BenchReport:
    speed = Speed(2.0, 1.0, 3.0)
    timings = tuple(Timing(str(path), "", "", "", speed, speed, 1.0, 1.0, 1.0, 1) for path in paths)
    return BenchReport({"cpu": "a cpu", "cores": 2}, 1, 1.0, 1, 1, 1, timings)


def _small(folder: Path) -> Path:
    """A model with the bundled model's tokenizer, of one block."""
    config = replace(SMALL, vocab_size=4096, num_hidden_layers=1, num_ssm_experts=2, num_mlp_experts=0)
    config = replace(config, mlp_intermediate_size=0)
    write_model(folder, random_model(config, dtype=torch.float32), dtype=torch.bfloat16)
    shutil.copy(asset_folder(BUNDLED) / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module", params=["small", pytest.param("tiny", marks=pytest.mark.slow)])
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, DemoReport, list[str]]]:
    """One run: its folder, its report and what it said. The small model is not lowered to .pte, which takes long."""
    said: list[str] = []
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "bench", _bench)
        patched.setattr(module, "RECIPES", {"int8": 0, "int4-best": 2_000})
        if request.param == "small":
            small = _small(folder / "small")
            patched.setattr(module, "TARGETS", ("onnx",))
            for place in (module, locate):
                patched.setattr(place, "asset_folder", lambda name: small)
        told: list[str] = []
        report = demo(
            folder / "out",
            tokens=300,
            threads=1,
            said=said.append,
            progress=lambda name, done, total: told.append(name),
        )
        stages = ["quantizing by int8:", "quantizing by int4-best:", "lowering:", "measuring:"]
        assert all(any(name.startswith(stage) for name in told) for stage in stages), told
        yield folder / "out", report, said


def test_the_table_has_original_and_every_recipe_as_checkpoint_and_programs(
    ran: tuple[Path, DemoReport, list[str]],
) -> None:
    _, report, _ = ran
    rows = report.rows()
    programs = [("", SUFFIXES[target]) for target in module.TARGETS]
    assert [(row.model, row.form) for row in rows] == [
        ("original, bf16", "checkpoint"),
        ("", ".onnx"),
        ("int8", "checkpoint"),
        *programs,
        ("int4-best", "checkpoint"),
        *programs,
    ]
    assert rows[0].candidate is None
    original, *int8, int4, _ = [row.candidate.kl_mean for row in rows[: 5 + len(programs)] if row.candidate is not None]
    assert original < int8[0] < int8[1] < int4
    assert rows[0].bits_per_weight == 16
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo_table(report))
    text = console.export_text()
    assert "original, bf16" in text
    assert "—" in text
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json_bytes(report.to_json()))["version"] == 1


@pytest.mark.parametrize("ran", [pytest.param("tiny", marks=pytest.mark.slow)], indirect=True)
def test_sizes_of_the_bundled_model(ran: tuple[Path, DemoReport, list[str]]) -> None:
    _, report, _ = ran
    rows = report.rows()
    assert rows[2].bits_per_weight <= 8.7
    checkpoint, *programs = rows[3 + len(SUFFIXES) :]
    assert checkpoint.bits_per_weight <= 4.75
    payload = report.comparison.candidates[1].bytes
    table = 4096 * 256 // 2 + 4096 * 8 * 2
    onnx, pte, moss = (row.file_bytes for row in programs)
    assert onnx <= 1.08 * payload
    assert pte <= 1.3 * (payload + table)
    assert moss <= 1.08 * payload


def test_what_it_wrote_is_there_and_named_at_the_end(ran: tuple[Path, DemoReport, list[str]]) -> None:
    folder, report, _ = ran
    names = {
        "tiny-int8",
        "tiny-int4-best",
        "tiny-app",
        "tiny-int8-app",
        "tiny-int4-best-app",
        "table.svg",
        "measured.json",
        "asked.json",
    }
    assert {path.name for path in folder.iterdir()} == names
    closing = "\n".join(report.closing())
    assert all(name in closing for name in names - {"measured.json", "asked.json"})
    assert report.generation.text
    picture = (folder / "table.svg").read_text()
    assert picture.startswith("<svg")
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_a_second_run_keeps_what_matches_and_makes_again_what_does_not(
    ran: tuple[Path, DemoReport, list[str]],
) -> None:
    folder, first, said_first = ran
    assert not any("kept" in line for line in said_first)
    program = folder / "tiny-app" / "model.onnx"
    whole = program.read_bytes()
    program.write_bytes(whole[:-1])
    (folder / "notes.txt").write_text("mine")
    said: list[str] = []
    again = demo(folder, tokens=300, threads=1, said=said.append)
    assert sum("kept" in line for line in said) == 5
    assert not any("measuring" in line for line in said)
    assert [line for line in said if "lowering" in line] == [f"{folder / 'tiny-app'}: lowering tiny to onnx"]
    assert program.read_bytes() == whole
    assert again.comparison.to_json() == first.comparison.to_json()
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()


def test_what_was_made_by_another_recipe_is_made_again(ran: tuple[Path, DemoReport, list[str]]) -> None:
    folder, _, _ = ran
    kept, model = folder / "asked.json", folder / "tiny-int8" / "model.safetensors"
    whole, before = kept.read_text(), model.read_bytes()
    kept.write_text(whole.replace('"recipe": "', '"recipe": "0', 1))
    said: list[str] = []
    demo(folder, tokens=300, threads=1, said=said.append)
    assert [line for line in said if "quantizing" in line] == [f"{folder / 'tiny-int8'}: quantizing tiny by int8"]
    assert (kept.read_text(), model.read_bytes()) == (whole, before)


def test_what_was_measured_on_other_files_is_measured_again(ran: tuple[Path, DemoReport, list[str]]) -> None:
    folder, first, _ = ran
    kept = folder / "measured.json"
    whole = kept.read_text()
    kept.write_text(whole.replace('"model.safetensors": "', '"model.safetensors": "0', 1))
    said: list[str] = []
    again = demo(folder, tokens=300, threads=1, said=said.append)
    assert sum("measuring" in line for line in said) == 1
    assert again.comparison.to_json() == first.comparison.to_json()
    assert kept.read_text() == whole


def test_it_does_not_replace_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "tiny-int4-best").mkdir()
    (tmp_path / "tiny-int4-best" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        demo(tmp_path)
    assert (tmp_path / "tiny-int4-best" / "precious.txt").read_text() == "mine"
    (tmp_path / "tiny-int4-best" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="did not write, so it is not replaced"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-int4-best"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        demo(tmp_path / "file")


@pytest.mark.parametrize("name", ["table.svg", "notes.txt"])
def test_it_writes_into_no_folder_of_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name} and nothing that the demo wrote"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_it_does_not_write_into_a_checkpoint(ran: tuple[Path, DemoReport, list[str]]) -> None:
    before = sorted(path.name for path in (ran[0] / "tiny-int4-best").iterdir())
    with pytest.raises(InputError, match=r"holds config\.json and nothing that the demo wrote"):
        demo(ran[0] / "tiny-int4-best")
    assert sorted(path.name for path in (ran[0] / "tiny-int4-best").iterdir()) == before
