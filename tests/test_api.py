# SPDX-License-Identifier: Apache-2.0
"""The public API: what the top level exports is there, documented, and used as docs/api.md shows it."""

import re
import subprocess
import sys
from pathlib import Path

import mossquant

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
VERBS = (
    *("bench", "calibrate", "compare", "demo", "export", "generate", "import_mamba", "info", "perplexity", "quantize"),
    *("prune", "recipes", "sensitivity", "train", "verify"),
)


def test_every_name_is_there_and_documented() -> None:
    for name in mossquant.__all__:
        assert getattr(mossquant, name).__doc__, name
        assert f"mossquant.{name}" in PAGE.read_text("utf-8"), name
    assert set(VERBS) <= set(mossquant.__all__)


def test_the_page_runs_as_it_stands(text: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(text.read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 15
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    subprocess.run([sys.executable, "-P", "page.py"], cwd=tmp_path, check=True)
