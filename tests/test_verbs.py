# SPDX-License-Identifier: Apache-2.0
"""The command line: what a user can do with it, verb by verb. What is refused is in `test_bad_input.py`."""

import json
import shutil
from pathlib import Path

import pytest
from commands import command, refused

from mossquant import cli

TOKENS = ("--tokens", 600, "--threads", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model quantized to int4 and lowered."""
    folder = tmp_path_factory.mktemp("work")
    assert command("quantize", "tiny", "-r", "int4", "-o", folder / "int4").status == 0
    assert command("export", folder / "int4", "-o", folder / "onnx").status == 0
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    return folder


def test_version_help_and_recipes() -> None:
    assert command("--version").out.startswith("mossquant ")
    for verb in ("demo", "info", "train", "import", "quantize", "recipes", "export", "perplexity", "compare", "verify"):
        found = command(verb, "--help")
        assert found.status == 0
        assert f"Example: mossquant {verb}" in found.out, verb
    assert "int4_g32" in command("recipes").out


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    found = command("quantize", "tiny", "-r", "int8", "--dry-run")
    assert found.status == 0
    assert "mlp.expert.w2" in found.out
    assert list(tmp_path.iterdir()) == []


def test_compare_writes_the_agreed_json_and_its_gate_decides(work: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    passed = command("compare", "tiny", work / "onnx", *TOKENS, "--max-ppl-increase", "50%", "--json", report)
    assert passed.status == 0, passed.err
    found = json.loads(report.read_text())
    assert found["version"] == 1
    assert {"sha256", "tokens"} <= found["text"].keys()
    assert {"path", "perplexity", "bytes"} <= found["baseline"].keys()
    agreed = {"path", "kind", "perplexity", "ppl_increase_pct", "ppl_increase_ci95", "kl_mean", "top1_agreement"}
    assert agreed | {"bytes", "bits_per_weight"} <= found["candidates"][0].keys()
    failed = command("compare", "tiny", work / "onnx", *TOKENS, "--max-ppl-increase", "-50%")
    assert failed.status == 1
    assert "gate" in failed.err


def test_verify_fails_on_a_flipped_nibble(work: Path, tmp_path: Path) -> None:
    assert command("verify", work / "int4", work / "onnx", "--weights-only").status == 0
    shutil.copytree(work / "onnx", tmp_path / "onnx")
    program = tmp_path / "onnx" / "model.onnx"
    data = bytearray(program.read_bytes())
    data[len(data) // 2] ^= 0x10
    program.write_bytes(data)
    found = command("verify", work / "int4", tmp_path / "onnx", "--weights-only")
    assert found.status == 1
    assert "backbone." in found.err + found.out


def test_generate_from_argument_file_and_stdin(work: Path, tmp_path: Path) -> None:
    prompt = "def main("
    (tmp_path / "prompt.txt").write_text(prompt)
    asked = ("--max-tokens", 8, "--threads", 1)
    first = command("generate", work / "onnx", prompt, *asked)
    assert first.status == 0
    assert first.out.strip()
    assert command("generate", work / "onnx", "--prompt-file", tmp_path / "prompt.txt", *asked).out == first.out
    assert command("generate", work / "onnx", "-", *asked, stdin=prompt.encode()).out == first.out


def test_training_importing_a_tokenizer_and_bytes(work: Path, tmp_path: Path) -> None:
    made = command(
        *("train", "--text", work / "text.txt", "--tokenizer", "bytes", "-o", tmp_path / "own", "--steps", 2),
        *("--batch", 2, "--window", 16, "--threads", 1),
    )
    assert made.status == 0, made.err
    assert command("info", tmp_path / "own").status == 0
    assert "seen" in refused(tmp_path, "perplexity", tmp_path / "own", "--text", work / "text.txt")
    allowed = command("perplexity", tmp_path / "own", "--text", work / "text.txt", "--allow-seen", *TOKENS)
    assert allowed.status == 0, allowed.err


def test_an_error_of_ours_is_70_and_never_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("mossquant.eval.info.info", broken)
    found = command("info", "tiny")
    assert found.status == 70
    assert found.err.count("\n") == 1
    assert "report" in found.err
    assert "Traceback" in command("info", "tiny", "--debug").err
    assert cli.main(["--version"]) == 0
