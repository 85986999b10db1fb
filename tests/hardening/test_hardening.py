# SPDX-License-Identifier: Apache-2.0
"""Damaged files give a clear error or a correct result: hundreds in one process, and some through the command line.

The cases run in a process of their own, one for all, so that a native crash is a failing test with the case's name. A
case is reproduced by its seed: `PYTHONSAFEPATH=1 PYTHONPATH=tests python -m hardening SEED`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from commands import process
from hardening.cases import Case, make_case

QUICK = range(10_000, 10_110)
"""Every kind of file as damaged, and with its hashes made right again."""
ALL = range(0, 2400)
QUICK_COMMANDS = range(20_000, 20_003)
COMMANDS = range(20_000, 20_060)
SECONDS = 3600


# `python -m hardening` on samples that are there already: lowering them takes longer than a hundred cases.
_MAIN = """
import shutil, sys
from hardening import __main__ as hardening
samples = sys.argv.pop(1)
hardening.make_samples = lambda folder: shutil.copytree(samples, folder, dirs_exist_ok=True)
sys.exit(hardening.main())
"""


def _run(seeds: range, samples: Path, log: Path) -> None:
    """Run cases in one process; fail with the name of the one under way where it dies."""
    words = [sys.executable, "-c", _MAIN, str(samples), f"{seeds.start}:{seeds.stop}", "--log", str(log)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not lines or "ended" in lines[-1], f"died in {lines[-1]['begins']}\n{run.stderr[-3000:]}"
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    ended = [line for line in lines if "ended" in line]
    assert len(ended) == len(seeds)
    # Cases that are all refused, or all accepted, would test one half only.
    assert {line["verdict"] for line in ended} == {"refused", "accepted"}
    print(run.stdout)


def test_some_cases(samples: Path, tmp_path: Path) -> None:
    _run(QUICK, samples, tmp_path / "log")


@pytest.mark.slow
def test_all_cases(samples: Path, tmp_path: Path) -> None:
    _run(ALL, samples, tmp_path / "log")


def _words(case: Case, damaged: Path, samples: Path, out: Path) -> list[object]:
    """A command that meets the damage."""
    text = samples / "text.txt"
    good = samples / "checkpoint"
    verbs: dict[str, list[list[object]]] = {
        "checkpoint": [["quantize", damaged, "-o", out], ["import", damaged, "-o", out]],
        "quantized": [["export", damaged, "-o", out], ["compare", good, damaged, "--text", text, "--tokens", 24]],
        "program": [["compare", good, damaged, "--text", text, "--tokens", 24]],
        "stream": [["compare", good, damaged, "--text", text, "--tokens", 24]],
        "source": [["import", damaged, "-o", out]],
        "recipe": [["quantize", good, "-o", out, "--recipe", damaged / "recipe.yaml"]],
        "statistics": [["quantize", good, "-o", out, "--stats", damaged], ["info", damaged]],
    }
    reading: list[list[object]] = [
        ["info", damaged],
        ["perplexity", damaged, "--text", text, "--tokens", 24],
        ["generate", damaged, "def add(", "--max-tokens", 2],
    ]
    known = verbs[case.kind.actions] + (reading if case.kind.actions not in ("source", "recipe", "statistics") else [])
    return Random(case.seed).choice(known)


def _through_the_command_line(seed: int, samples: Path, tmp_path: Path) -> None:
    case = make_case(seed, samples)
    place = tmp_path / "place"
    place.mkdir()
    words = _words(case, case.write(samples, tmp_path), samples, place / "out")
    found = process(*words)
    said = f"{case.name}: {words[0]} gave {found}"
    assert found.status in (0, 2), said
    assert "Traceback" not in found.err, said
    if found.status == 2:
        assert found.out == "", said
        assert found.err.startswith("mossquant: "), said
        assert found.err.count("\n") == 1, said
        assert list(place.iterdir()) == [], said


@pytest.mark.parametrize("seed", QUICK_COMMANDS)
def test_some_commands(seed: int, samples: Path, tmp_path: Path) -> None:
    _through_the_command_line(seed, samples, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", COMMANDS)
def test_all_commands(seed: int, samples: Path, tmp_path: Path) -> None:
    _through_the_command_line(seed, samples, tmp_path)
