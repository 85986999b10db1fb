# SPDX-License-Identifier: Apache-2.0
"""The wheel alone is enough: built from a copy of the tree that is then deleted, it runs the bundled model."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mossquant", "calibration", "kernels", "targets", "eval")
FILES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
SOURCES = (
    *("native/include/moss.h", "native/include/moss_blocks.h"),
    *("executorch/kernels/operators.cc", "executorch/kernels/wheel/pthreadpool.h"),
)


@pytest.mark.slow
def test_the_wheel_works_without_the_source_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("mossquant-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    sources = {name for name in names if name.endswith((".c", ".cc", ".h", ".inc"))}
    assert sources == {f"mossquant/targets/{path}" for path in SOURCES}, (
        "sources do not belong in a wheel, but what apps include and what is compiled on first use"
    )
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"mossquant"}
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    run = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import mossquant"
        "; assert mossquant.__file__.startswith(sys.path[0])"
        "; from mossquant.cli.main import main; sys.exit(main())"
    )

    def mossquant(*arguments: str) -> None:
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", run, str(site), *arguments]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)

    mossquant("quantize", "tiny", "-r", "int4", "-o", "int4")
    mossquant("export", "int4", "-o", "onnx")
    mossquant("compare", "tiny", "int4", "onnx", "--tokens", "512", "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    # A model of random weights would be near the vocabulary's size, 4096.
    assert 1 < report["baseline"]["perplexity"] < 400
    assert all(0 < candidate["kl_mean"] < 0.2 for candidate in report["candidates"])
