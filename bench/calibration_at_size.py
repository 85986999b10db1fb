# SPDX-License-Identifier: Apache-2.0
"""Calibrates and quantizes random Mambas of published shapes: time and memory of each verb beside what it promised.

    python bench/calibration_at_size.py PRESET [--layers N] [--steps STEP…] [--folder DIR] [--threads 1] [--json FILE]

A checkpoint of the preset's shape is written block by block, its weights as training begins with them; the tokenizer
and the text are the bundled model's. Each step is the command line in a process of its own, whose anonymous memory
(`bench/large.py` says how) is read from the end of its imports on:

    calibrate   mossquant calibrate MODEL
    gptq        mossquant quantize MODEL -r RECIPE --stats STATISTICS, every matrix and the table in int4_g32 by gptq
    int4-best   mossquant quantize MODEL -r int4-best --recover 0, on the bundled text

The bar is 2 × the largest block in fp32 + the second moments of one block's inputs in float64 + 500 MB. What was
promised are the first minutes and the first MB of memory that the verb printed.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from large import watch
from torch import Tensor

from mossquant.calibration.statistics import inputs_of
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.locate import asset_folder
from mossquant.eval.machine import machine
from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of, kinds_of
from mossquant.model.config import MossNetConfig, preset
from mossquant.model.mossnet import parameter_count
from mossquant.model.tensors import TensorSpec

SLACK_BYTES = 500 * 10**6

RECIPE = """\
version: 1
name: gptq-at-size
targets: [torch, onnx, executorch]
solver: gptq
weights:
  - {role: "*norm*", keep: fp32, why: "few bytes"}
  - {role: ssm.A_log, keep: stored, why: "few bytes"}
  - {role: "ssm.conv*", keep: stored, why: "few bytes"}
  - {role: ssm.D, keep: stored, why: "few bytes"}
  - {role: ssm.expert.dt_bias, keep: stored, why: "few bytes"}
  - {role: "*", format: int4_g32}
activations:
  - {role: "*", format: int8_block}
state:
  - {role: "*", format: fp32}
"""

# The command line, with what its verbs import; it says when that is done.
CHILD = """
import sys
import torch
import mossquant.calibration.calibrate, mossquant.calibration.quantize, mossquant.cli.main
import mossquant.eval.report.statistics_tables, mossquant.eval.report.plan_tables
print(flush=True); sys.stdin.readline()
sys.argv[0] = "mossquant"
mossquant.cli.main.main()
"""


@dataclass
class RandomModel:
    """Tensors as training begins with them: each block seeded by its place, one at a time."""

    config: MossNetConfig
    _block: Block | None = None

    def tensor(self, spec: TensorSpec) -> Tensor:
        """One tensor, in the order of the checkpoint."""
        if spec.layer is None:
            if "norm" in spec.role:
                return torch.ones(spec.shape)
            return torch.empty(spec.shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        if self._block is None or self._block.layer != spec.layer or not self._block.holds(spec):
            kinds = kinds_of(self.config, spec.layer)
            number, kind = next(
                (i, kind) for i, kind in enumerate(kinds) if spec in kind.specs(self.config, spec.layer)
            )
            self._block = kind(self.config, spec.layer).requires_grad_(False)
            self._block.norm.fill_(1)
            self._block.reset_parameters(torch.Generator().manual_seed(1 + spec.layer * len(kinds) + number))
        return self._block.parameter_of(spec)


def generate(folder: Path, config: MossNetConfig) -> None:
    """Write the checkpoint in bf16 with the bundled tokenizer, unless it is there already."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True)
    write_checkpoint(folder, config, RandomModel(config).tensor, dtype=torch.bfloat16)
    shutil.copy(asset_folder("tiny") / "tokenizer.json", folder)


def bar(config: MossNetConfig) -> int:
    """2 × the largest block + one block's second moments + 500 MB, in bytes."""
    blocks = [kind.specs(config, layer) for layer, kind in blocks_of(config)]
    largest = max(sum(4 * spec.count for spec in specs) for specs in blocks)
    moments = max(sum(8 * entry.width**2 for entry in inputs_of(specs)) for specs in blocks)
    return 2 * largest + moments + SLACK_BYTES


def measure(words: list[str], threads: int) -> dict[str, Any]:
    """Run the command line in a process of its own: seconds, its highest anonymous memory, what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    said: list[str] = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        lines, stdout = process.stderr, process.stdout

        def listen() -> None:
            for line in lines:
                said.append(line.rstrip())
                print(f"    {line.rstrip()}", file=sys.stderr, flush=True)

        stdout.readline()
        threads_of = [threading.Thread(target=listen), threading.Thread(target=stdout.read)]
        for thread in threads_of:
            thread.start()
        found = watch(process, process.stdin.close)
        for thread in threads_of:
            thread.join()
    if process.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**found, "cpu_seconds": cpu, "said": said}


def promised(said: list[str]) -> dict[str, float]:
    """Seconds and MB of memory in the first lines that name them; what is not said is left out."""
    found: dict[str, float] = {}
    for line in said:
        minutes = re.search(r"about (a|[\d,]+) (second|minute)s?", line)
        memory = re.search(r"about ([\d,.]+) MB of memory", line)
        if minutes and "seconds" not in found:
            count = 1.0 if minutes[1] == "a" else float(minutes[1].replace(",", ""))
            found["seconds"] = count * (60 if minutes[2] == "minute" else 1)
        if memory and "memory_mb" not in found:
            found["memory_mb"] = float(memory[1].replace(",", ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--layers", type=int, help="cut to so many")
    parser.add_argument("--steps", nargs="+", default=["calibrate", "gptq", "int4-best"], metavar="STEP")
    parser.add_argument("--folder", type=Path, help="where all is written and left; a temporary one if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    config = preset(asked.preset)
    config = replace(config, num_hidden_layers=asked.layers or config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        model, statistics, recipe = folder / "model", folder / "statistics", folder / "gptq.yaml"
        generate(model, config)
        recipe.write_text(RECIPE)
        threads = ["--threads", str(asked.threads), "--force"]
        steps = {
            "calibrate": ["calibrate", model, "-o", statistics],
            "gptq": ["quantize", model, "-r", recipe, "--stats", statistics, "-o", folder / "gptq"],
            "int4-best": ["quantize", model, "-r", "int4-best", "--recover", "0", "-o", folder / "int4-best"],
        }
        most = bar(config)
        print(
            f"{asked.preset}, {config.num_hidden_layers} layers: {parameter_count(config):,} parameters; bar "
            f"{most / 1e6:,.0f} MB\n"
        )
        print("| layers | step | minutes | promised | CPU minutes | peak memory, MB | promised |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        rows = []
        for step in asked.steps:
            found = measure([*map(str, steps[step]), *threads], asked.threads)
            rows.append(
                {"step": step, "layers": config.num_hidden_layers, **found, "promised": promised(found["said"])}
            )
            said = rows[-1]["promised"]
            minutes = f"{said['seconds'] / 60:.1f}" if "seconds" in said else "–"
            memory = f"{said['memory_mb']:,.0f}" if "memory_mb" in said else "–"
            print(
                f"| {config.num_hidden_layers} | {step} | {found['seconds'] / 60:.1f} | {minutes} | "
                f"{found['cpu_seconds'] / 60:.1f} | {found['peak_bytes'] / 1e6:,.0f} | {memory} |",
                flush=True,
            )
    on = machine()
    print(f"\n{asked.threads} thread(s), {on['cpu']}, {on['system']}, Python {on['python']}, torch {on['torch']}")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"version": 1, "bar_bytes": most, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
