# SPDX-License-Identifier: Apache-2.0
"""How the command line behaves as a program: what it prints where, to whom, and how it ends.

What each verb does is in `test_verbs.py`; what is refused in `test_bad_input.py` and `test_bad_options.py`.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from commands import COMMAND, Outcome, command, process, refused, started, streamed

import mossquant
from mossquant.files.outputs import file_sha256
from mossquant.targets.export import export_needs

VERBS = (
    *("demo", "info", "train", "import", "calibrate", "quantize", "recipes"),
    *("export", "perplexity", "compare", "verify", "generate", "bench"),
)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(words: list[str]) -> None:
    outcome = command(*words)
    assert (outcome.status, outcome.err) == (0, "")
    for verb in VERBS:
        assert re.search(rf"^. {verb} ", outcome.out, re.MULTILINE), verb
    assert "--quiet" in outcome.out
    assert "--debug" in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(verb: str) -> None:
    outcome = command(verb, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"Example: mossquant {verb}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_info_of_each_kind(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, tmp_path: Path
) -> None:
    report = tmp_path / "info.json"
    for path, kind in (
        (checkpoint_folder, "checkpoint"),
        (quantized_folder, "quantized checkpoint"),
        (artifact_folder, "onnx"),
        (artifact_folder / "model.onnx", "onnx"),
    ):
        outcome = command("info", path, "--json", report)
        assert (outcome.status, outcome.err) == (0, "")
        assert str(path) in outcome.out
        stored = json.loads(report.read_text())
        assert (stored["version"], stored["kind"], stored["parameters"]) == (1, kind, 278336)
        for file in stored["files"]:
            folder = path.parent if path.is_file() else path
            assert file["sha256"] == file_sha256(folder / file["name"])
            assert file["sha256"][:16] in outcome.out


def test_a_dry_run_writes_nothing_but_its_report(checkpoint_folder: Path, tmp_path: Path) -> None:
    words = ["quantize", checkpoint_folder, "-o", tmp_path / "out"]
    assert command(*words, "--dry-run", "--json", tmp_path / "plan.json").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert command(*words, "--json", tmp_path / "ledger.json").status == 0
    plan, ledger = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "ledger.json"))
    assert [entry["predicted_bytes"] for entry in plan["tensors"]] == [
        entry["written_bytes"] for entry in ledger["tensors"]
    ]
    assert ledger == json.loads((tmp_path / "out" / "ledger.json").read_text())


def test_a_dry_run_says_what_an_export_takes_and_an_export_what_it_leaves_out(
    quantized_folder: Path, artifact_folder: Path, pte_folder: Path, tmp_path: Path
) -> None:
    words = ["export", quantized_folder, "--target", "onnx,executorch", "-o", tmp_path / "out"]
    told = command(*words, "--dry-run")
    assert told.status == 0
    assert list(tmp_path.iterdir()) == []
    needs = export_needs(quantized_folder, target=["onnx", "executorch"])
    for name, figures in {**needs.targets, "all": (needs.disk_bytes, needs.memory_bytes)}.items():
        line = next(line for line in told.out.splitlines() if line.startswith(name))
        assert line.split()[-2:] == [f"{figure / 1e6:.2f}" for figure in figures]
    for name, folder in (("onnx", artifact_folder), ("executorch", pte_folder)):
        taken = sum(path.stat().st_size for path in folder.iterdir())
        assert taken <= needs.targets[name][0] + needs.beside_bytes
    # What the export refuses, its dry run refuses; and without one a folder is needed.
    assert command("export", quantized_folder, "--target", "coreml", "--dry-run").status == 2
    assert "--dry-run" in command("export", quantized_folder).err
    # With one target in the place of another the other program is gone, and that is said.
    shutil.copytree(pte_folder, tmp_path / "out")
    again = ["export", quantized_folder, "-o", tmp_path / "out", "--force"]
    outcome = command(*again)
    assert outcome.status == 0
    assert "the executorch program that was there is gone; --target onnx,executorch makes both" in outcome.err
    assert not (tmp_path / "out" / "model.pte").exists()
    assert "is gone" not in command(*again).err


def test_the_folder_of_the_source_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """Python looks first in the folder that it starts in: in a checkout that holds `mossquant/` alone."""
    (tmp_path / "mossquant").mkdir()
    shutil.copy(mossquant.__file__, tmp_path / "mossquant")
    ran = subprocess.run(
        [sys.executable, "-S", "-c", "import mossquant"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "the folder of mossquant's source, not the installed package; run Python in another folder" in ran.stderr


def test_verify_runs_both_and_names_a_flipped_code(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path
) -> None:
    exact = tmp_path / "exact"
    assert command("export", quantized_folder, "-o", exact, "--activations", "fp32").status == 0
    few = ("--text", text, "--positions", 64, "--stream", 1024)
    report = tmp_path / "report.json"
    passed = command("--quiet", "verify", quantized_folder, exact, *few, "--json", report)
    assert (passed.status, passed.err) == (0, ""), passed
    assert json.loads(report.read_text())["passed"]
    proto = onnx.load(exact / "model.onnx")
    codes = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    codes.raw_data = bytes([codes.raw_data[0] ^ 0x10]) + codes.raw_data[1:]
    (exact / "model.onnx").write_bytes(proto.SerializeToString())
    (exact / "manifest.json").unlink()  # which would refuse the file by its hash
    failed = command("--quiet", "verify", quantized_folder, exact, *few, "--json", report)
    assert failed.status == 1
    assert "FAILED" in failed.out
    assert re.search(r"backbone\.\S+: code \[\d+, \d+\] is -?\d, the checkpoint has -?\d \(1 differ\)", failed.err)
    assert not json.loads(report.read_text())["passed"]


def test_quiet_says_nothing_but_results(quantized_folder: Path, text: Path, tmp_path: Path) -> None:
    few = ("--tokenizer", "bytes", "--steps", 1, "--batch", 2, "--window", 8)
    loud = command("train", "--text", text, "-o", tmp_path / "loud", *few)
    assert loud.status == 0
    assert loud.err.count("\n") >= 2
    words = ["train", "--text", text, "-o", tmp_path / "out", *few]
    quiet = command(*words[:3], "--quiet", *words[3:])
    assert (quiet.status, quiet.err) == (0, "")
    assert quiet.out.startswith(f"{tmp_path / 'out'}: ")
    exporting = ("export", quantized_folder, "-o", tmp_path / "slow", "--activations", "fp32")
    assert command(*exporting, "--quiet").err == ""


def test_after_two_dashes_there_are_no_options(checkpoint_folder: Path) -> None:
    outcome = command("generate", checkpoint_folder, "--max-tokens", 2, "--", "--quiet")
    same = command("generate", checkpoint_folder, "--max-tokens", 2, stdin=b"--quiet")
    assert outcome.status == same.status == 0
    assert outcome.out == same.out


def test_a_table_in_a_pipe_keeps_every_line_whole(quantized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = (
        quantized_folder.parent / "a folder with a name [bold] that is longer than any terminal :smile: is wide" / "x"
    )
    path.parent.mkdir(exist_ok=True)
    shutil.copytree(quantized_folder, path, dirs_exist_ok=True)
    outcome = command("info", path)
    assert f"{path} (quantized checkpoint" in outcome.out
    row = next(line for line in outcome.out.splitlines() if line.startswith("ssm.expert.x_proj"))
    assert row.split() == ["ssm.expert.x_proj", "int4_g32", "8", "45,056", "25,344", "4.50", row.split()[-1]]
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_no_figure(width: int, quantized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    outcome = command("info", quantized_folder)
    for figure in (
        "45,056",
        "25,344",
        "16,384",
        file_sha256(quantized_folder / "config.json")[:16],
    ):
        assert figure in outcome.out, figure
    assert "int4_g32" in outcome.out


def test_the_command_to_try_next_can_be_pasted(checkpoint_folder: Path, tmp_path: Path) -> None:
    outcome = command("quantize", checkpoint_folder, "-o", tmp_path / "two words")
    last = outcome.out.splitlines()[-1]
    assert last.endswith(f"mossquant export '{tmp_path / 'two words'}' -o '{tmp_path / 'two words'}-onnx'")


def test_names_that_are_not_text(checkpoint_folder: Path, tmp_path: Path) -> None:
    """A file name of any bytes, and a terminal that cannot show everything."""
    made = subprocess.run(
        [*COMMAND, "quantize", str(checkpoint_folder), "-r", "int4-uniform", "-o", tmp_path / "\u00fc\x1b[31m"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (made.returncode, made.stderr) == (0, b"")
    assert b"\x1b" not in made.stdout
    said = refused(tmp_path, "quantize", checkpoint_folder, "-o", tmp_path / "\udcff\x1b[31m")
    assert "is not a name in UTF-8" in said
    assert [path.name for path in tmp_path.iterdir()] == ["\u00fc\x1b[31m"]


def gone() -> int:
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_a_reader_that_goes_away(checkpoint_folder: Path, quantized_folder: Path, text: Path, tmp_path: Path) -> None:
    """`| head`: no complaint; what is written is whole, and a gate that failed is told all the same."""
    saving = ["--quiet", "generate", checkpoint_folder, "x", "--max-tokens", 8, "--save-state"]
    assert command(*saving, tmp_path / "whole").status == 0
    for words, status in (
        (["info", checkpoint_folder, "--json", tmp_path / "info.json"], 0),
        (["--quiet", "compare", checkpoint_folder, quantized_folder, "--text", text, "--max-ppl-increase", "-99%"], 1),
        (["generate", checkpoint_folder, "x", "--max-tokens", 10_000_000], 0),
        ([*saving, tmp_path / "cut"], 0),
    ):
        complaint = "" if status == 0 else "gate failed: perplexity rose by more than -99%\n"
        assert streamed(*words, stdout=gone()) == Outcome(status, "", complaint)
    assert json.loads((tmp_path / "info.json").read_text())["version"] == 1
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_under_stdout(checkpoint_folder: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a system with /dev/full")
    with Path("/dev/full").open("w") as full:
        ended = streamed("info", checkpoint_folder, stdout=full.fileno())
    said = "mossquant: the output: No space left on device; free space or choose another path\n"
    assert ended == Outcome(2, "", said)


def test_an_interrupt_from_the_keyboard(checkpoint_folder: Path) -> None:
    (text, text_end), (errors, errors_end) = os.pipe(), os.pipe()
    child = started("generate", checkpoint_folder, "x", "--max-tokens", 10_000_000, stdout=text_end, stderr=errors_end)
    os.close(text_end)
    os.close(errors_end)
    with os.fdopen(text, "rb") as shown, os.fdopen(errors, "rb") as complaints:
        shown.read(1)
        os.kill(child, signal.SIGINT)
        shown.read()
        assert complaints.read() == b"mossquant: stopped\n"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_closed_streams(checkpoint_folder: Path) -> None:
    """As under a service manager: nothing to read from, nowhere to print."""

    def close() -> None:
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
        os.closerange(0, 3)

    for words, status in ((["info", checkpoint_folder], 0), (["generate", checkpoint_folder], 2)):
        assert streamed(*words, before=close).status == status


def test_on_a_terminal(checkpoint_folder: Path, tmp_path: Path) -> None:
    """Progress is shown and taken away; without a prompt nothing is waited for."""
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def watch() -> None:
        with suppress(OSError):  # what the end of a terminal is on Linux
            while data := os.read(ours, 1 << 12):
                seen.append(data)

    watching = threading.Thread(target=watch)
    watching.start()
    made = started("quantize", checkpoint_folder, "-o", tmp_path / "out", stdin=theirs, stderr=theirs)
    assert os.waitpid(made, 0)[1] == 0
    asked = started("generate", checkpoint_folder, stdin=theirs, stdout=theirs, stderr=theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]) == 2
    os.close(theirs)
    watching.join()
    os.close(ours)
    shown = b"".join(seen)
    assert b"quantizing backbone." in shown
    assert b"mossquant: no prompt was given" in shown
    assert shown.index(b"\x1b[2K") < shown.index(b"mossquant: "), "the bar is wiped out"


def test_as_a_module_it_is_the_same_command() -> None:
    outcome = process("--version")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == command("--version").out
