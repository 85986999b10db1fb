# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all, and replace nothing that somebody may miss."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.files.outputs import check_free, check_outside, json_bytes, new_file, new_folder, write_json

CONFIG = {"version": 1, "model_type": "mossnet"}
QUANTIZED = {"version": 1, "kind": "quantized checkpoint", "release": "1.0", "files": {"config.json": {}, "inner": {}}}
ARTIFACT = {**QUANTIZED, "kind": "artifact"}
FULL = ("model-00001.safetensors", "model.safetensors.index.json", "training.json", "tokenizer.json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, **files: object) -> Path:
    """A folder with these JSON files in it."""
    folder.mkdir()
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_an_output_appears_when_the_block_ends(tmp_path: Path) -> None:
    above = tmp_path / "deep" / "er"
    with new_folder(above / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
        assert names(above) == [partial.name]
    assert (above / "out" / "inner" / "a").read_text() == "a"
    with new_file(above / "out.json") as partial:
        write_json(partial, {"é": [1]})
        assert names(above) == sorted([partial.name, "out"])
    assert (above / "out.json").read_bytes() == '{\n "é": [\n  1\n ]\n}\n'.encode()
    assert names(above) == ["out", "out.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "folder", config=CONFIG)
    (tmp_path / "file").write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    for name in ("folder", "deep/er/out"):
        with pytest.raises(error), new_folder(tmp_path / name, force=True) as partial:
            fail(partial / "a")
    for name in ("file", "deep/er/out.json"):
        with pytest.raises(error), new_file(tmp_path / name, force=True) as partial:
            fail(partial)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == ["config.json"]
    assert (tmp_path / "file").read_text() == "old"


def test_force_replaces_a_file_an_empty_folder_and_one_of_ours(tmp_path: Path) -> None:
    fill(tmp_path / "empty")
    full = fill(tmp_path / "full", config=CONFIG)
    for name in FULL:
        (full / name).touch()
    fill(tmp_path / "quantized", config=CONFIG, manifest=QUANTIZED)
    fill(tmp_path / "artifact", manifest=ARTIFACT)
    for name in names(tmp_path):
        with new_folder(tmp_path / name, force=True) as partial:
            (partial / "new").write_text("new")
        assert names(tmp_path / name) == ["new"]
    for content in ("1", "2"):
        with new_file(tmp_path / "file", force=True) as partial:
            partial.write_text(content)
    assert (tmp_path / "file").read_text() == "2"
    assert names(tmp_path) == ["artifact", "empty", "file", "full", "quantized"]


@pytest.mark.parametrize(
    "files",
    [
        {"cat": {}},
        {"config": {"model_type": "mamba"}},
        {"manifest": {**ARTIFACT, "files": []}},
        {"config": CONFIG, "ledger": {}, "manifest": "damaged"},
    ],
)
def test_force_keeps_a_folder_of_somebody_else(tmp_path: Path, files: dict[str, object]) -> None:
    folder = fill(tmp_path / "out", **files)
    with pytest.raises(InputError, match="mossquant did not write"), new_folder(folder, force=True):
        pytest.fail("the block must not run")
    assert names(folder) == [f"{name}.json" for name in files]


@pytest.mark.parametrize("files", [{"config": CONFIG}, {"manifest": QUANTIZED}, {"manifest": ARTIFACT}])
@pytest.mark.parametrize("name", ["notes.txt", "inner", "model-1.safetensors"])
def test_force_keeps_what_was_added_to_a_folder_of_ours(tmp_path: Path, files: dict[str, object], name: str) -> None:
    folder = fill(tmp_path / "out", **files)
    check_free(folder, force=True)
    (folder / name).mkdir() if name == "inner" else (folder / name).write_text("mine")
    with pytest.raises(InputError, match=f"out holds {re.escape(name)}, which mossquant did not write"):
        check_free(folder, force=True)


def test_what_appears_during_the_work_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"), new_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()
    ours = fill(tmp_path / "ours", config=CONFIG)
    with pytest.raises(InputError, match="did not write"), new_folder(ours, force=True):
        (ours / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"), new_file(tmp_path / "file"):
        (tmp_path / "file").write_text("mine")
    assert names(tmp_path) == ["file", "new", "ours"]
    assert names(ours) == ["config.json", "notes.txt"]


def test_no_file_is_written_into_a_folder_of_ours(tmp_path: Path) -> None:
    for folder in (fill(tmp_path / "full", config=CONFIG), fill(tmp_path / "artifact", manifest=ARTIFACT)):
        for name in (*names(folder), "new"):
            with pytest.raises(InputError, match="lies in a checkpoint or artifact"):
                check_outside(folder / name)
    check_outside(tmp_path / "elsewhere")


@pytest.mark.parametrize("output", ["model", "model/inside", ".", "link/inside"])
def test_an_output_may_not_be_its_input(tmp_path: Path, output: str) -> None:
    (tmp_path / "link").symlink_to(fill(tmp_path / "model", config=CONFIG))
    with pytest.raises(InputError, match="is, holds or lies in the input"):
        check_free(tmp_path / output, force=True, inputs=[tmp_path / "model"])


REFUSED = [
    # output, as a file, with --force, message
    ("file", True, False, "exists already; .*--force"),
    ("folder", False, False, "exists already"),
    ("file", False, True, "file is there and not a folder"),
    ("folder", True, True, "folder is there and not a file"),
    ("link", False, True, "is there and not a folder"),
    ("dangling", False, False, "is there and not a folder"),
    ("fifo", True, True, "is there and not a file"),
    ("/dev/null", True, True, "is there and not a file"),
    ("file/below", False, False, "file is not a folder, or not writable, so"),
    ("loop/below", False, False, "loop is not a folder, or not writable, so"),
    ("", False, True, "holds the working folder"),
    ("/", False, True, "holds the working folder"),
    ("n" * 300, False, False, "cannot be written"),
    ("/proc/out", False, False, "cannot be written"),
    (os.fsdecode(b"\xff-out"), False, False, "is not a name in UTF-8"),
]


@pytest.mark.parametrize(("name", "as_file", "force", "message"), REFUSED)
def test_paths_that_are_refused(
    name: str, as_file: bool, force: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    fill(tmp_path / "folder")
    for link, target in (("link", "folder"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / link).symlink_to(target)
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    with pytest.raises(InputError, match=message):
        check_free(Path(name), force=force, as_file=as_file)
    with pytest.raises(InputError, match=message), (new_file if as_file else new_folder)(Path(name), force=force):
        pytest.fail("the block must not run")
    assert names(tmp_path) == before


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so that the system's answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for output in (tmp_path, tmp_path / "new" / "out"):
        with pytest.raises(InputError, match="not writable"):
            check_free(output, force=True)


KILLED = """
import sys, time
from pathlib import Path
from mossquant.files.outputs import new_file
with new_file(Path(sys.argv[1]), force=True) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_nothing_that_the_next_run_does_not_clear(tmp_path: Path) -> None:
    """Of a file; what is left of a folder is in tests/test_killed.py."""
    path = tmp_path / "odd [name] *"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert len(names(tmp_path)) == 1, "the partial output lies beside"
    with new_file(path) as partial:
        partial.write_text("whole")
    assert names(tmp_path) == [path.name]


def test_only_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    kept = (".out.partial", ".out.mossquant-partial-2", ".another.mossquant-partial")
    for name in (*kept, ".out.mossquant-partial", ".out.mossquant-replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    with new_folder(tmp_path / "out") as partial:
        assert names(partial) == []
    assert names(tmp_path) == sorted([*kept, "out"])


def test_json_is_the_same_bytes_and_never_nan() -> None:
    assert json_bytes({"b": 1, "a": 0.1}) == b'{\n "b": 1,\n "a": 0.1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"x": float("nan")})
