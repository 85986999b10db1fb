# SPDX-License-Identifier: Apache-2.0
"""Verbs of the command line on the bundled model: compare with its gate, generate, train."""

import json
import shutil
from pathlib import Path

import pytest
from commands import command, refused

from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.text.declared import DeclaredText
from mossquant.text.text import END_OF_TEXT

TOKENS = ("--tokens", 600, "--threads", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled model quantized to int8 and int4, and the latter lowered."""
    folder = tmp_path_factory.mktemp("work")
    for recipe in ("int4", "int8"):
        assert command("quantize", "tiny", "-r", recipe, "-o", folder / recipe).status == 0
    assert command("export", folder / "int4", "-o", folder / "onnx").status == 0
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    return folder


def test_compare_writes_the_agreed_json_and_its_gate_decides(work: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    passed = command("compare", "tiny", work / "onnx", *TOKENS, "--max-ppl-increase", "50%", "--json", report)
    assert passed.status == 0, passed.err
    values = json.loads(report.read_text())
    assert values["version"] == 1
    assert {"sha256", "tokens"} <= values["text"].keys()
    assert {"path", "perplexity", "bytes"} <= values["baseline"].keys()
    agreed = {"path", "kind", "perplexity", "ppl_increase_pct", "ppl_increase_ci95", "kl_mean", "top1_agreement"}
    assert agreed | {"bytes", "bits_per_weight"} <= values["candidates"][0].keys()
    failed = command("compare", "tiny", work / "onnx", *TOKENS, "--max-ppl-increase", "-50%")
    assert failed.status == 1
    assert "gate" in failed.err


def test_generate_from_argument_file_and_stdin(work: Path, tmp_path: Path) -> None:
    prompt = "def main("
    (tmp_path / "prompt.txt").write_text(prompt)
    asked = ("--max-tokens", 8, "--threads", 1)
    first = command("generate", work / "onnx", prompt, *asked)
    assert first.status == 0
    assert first.out.strip()
    assert command("generate", work / "onnx", "--prompt-file", tmp_path / "prompt.txt", *asked).out == first.out
    assert command("generate", work / "onnx", "-", *asked, stdin=prompt.encode()).out == first.out


def test_a_conversation_and_special_tokens(tmp_path: Path) -> None:
    """The template's text, given as a prompt with `--special`, goes on as the conversation does."""
    model, asked = shutil.copytree(asset_folder(BUNDLED), tmp_path / "model"), ("--max-tokens", 8, "--threads", 1)
    template = "{% for m in messages %}# {{ m.role }}{{ eos_token }}{{ m.content }}\n{% endfor %}"
    declared = DeclaredText(end_of_text=(0, 1), special_tokens={END_OF_TEXT: 0}, chat_template=template)
    (model / "text.json").write_text(declared.to_json())
    (tmp_path / "turns.json").write_text(json.dumps([{"role": "user", "content": "import os"}]))
    written = f"# user{END_OF_TEXT}import os\n"
    expected = command("generate", model, written, "--special", *asked)
    assert (expected.status, expected.err) == (0, "")
    assert command("generate", model, "--messages", tmp_path / "turns.json", *asked) == expected
    assert command("generate", model, "--chat", *asked, stdin=b"import os") == expected
    noted = command("generate", model, written, *asked)
    assert noted.out != expected.out
    assert noted.err == f"the prompt spells {END_OF_TEXT}, taken as letters; --special takes them for tokens\n"


@pytest.mark.parametrize(("saver", "other"), [("int4", "onnx"), ("onnx", "int4")])
def test_a_chat_reads_nothing_twice(work: Path, tmp_path: Path, saver: str, other: str) -> None:
    """A prompt is saved, gone on from on both runtimes, and the state moves on with the text, in the same file."""
    state, prompt, threads = tmp_path / "chat.state", "import os\n\n\ndef main(", ("--threads", 1)
    model = work / saver
    whole = command("generate", model, prompt, "--max-tokens", 24, *threads)
    saved = command("generate", model, prompt, "--max-tokens", 0, "--save-state", state, *threads)
    assert (saved.status, saved.out) == (0, "")
    assert "go on with: mossquant generate" in saved.err
    first = state.read_bytes()
    assert command("generate", model, "--load-state", state, "--max-tokens", 24, *threads).out == whole.out
    moving = ("--load-state", state, "--save-state", state, "--force", *threads)
    parts = [command("generate", model, *moving, "--max-tokens", 12) for _ in range(2)]
    assert "".join(part.out.removesuffix("\n") for part in parts) == whole.out.removesuffix("\n")
    state.write_bytes(first)
    next_prompt = ("args):\n    ", "--max-tokens", 8)
    mine = command("generate", model, *next_prompt, "--load-state", state, *threads)
    assert mine.status == 0
    assert mine.out.strip()
    piped = ("--load-state", state, *next_prompt[1:], *threads)
    assert command("generate", model, *piped, stdin=b"args):\n    ") == mine
    assert command("generate", work / other, *next_prompt, "--load-state", state, *threads).status == 0


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
