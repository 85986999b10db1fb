# SPDX-License-Identifier: Apache-2.0
"""docs/app.md runs as it stands, without our package, and writes what `generate` does."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kept import KEPT_ONNX
from made_tokenizers import MADE, SPECIAL, save
from numpy.typing import NDArray
from scripted import Scripted

from mossquant import export, generate, quantize
from mossquant.eval.generate import continue_text
from mossquant.runner import State
from mossquant.text.chat import render_chat
from mossquant.text.declared import DeclaredText
from mossquant.text.tokenizer import Tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "app.md"
_TAIL = """
import sys
assert "mossquant" not in sys.modules
both = [write(model(app), encode("def f(", begins=True)) for model in (OnnxModel, PteModel)]
Path("found.json").write_text(json.dumps(both))
"""


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("model", ["kept", pytest.param("tiny", marks=pytest.mark.slow)])
def test_the_page_runs_as_it_stands(model: str, tmp_path: Path) -> None:
    if model == "kept":
        (tmp_path / "app").symlink_to(KEPT_ONNX.parent)
    else:
        quantize("tiny", tmp_path / "int4", recipe="int4-uniform")
        export(tmp_path / "int4", tmp_path / "app", target=["onnx", "executorch"])
    blocks = _blocks()
    assert len(blocks) == 6
    (tmp_path / "page.py").write_text("\n".join([*blocks, _TAIL]), encoding="utf-8")
    ran = subprocess.run([sys.executable, "-P", "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    programs = (tmp_path / "app" / "model.onnx", tmp_path / "app" / "model.pte")
    expected = [generate(program, "def f(", max_tokens=32, threads=1).text for program in programs]
    assert all(expected)
    assert json.loads((tmp_path / "found.json").read_text()) == expected


class Script(Scripted):
    """As the page's models too."""

    state = -1

    def read(self, ids: list[int]) -> NDArray[np.float32]:
        found, state = self(np.array([ids]), State(self.state, 1))
        self.state = state.take()
        return found[0, -1]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("prompt", ["Hello", "hello <s>", ""])
def test_the_page_reads_and_writes_what_generate_does(
    kind: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words, special tokens that text.json alone knows, entries of the model's table alone, and an end of the text."""
    made = MADE[kind]()
    own = made.get_vocab_size()
    text = dict(zip(("<|tool|>", "<|end|>"), (own, own + 1), strict=True))
    ids = {spelling: made.token_to_id(spelling) for spelling in SPECIAL}
    declared = DeclaredText(
        end_of_text=(text["<|end|>"], ids["<|im_end|>"]),
        beginning_of_text=ids["<s>"],
        add_beginning_of_text=bool(prompt),
        special_tokens=ids | text,
        token_names={"eos_token": "<|end|>"},
        chat_template="{% for m in messages %}\n<|tool|>{{ m.content }}{{ eos_token }}\n{% endfor %}\n<|im_start|>",
    )
    save(made, tmp_path / "app")
    (tmp_path / "app" / "text.json").write_text(declared.to_json(), encoding="utf-8")
    shutil.copy(KEPT_ONNX.with_name("manifest.json"), tmp_path / "app")
    said = made.encode("world hello the größer world", add_special_tokens=False).ids
    said = [*said[:2], text["<|tool|>"], *said[2:], ids["<s>"], own + 9, *said, text["<|end|>"], *said]
    monkeypatch.chdir(tmp_path)
    blocks = _blocks()
    parts = [blocks[0], blocks[3], blocks[4].partition("\nprompt = ")[0], blocks[5]]
    (tmp_path / "page.py").write_text("\n".join(parts), encoding="utf-8")
    page = runpy.run_path("page.py")
    here, there = (Script(said, vocab_size=own + 10) for _ in range(2))
    found = page["write"](here, page["encode"](prompt, begins=True), 100)
    expected = continue_text(there, Tokenizer.for_folder(tmp_path / "app", own + 10), prompt, max_tokens=100)  # type: ignore[arg-type]
    assert expected.reason == "end_of_text"
    assert found == expected.text
    assert capsys.readouterr().out == expected.text + "\n"
    assert here.read_tokens == [*there.read_tokens, text["<|end|>"]]  # `generate` reads that where the state is saved
    turns = [{"role": "user", "content": "Hello"}]
    tokenizer = Tokenizer.for_folder(tmp_path / "app", own + 10)
    assert page["chat"](turns) == tokenizer.encode(render_chat(declared, turns), special=True).tolist()
