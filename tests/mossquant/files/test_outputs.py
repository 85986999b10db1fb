# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all, whatever happens on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.files import outputs
from mossquant.files.outputs import check_free, check_outside, file_sha256, json_bytes, new_file, new_folder, write_json

OURS = '{"version": 1, "model_type": "mossnet"}'


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "er" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    assert (tmp_path / "deep" / "er" / "out" / "inner" / "a").read_text() == "a"
    assert names(tmp_path / "deep" / "er") == ["out"]


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_file(tmp_path / "deep" / "out.json") as partial:
        write_json(partial, {"é": [1]})
        assert names(tmp_path / "deep") == [partial.name]
    assert (tmp_path / "deep" / "out.json").read_bytes() == '{\n "é": [\n  1\n ]\n}\n'.encode()
    assert names(tmp_path / "deep") == ["out.json"]


def _appear(monkeypatch: pytest.MonkeyPatch, write: Callable[[], object]) -> None:
    """Somebody writes in the moment between the last look at the output and its renaming."""
    renamed = outputs._renamed

    def late(one: Path, other: Path, how: int) -> bool:
        write()
        return renamed(one, other, how)

    monkeypatch.setattr(outputs, "_renamed", late)


def test_what_appears_at_the_last_moment_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    _appear(monkeypatch, lambda: (folder.mkdir(exist_ok=True), file.write_text("mine")))
    with pytest.raises(InputError, match="folder appeared meanwhile"), new_folder(folder) as partial:
        (partial / "a").write_text("a")
    with pytest.raises(InputError, match="file exists already"), new_file(file) as partial:
        partial.write_text("a")
    file.unlink()
    with pytest.raises(InputError, match="file appeared meanwhile"), new_file(file) as partial:
        partial.write_text("a")
    assert names(folder) == []
    assert file.read_text() == "mine"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("swap", [True, False], ids=["swapped in one step", "where the system cannot swap"])
def test_what_is_added_at_the_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(OURS)
    if not swap:
        monkeypatch.setattr(outputs, "_renamed", lambda one, other, how: False)
    _appear(monkeypatch, lambda: (folder / "notes.txt").write_text("mine"))
    with pytest.raises(InputError, match="was written to meanwhile"), new_folder(folder, force=True) as partial:
        (partial / "config.json").write_text("{}")
    assert (folder / "config.json").read_text() == OURS
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["folder"]


def test_a_file_that_appears_is_not_replaced_by_force_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To replace was asked for when nothing was there."""
    file = tmp_path / "file"
    _appear(monkeypatch, lambda: file.write_text("mine"))
    with pytest.raises(InputError, match="file appeared meanwhile"), new_file(file, force=True) as partial:
        partial.write_text("a")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("as_file", [False, True])
def test_a_folder_below_a_link_that_leads_nowhere(tmp_path: Path, as_file: bool) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"link is not a folder, so .*link/deep/out cannot be written"):
        check_free(tmp_path / "link" / "deep" / "out", as_file=as_file)


def test_a_folder_that_could_not_be_removed_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(OURS)
    check_free(tmp_path, force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="belongs to somebody else, so it is not replaced"):
        check_free(tmp_path, force=True)


def test_a_mount_point_is_not_replaced() -> None:
    with pytest.raises(InputError, match="/proc is a mount point"):
        check_free(Path("/proc"), force=True)


def test_a_damaged_manifest_is_not_called_somebody_elses(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name, text in (("config.json", OURS), ("ledger.json", "{}"), ("manifest.json", '{"version": 1, "ki')):
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=r"did not write, or its manifest\.json is damaged, so it is not replaced"):
        check_free(folder, force=True)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_name_that_could_not_be_opened_again_is_refused(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / os.fsdecode(b"\xff-out")
    with pytest.raises(InputError, match="is not a name in UTF-8"):
        check_free(path, as_file=as_file)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "deep" / "er" / "out") as partial:
        fail(partial / "a")
    with pytest.raises(error), new_file(tmp_path / "out.json") as partial:
        fail(partial)
    assert names(tmp_path) == []


def test_what_was_there_stays_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(OURS)
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", force=True):
        raise RuntimeError
    with pytest.raises(RuntimeError), new_file(tmp_path / "file", force=True):
        raise RuntimeError
    assert names(tmp_path) == ["file", "out"]
    assert (tmp_path / "out" / "config.json").read_text() == OURS
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("swap", [True, False], ids=["swapped in one step", "where the system cannot swap"])
def test_force_replaces(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(outputs, "_renamed", lambda one, other, how: False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(OURS)
    with new_folder(tmp_path / "folder", force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]
    with new_file(tmp_path / "plain") as partial:
        partial.write_text("1")
    with new_file(tmp_path / "plain", force=True) as partial:
        partial.write_text("2")
    assert (tmp_path / "plain").read_text() == "2"


def test_force_leaves_a_folder_of_someone_else_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(InputError, match="did not write"), new_folder(tmp_path / "photos", force=True):
        raise AssertionError("must not be reached")
    assert names(tmp_path / "photos") == ["cat.jpg"]


def test_force_leaves_a_file_and_another_tools_model_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match="is a file"), new_folder(tmp_path / "notes.txt", force=True):
        raise AssertionError("must not be reached")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match="did not write"), new_folder(tmp_path / "hf", force=True):
        raise AssertionError("must not be reached")
    assert (tmp_path / "notes.txt").read_text() == "notes"


LISTED = {"config.json": {}, "recipe.yaml": {}}
QUANTIZED = {"version": 1, "kind": "quantized checkpoint", "release": "1.0", "files": LISTED}
ARTIFACT = {**QUANTIZED, "kind": "artifact"}


@pytest.mark.parametrize(
    "manifest",
    [{"version": 1}, {"version": 3, "kind": "extension"}, {**ARTIFACT, "files": []}, {"kind": "artifact"}, ["version"]],
)
def test_force_takes_no_manifest_of_someone_else_for_ours(tmp_path: Path, manifest: object) -> None:
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "manifest.json", manifest)
    with pytest.raises(InputError, match="is a folder that mossquant did not write"):
        check_free(tmp_path / "out", force=True)


@pytest.mark.parametrize("manifest", [None, QUANTIZED, ARTIFACT], ids=["checkpoint", "quantized", "artifact"])
@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "photos", "model-1.safetensors"])
def test_force_keeps_what_was_added_to_a_folder_of_ours(tmp_path: Path, manifest: object, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(OURS)
    if manifest is None:
        for file in ("model-00001.safetensors", "model.safetensors.index.json", "training.json", "tokenizer.json"):
            (out / file).write_text("")
    else:
        write_json(out / "manifest.json", manifest)
    check_free(out, force=True)
    (out / name).mkdir() if name == "photos" else (out / name).write_text("mine")
    with pytest.raises(InputError, match=f"out holds {re.escape(name)}, which mossquant did not write") as refused:
        check_free(out, force=True)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="did not write"), new_folder(out, force=True):
        pytest.fail("the block must not run")
    assert (out / name).exists()


def test_force_keeps_a_folder_that_has_the_name_of_a_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "out" / "recipe.yaml").mkdir(parents=True)
    write_json(tmp_path / "out" / "manifest.json", QUANTIZED)
    with pytest.raises(InputError, match=r"holds recipe\.yaml"):
        check_free(tmp_path / "out", force=True)


def test_no_file_is_written_into_a_folder_of_ours(tmp_path: Path) -> None:
    for name, content in (("config.json", json.loads(OURS)), ("manifest.json", ARTIFACT)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / name, content)
        for file in (name, "new"):
            with pytest.raises(InputError, match="lies in a checkpoint or artifact"):
                check_outside(tmp_path / name / file)
    check_outside(tmp_path / "elsewhere")


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("target", ["folder", "file", "nowhere"])
def test_a_link_is_not_replaced(tmp_path: Path, target: str, force: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(target)
    for new in (new_folder, new_file):
        message = "link is a link, and no link is replaced"
        with pytest.raises(InputError, match=message), new(tmp_path / "link", force=force):
            pytest.fail("the block must not run")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("output", ["model", "model/inside", "."])
def test_an_output_may_not_be_its_input(tmp_path: Path, output: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(OURS)
    with pytest.raises(InputError, match="the input"):
        outputs.check_free(tmp_path / output, force=True, inputs=[tmp_path / "model"])


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").write_text("another run's")
    assert (tmp_path / "out").read_text() == "another run's"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose renameat2 swaps two folders")
def test_replacing_a_folder_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader finds the old folder or the new one: the only system call that touches the path is the swap."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the path was free for a moment"))
    with new_folder(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


def test_paths_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path / "folder" / "inner")
    for path, force, message in (
        (tmp_path / "file", False, "exists already; .*--force"),
        (tmp_path / "folder", False, "exists already"),
        (tmp_path / "dangling", False, "is a link"),
        (tmp_path / "file" / "below", False, "is not a folder"),
        (tmp_path / "folder", True, "holds the working folder"),
        (Path(), True, "holds the working folder"),
        (Path("/"), True, "holds the working folder"),
        (tmp_path / ("n" * 300), False, "cannot be written"),
        (tmp_path / "loop", True, "is a link"),
        (tmp_path / "loop" / "below", True, "leads to itself"),
        (tmp_path / "fifo", True, "is a device, pipe or socket"),
        (Path("/dev/null"), True, "is a device, pipe or socket"),
        (Path("/dev/stdout"), True, "is a device, pipe or socket"),
    ):
        with pytest.raises(InputError, match=message):
            check_free(path, force=force)
        with pytest.raises(InputError, match=message), new_folder(path, force=force):
            pytest.fail("the block must not run")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="is a folder, and a file"), new_file(tmp_path / "other", force=True):
        pytest.fail("the block must not run")
    (tmp_path / "other").rmdir()
    check_free(tmp_path / "new" / "newer")
    assert names(tmp_path) == ["dangling", "fifo", "file", "folder", "loop"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a system with /proc")
def test_a_folder_that_nobody_can_write() -> None:
    """Permissions do not tell: root may write /proc, and nothing can be made there."""
    with pytest.raises(InputError, match=r"^/proc is not writable \("):
        check_free(Path("/proc/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, who may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="is not writable"):
            check_free(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


KILLED = """
import sys, time
from pathlib import Path
from mossquant.files.outputs import {kind}
with {kind}(Path(sys.argv[1]), force=True) as partial:
    ({file}).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["out", "odd [name] *"])
@pytest.mark.parametrize("kind", ["new_folder", "new_file"])
def test_a_killed_process_leaves_nothing_that_the_next_run_does_not_clear(tmp_path: Path, kind: str, name: str) -> None:
    program = KILLED.format(kind=kind, file="partial" if kind == "new_file" else "partial / 'a'")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / name)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / name).exists()
    assert len(names(tmp_path)) == 1, "the partial output lies beside"
    with getattr(outputs, kind)(tmp_path / name) as partial:
        (partial if kind == "new_file" else partial / "a").write_text("whole")
    assert names(tmp_path) == [name]


def test_another_running_process_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f".out.partial-{os.getppid()}"
    theirs.mkdir()
    ours = tmp_path / f".out.partial-{os.getpid()}"  # of an earlier process that had our number
    ours.mkdir()
    with new_folder(tmp_path / "out") as partial:
        assert partial == ours
        assert names(partial) == []
    assert names(tmp_path) == [theirs.name, "out"]


@pytest.mark.parametrize(
    "suffix", ["backup", "²", "٣", "0", "007", "9999999999", "9" * 20, "123-notes", "123-old-old", ""]
)
def test_what_only_looks_like_a_leftover_is_kept(tmp_path: Path, suffix: str) -> None:
    kept = tmp_path / f".out.partial-{suffix}"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    with new_folder(tmp_path / "out"):
        pass
    assert names(kept) == ["mine"]


def test_what_looking_left_is_removed_too(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-123-probe").mkdir()  # of a run that was killed while it looked whether it may write
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_json_is_the_same_bytes_and_never_nan() -> None:
    assert json_bytes({"b": 1, "a": 0.1}) == b'{\n "b": 1,\n "a": 0.1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"x": float("nan")})


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
