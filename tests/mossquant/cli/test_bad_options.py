# SPDX-License-Identifier: Apache-2.0
"""Texts, options and outputs that cannot be used: exit status 2, one line, nothing left; and what is ours alone: 70.

What a reader refuses is tried on the reader; here stands each kind of refusal once, through the command line.
"""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from commands import command, refused, streamed, writing

from mossquant.files.outputs import file_sha256
from mossquant.plan.recipe import Recipe

SMALL_TRAINING = "train --text TEXT -o OUT --tokenizer bytes --batch 2 --window 8"
BAD_OPTIONS = [
    ("perplexity MODEL --text EMPTY", "is empty: give a file with text in it"),
    ("compare MODEL MODEL --text OUT", "cannot be read"),
    ("verify QUANTIZED ARTIFACT --text BYTE", "are too few"),
    ("train --text BYTE -o OUT", "has 2 bytes"),
    ("train --text TEXT -o OUT --tokenizer bytes --batch 64", "32896 tokens are needed for one step"),
    ("perplexity tiny --text LATIN", "is not UTF-8 at byte 2 (0xf6): convert it to UTF-8; only a byte-level model"),
    ("generate tiny --prompt-file LATIN", "is not UTF-8 at byte 2"),
    ("generate MODEL --prompt-file SPARSE", "sparse is larger than 16 MB"),
    ("perplexity MODEL --text SPARSE", "sparse is larger than 8 MB"),
    ("train --text SPARSE -o OUT", "sparse is larger than 256 MB"),
    ("perplexity MODEL --text TEXT --tokens 1", "Invalid value for '--tokens'"),
    ("perplexity MODEL --text TEXT --tokens 100000", "tokens, 100000 were asked for; give a longer text or fewer"),
    ("demo --tokens 100000000 -o OUT", "100000000 tokens cannot be measured on; the held-out text has"),
    ("perplexity MODEL --text TEXT --streams 9000", "are too few for 9000 streams"),
    ("perplexity MODEL --text TEXT --activations int3", "'int3' is not one of 'fp32', 'planned'"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase 1%%", "'1%%' is not a percentage"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase nan%", "is not a number of per cent"),
    ("compare MODEL", "Missing argument 'CANDIDATE'; see mossquant compare --help"),
    ("generate MODEL x --temperature inf", "temperature is inf"),
    ("generate MODEL x --top-p nan", "--top-p is nan, needs more than 0 and at most 1"),
    ("generate MODEL x --max-tokens 0", "--max-tokens is 0, needs 1 or more, or 0 with a state to save"),
    ("generate MODEL x --stop=", "--stop is empty"),
    ("generate MODEL x --prompt-file TEXT", "a prompt and --prompt-file were both given"),
    ("generate MODEL x --messages TEXT", "--messages is the whole conversation; leave the prompt and --chat out"),
    ("generate MODEL --messages TEXT", "is not JSON"),
    ("generate MODEL --messages MODEL/config.json", "declares no chat template; give a prompt without --chat"),
    ("generate MODEL x --chat", "declares no chat template; give a prompt without --chat"),
    ("generate MODEL x --chat --load-state TEXT", "a loaded state: a template writes a text from its beginning"),
    ("generate MODEL -", "the prompt is empty"),
    ("generate MODEL x --load-state OUT", "is not a file; give one that `mossquant generate --save-state` wrote"),
    ("generate MODEL x --load-state TEXT", "is not a state: "),
    ("generate MODEL x --save-state TEXT", "exists already; choose another output path or pass --force to replace it"),
    ("generate MODEL x --save-state TEXT --force", "is not a state, so it is not replaced; choose another path for it"),
    ("generate MODEL x --save-state MODEL/state", "is, holds or lies in the input"),
    ("generate ARTIFACT/model.onnx x --save-state ARTIFACT/state", "lies in a checkpoint or artifact"),
    ("train --text TEXT -o OUT --learning-rate nan", "--learning-rate nan is not between 0 and 1"),
    (f"{SMALL_TRAINING} --work OUT/work", "would lie in the output"),
    (f"{SMALL_TRAINING} --work TEXT", "is not a folder, nor can it be one"),
    ("train --preset huge --text TEXT -o OUT", "unknown preset 'huge'; known presets: tiny, 8x30m, 8x200m, 8x1.5b"),
    ("quantize MODEL", "no output folder was given"),
    ("quantize MODEL -o OUT -r int5", "unknown recipe 'int5'; known recipes: int4, int8"),
    ("export MODEL -o OUT --target abacus", "unknown target 'abacus'; known targets: onnx"),
    ("import MODEL -o OUT --tokenizer TEXT", "is not a tokenizer.json"),
    ("info MODEL --jsn x", "No such option: --jsn"),
    ("shrink", "No such command 'shrink'; see mossquant --help"),
    # Every verb that writes looks at its output first.
    ("quantize MODEL -o TAKEN", "exists already; choose another output path or pass --force to replace it"),
    ("export MODEL -o TAKEN --force", "is a folder that mossquant did not write, so it is not replaced"),
    ("import MODEL -o TEXT --force", "is there and not a folder"),
    ("train --text TEXT -o /dev/null --force", "is there and not a f"),
    ("quantize MODEL -o TEXT/below", "is not a folder, or not writable, so"),
    ("export MODEL -o MODEL/inside --force", "is, holds or lies in the input"),
    ("quantize MODEL -o RECIPE.yaml -r RECIPE.yaml", "is, holds or lies in the input"),
    ("import MODEL -o OUT --tokenizer OUT", "is, holds or lies in the input"),
    ("train --text OUT/book.txt -o OUT", "is, holds or lies in the input"),
    # A report replaces a .json file and nothing else; every verb says so before any work.
    ("info MODEL --json TEXT", "is no name for a report, which is JSON; end it with .json"),
    ("info QUANTIZED --json QUANTIZED/config.json", "is, holds or lies in the input"),
    ("info MODEL --json QUANTIZED/ledger.json", "lies in a checkpoint or artifact"),
    ("perplexity MODEL --text TEXT --json TEXT", "is, holds or lies in the input"),
    ("compare MODEL QUANTIZED --text TEXT --json QUANTIZED/new.json", "is, holds or lies in the input"),
    ("verify QUANTIZED ARTIFACT --text TEXT --json ARTIFACT/new.json", "is, holds or lies in the input"),
    ("bench MODEL QUANTIZED --json QUANTIZED/new.json", "is, holds or lies in the input"),
    ("quantize MODEL --dry-run -r RECIPE.yaml --json RECIPE.yaml", "is, holds or lies in the input"),
    ("quantize MODEL -o OUT --json OUT/new.json", "is, holds or lies in the output"),
    ("quantize MODEL -o OUT/below --json OUT", "is, holds or lies in the output"),
    ("demo -o OUT --json OUT/new.json", "is, holds or lies in the output"),
    ("bench MODEL --json /dev/stdout", "is there and not a f"),
]


@pytest.mark.parametrize(("line", "message"), BAD_OPTIONS, ids=[line for line, _ in BAD_OPTIONS])
def test_bad_options(
    line: str,
    message: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    tmp_path: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    paths = {"MODEL": checkpoint_folder, "QUANTIZED": quantized_folder, "ARTIFACT": artifact_folder, "TEXT": text}
    for name, data in (("EMPTY", b""), ("BYTE", b"x"), ("LATIN", "größer ".encode("latin-1") * 100)):
        paths[name] = tmp_path / name.lower()
        paths[name].write_bytes(data)
    paths["RECIPE.yaml"] = tmp_path / "recipe.yaml"
    paths["RECIPE.yaml"].write_text(Recipe.named("int4-uniform").text)
    paths |= {"SPARSE": tmp_path / "sparse", "OUT": place / "out", "TAKEN": tmp_path / "taken"}
    with paths["SPARSE"].open("wb") as file:
        file.truncate(20 << 30)
    paths["TAKEN"].mkdir()
    (paths["TAKEN"] / "cat.jpg").write_bytes(b"cat")
    words = []
    for word in line.split():
        name, slash, below = word.partition("/")
        words.append(f"{paths[name]}{slash}{below}" if name in paths else word)
    assert message in refused(place, *words)


def reached(path: Path, make: object) -> None:
    """Were anything written after all, it would be to a device of this machine, by root perhaps."""
    raise AssertionError(f"{path} was about to be written")


def test_prompts_on_stdin_end(checkpoint_folder: Path, place: Path) -> None:
    """It is read up to a limit, also where it is `/dev/zero`."""
    message = refused(place, "generate", checkpoint_folder, stdin=b"x" * ((1 << 24) + 1))
    assert "the prompt on stdin is larger than 16 MB" in message


def test_text_that_the_model_has_seen(checkpoint_folder: Path, text: Path, tmp_path: Path, place: Path) -> None:
    model, artifact = shutil.copytree(checkpoint_folder, tmp_path / "model"), tmp_path / "artifact"
    (model / "training.json").write_text(json.dumps({"version": 1, "text": [{"sha256": file_sha256(text)}]}))
    assert command("quantize", model, "-o", tmp_path / "quantized").status == 0
    assert command("export", tmp_path / "quantized", "-o", artifact).status == 0
    for words in (
        ["perplexity", model],
        ["compare", checkpoint_folder, tmp_path / "quantized"],
        ["perplexity", artifact],
    ):
        message = refused(place, *words, "--text", text)
        assert "was used to train or calibrate" in message
        assert "--allow-seen" in message
    outcome = command("perplexity", model, "--text", text, "--allow-seen")
    assert outcome.status == 0
    assert "trained or calibrated on it" in outcome.out


def test_an_output_may_have_the_name_of_a_recipe(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("quantize", checkpoint_folder, "-r", "int8", "-o", "int8").status == 0
    assert command("quantize", checkpoint_folder, "-r", "int8", "-o", "int8", "--force").status == 0


@pytest.mark.parametrize("name", ["taken", "/dev/null", "n" * 300, "/proc/out"])
@pytest.mark.parametrize("verb", ["generate", "sensitivity"])
def test_an_output_that_cannot_be_written_is_said_before_the_model_is_opened(
    verb: str, name: str, checkpoint_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "taken").mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr("mossquant.eval.generate.open_model", reached)
    monkeypatch.setattr("mossquant.calibration.sensitivity.open_weights", reached)
    words = {"generate": ("x", "--save-state"), "sensitivity": ("-o",)}[verb]
    refused(place, verb, checkpoint_folder, *words, name, "--force")


def test_a_run_that_could_not_be_kept_is_refused(
    checkpoint_folder: Path, text: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's own name is short enough, and that of the file beside it is not."""
    name = "n" * 230
    monkeypatch.chdir(place)
    monkeypatch.setattr("mossquant.calibration.sensitivity.open_weights", reached)
    monkeypatch.setattr("mossquant.calibration.quantize._decided", reached)
    refused(place, "sensitivity", checkpoint_folder, "-o", name)
    refused(place, "quantize", checkpoint_folder, "-o", name, "--text", text, "--recover", "10")


def test_a_full_disk(checkpoint_folder: Path, place: Path) -> None:
    """The system's limit on the size of a file stands in for it: the error comes from the same place."""
    for words in (
        ["--quiet", "quantize", checkpoint_folder, "-o", place / "out"],
        ["generate", checkpoint_folder, "x", "--max-tokens", 0, "--save-state", place / "state"],
    ):
        ended = streamed(*words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
        assert ended.status == 2
        assert "File too large; free space or choose another path" in ended.err
        assert ended.err.count("\n") == 1, ended.err
    assert list(place.iterdir()) == []


def test_an_input_that_may_not_be_read(checkpoint_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the system's answers are made up."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(checkpoint_folder))

    monkeypatch.setattr("mossquant.eval.info.info", forbidden)
    assert "free space or choose another path" in refused(place, "info", checkpoint_folder)
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)
    assert "cannot be read (Permission denied); give something that" in refused(place, "info", checkpoint_folder)


def test_an_error_of_our_own(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines \x1b[31m")

    monkeypatch.setattr("mossquant.eval.info.info", broken)
    outcome = command("info", checkpoint_folder)
    assert (outcome.status, outcome.out) == (70, "")
    assert outcome.err.startswith(
        r"mossquant: an error that we did not foresee (RuntimeError: two lines \x1b[31m); please"
    )
    assert outcome.err.count("\n") == 1
    shown = command("info", checkpoint_folder, "--debug")
    assert shown.status == 70
    assert "Traceback (most recent call last)" in shown.err
    assert shown.err.endswith(outcome.err)


@pytest.mark.parametrize(
    ("verb", "inside", "error", "status"),
    [
        ("quantize", "mossquant.checkpoint.writer.write_json", KeyboardInterrupt, 130),
        ("export", "mossquant.targets.export.write_artifact_manifest", RuntimeError, 70),
        ("import", "mossquant.checkpoint.checkpoint.write_json", MemoryError, 70),
        ("train", "mossquant.training.trainer.Trainer.advance", KeyboardInterrupt, 130),
    ],
)
def test_an_interrupt_or_an_error_leaves_nothing(
    verb: str,
    inside: str,
    error: type[BaseException],
    status: int,
    checkpoint_folder: Path,
    text: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inside, stop)
    words = next(words for words in writing(checkpoint_folder, text, place / "out") if words[0] == verb)
    outcome = command("--quiet", *words)
    assert outcome.status == status
    assert outcome.err == "mossquant: stopped\n" if status == 130 else outcome.err.count("\n") == 1
    assert outcome.out == ""
    # Training goes on from its work folder.
    assert [path.name for path in place.iterdir()] == (["out.training"] if verb == "train" else [])
