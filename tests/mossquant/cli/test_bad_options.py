# SPDX-License-Identifier: Apache-2.0
"""Texts, options and outputs that cannot be used: exit status 2, one line, nothing left; and what is ours alone: 70."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import COMMAND, command, measuring, process, reading, refused, writing

from mossquant.files.outputs import file_sha256

NESTED = 100_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "is empty: give a file with text in it"),
        ("nowhere", None, "there is no such text file"),
        ("one byte", b"x", "are too few"),
    ],
)
def test_bad_texts(
    name: str,
    data: bytes | None,
    message: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    for words in measuring(checkpoint_folder, artifact_folder, quantized_folder, path):
        assert message in refused(place, *words), words
    for tokenizer in ("bytes", "bpe"):
        words = ["train", "--text", path, "--tokenizer", tokenizer, "-o", place / "out"]
        assert ("has 1 bytes" if data else message) in refused(place, *words).replace("has 2 bytes", "has 1 bytes")
    if not data:
        assert message in refused(place, "generate", checkpoint_folder, "--prompt-file", path)


def test_prompts_that_are_too_long_or_cannot_be_read(checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    message = refused(place, "generate", checkpoint_folder, "--prompt-file", path)
    assert "sparse is larger than 16 MB: give a shorter text" in message
    words = [*COMMAND, "generate", str(checkpoint_folder), "--max-tokens", "2"]
    for name, mode, message in (
        ("/dev/zero", "rb", "the prompt on stdin is larger than 16 MB"),
        (tmp_path / "out", "wb", "stdin cannot be read (Bad file descriptor)"),
    ):
        with Path(name).open(mode) as stdin:
            found = subprocess.run(words, stdin=stdin, capture_output=True, check=False)
        assert (found.returncode, found.stdout, found.stderr.count(b"\n")) == (2, b"", 1), found
        assert message in found.stderr.decode()


def test_text_that_is_not_utf8(checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    """Every tokenizer but bytes needs UTF-8, and says where it is not."""
    path = tmp_path / "text.txt"
    path.write_bytes("größer ".encode("latin-1") * 100)
    for words in (
        ["perplexity", "tiny", "--text", path],
        ["compare", "tiny", "tiny", "--text", path],
        ["train", "--text", path, "-o", place / "out"],
        ["generate", "tiny", "--prompt-file", path],
    ):
        assert "is not UTF-8 at byte 2 (0xf6): convert it to UTF-8; only a byte-level model" in refused(place, *words)
    assert command("perplexity", checkpoint_folder, "--text", path).status == 0


def test_text_that_the_model_has_seen(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    record = {"version": 1, "text": [{"sha256": file_sha256(text)}]}
    (model / "training.json").write_text(json.dumps(record))
    for words in (["perplexity", model], ["compare", model, quantized_folder], ["compare", quantized_folder, model]):
        message = refused(place, *words, "--text", text)
        assert "was used to train or calibrate" in message
        assert "--allow-seen" in message
    assert command("quantize", model, "-o", tmp_path / "quantized").status == 0
    assert command("export", tmp_path / "quantized", "-o", tmp_path / "artifact").status == 0
    for path in ("quantized", "artifact"):
        assert "was used to train or calibrate" in refused(place, "perplexity", tmp_path / path, "--text", text)
    found = command("perplexity", model, "--text", text, "--allow-seen")
    assert found.status == 0
    assert "trained or calibrated on it" in found.out
    unsaid, unread = "training.json does not say which texts were seen", "training.json is not JSON"
    for data, message in (
        (b"{", unread),
        (b"[]", unsaid),
        (b'{"version": 1, "text": [1]}', unsaid),
        (b"[" * NESTED, unread),
    ):
        (model / "training.json").write_bytes(data)
        for words in reading(model, checkpoint_folder, text, place / "out"):
            assert message in refused(place, *words), words


BAD_OPTIONS = [
    ("perplexity MODEL --text TEXT --tokens 1", "Invalid value for '--tokens'"),
    ("perplexity MODEL --text TEXT --tokens -5", "Invalid value for '--tokens'"),
    ("perplexity MODEL --text TEXT --tokens many", "Invalid value for '--tokens'"),
    ("perplexity MODEL --text TEXT --tokens 100000", "tokens, 100000 were asked for; give a longer text or fewer"),
    ("compare MODEL MODEL --text TEXT --tokens 100000", "tokens, 100000 were asked for; give a longer text or fewer"),
    ("demo --tokens 100000000 -o OUT", "100000000 tokens cannot be measured on; the held-out text has"),
    ("perplexity MODEL --text TEXT --streams 0", "Invalid value for '--streams'"),
    ("perplexity MODEL --text TEXT --streams 9000", "are too few for 9000 streams"),
    ("perplexity MODEL --text TEXT --threads 0", "Invalid value for '--threads'"),
    ("compare MODEL MODEL --text TEXT --threads -1", "Invalid value for '--threads'"),
    ("verify QUANTIZED ARTIFACT --text TEXT --threads -1", "Invalid value for '--threads'"),
    ("generate MODEL x --threads 1000000000", "Invalid value for '--threads'"),
    ("bench MODEL --threads 0", "Invalid value for '--threads'"),
    ("train --text TEXT -o OUT --threads 0", "Invalid value for '--threads'"),
    ("perplexity MODEL --text TEXT --activations int3", "'int3' is not one of 'fp32', 'planned'"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase x", "'x' is not a percentage"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase 1%%", "'1%%' is not a percentage"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase %", "'%' is not a percentage"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase nan", "is not a number of per cent"),
    ("compare MODEL MODEL --text TEXT --max-ppl-increase inf%", "is not a number of per cent"),
    ("compare MODEL", "Missing argument 'CANDIDATE'"),
    ("verify QUANTIZED", "Missing argument 'ARTIFACT'"),
    ("verify QUANTIZED ARTIFACT --text TEXT --positions 0", "Invalid value for '--positions'"),
    ("verify QUANTIZED ARTIFACT --text TEXT --stream 1", "Invalid value for '--stream'"),
    ("generate MODEL x --temperature nan", "Invalid value for '--temperature'"),
    ("generate MODEL x --temperature -1", "Invalid value for '--temperature'"),
    ("generate MODEL x --temperature inf", "temperature is inf"),
    ("generate MODEL x --top-p 0", "top_p is 0.0, needs more than 0 and at most 1"),
    ("generate MODEL x --top-p 1.5", "top_p is 1.5, needs more than 0 and at most 1"),
    ("generate MODEL x --top-p nan", "top_p is nan, needs more than 0 and at most 1"),
    ("generate MODEL x --max-tokens 0", "max_tokens is 0, needs 1 or more, or 0 with a state to save"),
    ("generate MODEL x --max-tokens -1", "Invalid value for '--max-tokens'"),
    ("generate MODEL x --load-state OUT", "is not a file; give one that `mossquant generate --save-state` wrote"),
    ("generate MODEL x --load-state TEXT", "is not a state: "),
    ("generate MODEL x --save-state TEXT", "exists already; choose another output path or pass --force to replace it"),
    ("generate MODEL x --save-state TEXT --force", "is not a state, so it is not replaced; choose another path for it"),
    ("generate MODEL x --save-state MODEL --force", "is a folder, and a file is to be written"),
    ("generate MODEL --save-state OUT", "the prompt is empty"),
    ("generate MODEL x --seed -1", "Invalid value for '--seed'"),
    ("generate MODEL x --seed 1000000000000000000000000000000", "Invalid value for '--seed'"),
    ("generate MODEL x --stop=", "an empty stop string"),
    ("generate MODEL x --prompt-file TEXT", "a prompt and --prompt-file were both given"),
    ("generate MODEL", "the prompt is empty"),
    ("generate MODEL -", "the prompt is empty"),
    ("bench", "Missing argument 'PATH'"),
    ("bench MODEL --prompt 0", "Invalid value for '--prompt'"),
    ("bench MODEL --prompt 1000000000000", "Invalid value for '--prompt'"),
    ("bench MODEL --decode -1", "Invalid value for '--decode'"),
    ("bench MODEL --repeats 0", "Invalid value for '--repeats'"),
    ("bench MODEL --repeats 99999999999999999999999", "Invalid value for '--repeats'"),
    ("train --text TEXT", "Missing option '--output' / '-o'"),
    ("train -o OUT", "Missing option '--text'"),
    ("train --text TEXT -o OUT --tokenizer words", "'words' is not one of 'bpe', 'bytes'"),
    ("train --text TEXT -o OUT --tokenizer bytes --batch 64", "32896 tokens are needed for one step"),
    ("train --text TEXT -o OUT --learning-rate nan", "--learning-rate nan is not between 0 and 1"),
    ("train --text TEXT -o OUT --learning-rate 0", "--learning-rate 0.0 is not between 0 and 1"),
    ("train --text TEXT -o OUT --seed 1000000000000000000000000000000", "Invalid value for '--seed'"),
    ("train --text TEXT -o OUT --device tpu", "'tpu' is not one of 'cpu', 'cuda'"),
    ("train --text TEXT -o OUT --tokenizer bytes --batch 2 --window 8 --work OUT", "would lie in the output"),
    ("train --text TEXT -o OUT --tokenizer bytes --batch 2 --window 8 --work OUT/work", "would lie in the output"),
    (
        "train --text TEXT -o OUT --tokenizer bytes --batch 2 --window 8 --work TEXT",
        "is not a folder, nor can it be one",
    ),
    ("quantize MODEL", "no output folder was given"),
    ("export MODEL -o OUT --activations int3", "'int3' is not one of 'int8', 'fp32'"),
    ("import MODEL -o OUT --dtype int8", "'int8' is not one of"),
    ("import MODEL -o OUT --tokenizer TEXT", "is not a tokenizer.json"),
    ("import MODEL -o OUT --tokenizer OUT2", "cannot be read (No such file or directory)"),
    ("import MODEL -o OUT --tokenizer OUT", "is, holds or lies in the input"),
    ("train --text OUT/book.txt -o OUT", "is, holds or lies in the input"),
    ("recipes x", "unexpected extra argument"),
    ("info MODEL --jsn x", "No such option: --jsn"),
    ("info", "Missing argument 'PATH'; see mossquant info --help"),
    ("shrink", "No such command 'shrink'; see mossquant --help"),
    ("--shrink", "No such option: --shrink; see mossquant --help"),
]


@pytest.mark.parametrize(("line", "message"), BAD_OPTIONS, ids=[line for line, _ in BAD_OPTIONS])
def test_bad_options(
    line: str,
    message: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    place: Path,
) -> None:
    given = {"MODEL": checkpoint_folder, "QUANTIZED": quantized_folder, "ARTIFACT": artifact_folder, "TEXT": text}
    words: list[object] = [
        place / word.replace("OUT", "out", 1) if word.startswith("OUT") else given.get(word, word)
        for word in line.split()
    ]
    assert message in refused(place, *words)


BAD_OUTPUTS: dict[str, tuple[list[str], str]] = {
    "exists": ([], "exists already; choose another output path or pass --force to replace it"),
    "photos": (["--force"], "is a folder that mossquant did not write, so it is not replaced"),
    "file.txt": (["--force"], "is a file, and a folder is to be written"),
    "file.txt/below": ([], "is not a folder, so"),
    "loop": ([], "loop"),
    "n" * 300: ([], "cannot be written (File name too long)"),
    "fifo": (["--force"], "is a device, pipe or socket"),
    "/dev/null": (["--force"], "is a device, pipe or socket"),
    "/dev/stdout": (["--force"], "is a device, pipe or socket"),
    "/proc/nothing": ([], "is not writable"),
    ".": (["--force"], "holds the working folder"),
    "": ([], "choose another output path"),
    "/": (["--force"], "choose another output path"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_outputs(
    name: str, checkpoint_folder: Path, text: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc").is_dir() and name.startswith("/proc"):
        pytest.skip("needs a system with /proc")
    furnish(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    options, message = BAD_OUTPUTS[name]
    for words in writing(checkpoint_folder, text, name):
        assert message in refused(place, *words, *options), words


def reached(path: Path) -> None:
    """Were anything written after all, it would be to a device of this machine, by root perhaps."""
    raise AssertionError(f"{path} was about to be written")


def furnish(place: Path) -> None:
    for name in ("exists", "photos"):
        (place / name).mkdir()
    (place / "photos" / "cat.jpg").write_bytes(b"cat")
    (place / "file.txt").write_bytes(b"text")
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "fifo")


def test_outputs_that_are_inputs(checkpoint_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    for words in (["quantize", model], ["export", model], ["import", model]):
        for out in (model, model / "inside", tmp_path):
            assert "is, holds or lies in the input" in refused(tmp_path, *words, "-o", out, "--force")
    out = tmp_path / "out"
    assert command("quantize", checkpoint_folder, "-o", out).status == 0
    for words in (
        ["quantize", checkpoint_folder, "-r", out / "recipe.yaml"],
        ["import", checkpoint_folder, "--tokenizer", out / "config.json"],
        ["train", "--tokenizer", "bytes", "--text", out / "recipe.yaml"],
    ):
        assert "is, holds or lies in the input" in refused(tmp_path, *words, "-o", out, "--force")


def test_an_output_may_have_the_name_of_a_recipe(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("quantize", checkpoint_folder, "-r", "int8", "-o", "int8", "--json", "int4").status == 0
    assert command("quantize", checkpoint_folder, "-r", "int8", "-o", "int8", "--force").status == 0


def test_a_report_lies_in_no_input_and_no_output(
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However it is spelled, and before any work."""
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    model = shutil.copytree(quantized_folder, place / "model")
    (place / "link").symlink_to(model)
    (place / "sub").mkdir()
    report = place / "report.json"
    assert command("info", checkpoint_folder).status == 0
    report.write_bytes(b'{\n "version": 1,\n "path": "x"\n}\n')
    for words in [
        ["info", model],
        ["perplexity", model, "--text", text],
        ["compare", checkpoint_folder, model, "--text", text],
        ["compare", model, checkpoint_folder, "--text", text],
        ["verify", model, artifact_folder, "--text", text],
        ["bench", checkpoint_folder, model],
    ]:
        for file in (model / "new.json", model / "sub" / "new.json", place / "sub" / ".." / "link" / "config.json"):
            assert "is, holds or lies in the input" in refused(place, *words, "--json", file), words
    for words in (
        ["perplexity", checkpoint_folder, "--text", report],
        ["quantize", checkpoint_folder, "-r", report, "--dry-run"],
    ):
        assert "is, holds or lies in the input" in refused(place, *words, "--json", report), words
    for out, file in (
        (place / "out", place / "out" / "manifest.json"),
        (place / "o2", place / "sub" / ".." / "o2"),
        (place / "o3", place / "sub" / ".." / "o3" / "below" / "x"),
    ):
        message = refused(place, "quantize", checkpoint_folder, "-o", out, "--json", file)
        assert "was given both" in message or "lies in the output" in message
    assert "lies in the output" in refused(place, "demo", "-o", place / "demo", "--json", place / "demo" / "x.json")
    # Of a folder that is no input, not even what begins as a report does.
    for folder, name in ((model, "ledger.json"), (model, "manifest.json"), (model, "new.json")):
        message = refused(place, "info", checkpoint_folder, "--json", folder / name)
        assert "lies in a checkpoint or artifact" in message
    # Nor does one of ours that was copied elsewhere.
    for source in (model / "config.json", model / "manifest.json", artifact_folder / "manifest.json"):
        shutil.copyfile(source, report)
        assert "is not a report" in refused(place, "info", checkpoint_folder, "--json", report)


@pytest.mark.parametrize(
    "name", ["photos", "file.txt", "file.txt/below", "/dev/null", "/dev/stdout", "/proc/nothing", "fifo"]
)
def test_bad_places_for_json(
    name: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Said before any work; a report replaces nothing but a report."""
    furnish(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    for words in [
        ["info", checkpoint_folder],
        ["quantize", checkpoint_folder, "--dry-run"],
        ["quantize", checkpoint_folder, "-o", place / "out"],
        *measuring(checkpoint_folder, artifact_folder, quantized_folder, text),
        ["bench", checkpoint_folder],
        ["demo", "-o", place / "demo"],
    ]:
        refused(place, *words, "--json", name)
    both = ["quantize", checkpoint_folder, "-o", place / "out", "--json", place / "out"]
    assert "was given both for the output and for --json" in refused(place, *both)


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_places_for_a_state(
    name: str, checkpoint_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the model is opened, so that nothing is generated in vain."""
    if not Path("/proc").is_dir() and name.startswith("/proc"):
        pytest.skip("needs a system with /proc")
    furnish(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    monkeypatch.setattr("mossquant.eval.open.open_model", reached)
    refused(place, "generate", checkpoint_folder, "x", "--save-state", name, "--force")


def test_the_report_of_every_verb_is_replaced_by_the_next(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, place: Path
) -> None:
    few = ["--prompt", 1, "--decode", 1, "--repeats", 1]
    for words in (
        ["info", checkpoint_folder],
        ["quantize", checkpoint_folder, "--dry-run"],
        ["perplexity", checkpoint_folder, "--text", text, "--tokens", 300],
        ["compare", checkpoint_folder, quantized_folder, "--text", text, "--tokens", 300],
        ["verify", quantized_folder, artifact_folder, "--weights-only"],
        ["bench", checkpoint_folder, *few],
        ["info", checkpoint_folder],
    ):
        assert command(*words, "--json", place / "report.json").status == 0, words


def test_a_state_lies_in_no_input(
    checkpoint_folder: Path, artifact_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mossquant.files.outputs._beside", reached)
    monkeypatch.setattr("mossquant.eval.open.open_model", reached)
    model = shutil.copytree(checkpoint_folder, place / "model")
    artifact = shutil.copytree(artifact_folder, place / "artifact")
    for source in (model, artifact):
        for name in ("model.safetensors.index.json", "below/state"):
            message = refused(place, "generate", source, "x", "--save-state", source / name)
            assert "is, holds or lies in the input" in message
    message = refused(place, "generate", artifact / "model.onnx", "x", "--save-state", artifact / "state")
    assert "lies in a checkpoint or artifact" in message


@pytest.mark.parametrize("verb", ["quantize", "export", "train"])
def test_a_full_disk(verb: str, checkpoint_folder: Path, text: Path, place: Path) -> None:
    """The system's limit on the size of a file stands in for it: the error comes from the same place."""
    words = next(words for words in writing(checkpoint_folder, text, place / "out") if words[0] == verb)
    found = process("--quiet", *words, limit_bytes=100_000)
    assert found.status == 2, found
    assert found.out == ""
    assert "File too large; free space or choose another path" in found.err
    assert found.err.count("\n") == 1, found.err
    assert [path.name for path in place.iterdir() if path.name != "out.training"] == []


def test_a_full_disk_under_a_state(checkpoint_folder: Path, place: Path) -> None:
    words = ["generate", checkpoint_folder, "x", "--max-tokens", 0, "--save-state", place / "state"]
    found = process("--quiet", *words, limit_bytes=10_000)
    assert (found.status, found.out) == (2, ""), found
    assert "File too large; free space or choose another path" in found.err
    assert found.err.count("\n") == 1, found.err
    assert not list(place.iterdir())


def test_an_input_that_may_not_be_read(checkpoint_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the system's answers are made up."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(checkpoint_folder))

    monkeypatch.setattr("mossquant.eval.info.info", forbidden)
    assert "free space or choose another path" in refused(place, "info", checkpoint_folder)
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)
    assert "cannot be read (Permission denied); give something that" in refused(place, "info", checkpoint_folder)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("two\nlines \x1b[31m")


def test_an_error_of_our_own(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossquant.eval.info.info", broken)
    found = command("info", checkpoint_folder)
    assert (found.status, found.out) == (70, "")
    assert found.err.startswith(
        r"mossquant: an error that we did not foresee (RuntimeError: two lines \x1b[31m); please"
    )
    assert found.err.count("\n") == 1
    for words in (["--debug", "info", checkpoint_folder], ["info", checkpoint_folder, "--debug"]):
        shown = command(*words)
        assert shown.status == 70
        assert "Traceback (most recent call last)" in shown.err
        assert shown.err.endswith(found.err.split(";")[0] + ";" + found.err.split(";")[1])


@pytest.mark.parametrize(
    ("verb", "inside"),
    [
        ("quantize", "mossquant.calibration.quantize.pack"),
        ("quantize", "mossquant.checkpoint.writer.write_json"),
        ("export", "mossquant.targets.export.write_artifact_manifest"),
        ("import", "mossquant.checkpoint.checkpoint.write_json"),
        ("train", "mossquant.training.trainer.Trainer.advance"),
    ],
)
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (RuntimeError, 70), (MemoryError, 70)])
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
    found = command("--quiet", *words)
    assert found.status == status
    assert found.err == "mossquant: stopped\n" if status == 130 else found.err.count("\n") == 1
    assert found.out == ""
    # Training goes on from its work folder.
    assert [path.name for path in place.iterdir()] == (["out.training"] if verb == "train" else [])
