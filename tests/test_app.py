# SPDX-License-Identifier: Apache-2.0
"""docs/app.md runs as it stands, without our package, and writes what `generate` does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kept import KEPT_ONNX

from mossquant import export, generate, quantize

PAGE = Path(__file__).parents[1] / "docs" / "app.md"
_TAIL = """
import sys
assert "mossquant" not in sys.modules
both = [write(model(app), "def f(") for model in (OnnxModel, PteModel)]
Path("found.json").write_text(json.dumps(both))
"""


@pytest.mark.parametrize("model", ["kept", pytest.param("tiny", marks=pytest.mark.slow)])
def test_the_page_runs_as_it_stands(model: str, tmp_path: Path) -> None:
    if model == "kept":
        (tmp_path / "app").symlink_to(KEPT_ONNX.parent)
    else:
        quantize("tiny", tmp_path / "int4", recipe="int4")
        export(tmp_path / "int4", tmp_path / "app", target=["onnx", "executorch"])
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join([*blocks, _TAIL]), encoding="utf-8")
    ran = subprocess.run([sys.executable, "-P", "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    programs = (tmp_path / "app" / "model.onnx", tmp_path / "app" / "model.pte")
    expected = [generate(program, "def f(", max_tokens=32, threads=1).text for program in programs]
    assert all(expected)
    assert json.loads((tmp_path / "found.json").read_text()) == expected
