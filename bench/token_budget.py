# SPDX-License-Identifier: Apache-2.0
"""Holds `quantize --budget 8ms --costs FILE` against the artifact: what a token should take, and what it takes.

    python bench/token_budget.py FOLDER [--preset mamba-130m] [--threads 1] [--share 0.5] [--repeats 5]

FOLDER keeps what is made, and what is there already is used again: a random model of that shape (speed does not depend
on the values) and its artifacts of both uniform recipes. The budget lies between what both should take, `--share` of
the way from int4 to int8. `moss-costs` on the int4 artifact gives the costs, the recipe int4 what is chosen from; then
once more with the costs of the artifact that came out, because how much stays in the caches depends on the size.

Then turns: costs are measured anew, and what they say of the plan is compared with single steps of the artifact after
it. Of both the least counts, which other work on the machine disturbs least; the steps' median is printed beside it.
With one thread the linears of the costs and the steps of the artifact are times of its processor, so that it does not
count when others run in its place; the rest of a step in the costs is time that passed, as libmoss times its parts.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mossquant import export, native_path, quantize
from mossquant.calibration.costs import Costs
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.eval.machine import machine
from mossquant.model.config import preset
from mossquant.model.mossnet import MossNet
from mossquant.plan.recipe import STORED
from mossquant.targets.native.runner import NativeRunner

STEPS = 200
"""Of a turn."""


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """What is there, or is made."""
    if not path.exists():
        make(path)
    return path


def make_checkpoint(folder: Path, name: str) -> None:
    """Random weights, as training begins with them."""
    config = preset(name)
    model = MossNet(config)
    model.reset_parameters(0)
    folder.mkdir()
    write_checkpoint(folder, config, lambda spec: model.parameter_of(spec).view(spec.shape), dtype=torch.bfloat16)


def measured_costs(program: Path, threads: int, to: Path) -> Costs:
    """What `moss-costs` says, which is kept in a file."""
    words = [str(native_path() / "bin" / "moss-costs"), str(program), str(threads)]
    to.write_bytes(subprocess.run(words, check=True, capture_output=True).stdout)
    return Costs.read(to)


def predicted_ms(costs: Costs, original: Weights, quantized: Weights) -> float:
    """Of a token of a quantized checkpoint."""
    formats = {name: quantized.format(name) for name in quantized.specs}
    total = sum(
        costs.tensors_ns(original, [spec], STORED if (found := formats[name]) is None else found.name)
        for name, spec in quantized.specs.items()
    )
    return (costs.fixed_ns + total) / 1e6


def steps_ms(artifact: Path, threads: int, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of single steps."""
    runner = NativeRunner(artifact, threads=threads)
    state, token, found = runner.initial_state(1), np.array([[1]], np.int64), []
    for _ in range(STEPS):
        began = clock()
        _, state = runner(token, state)
        found.append(1e3 * (clock() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="mamba-130m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    folder: Path = asked.folder
    folder.mkdir(exist_ok=True)
    full = made(folder / "full", lambda path: make_checkpoint(path, asked.preset))
    ends, programs = [], []
    for name in ("int4-uniform", "int8-uniform"):
        ends.append(made(folder / name, lambda path, name=name: quantize(full, path, recipe=name)))
        programs.append(made(folder / f"{name}-native", lambda path: export(ends[-1], path, target="native")))
    original = open_weights(full, verb="bench")
    costs = measured_costs(programs[0] / "model.moss", asked.threads, folder / "costs.json")
    low, high = (predicted_ms(costs, original, open_weights(end, verb="bench")) for end in ends)
    budget = f"{low + asked.share * (high - low):.2f}ms"
    print(f"all int4 should take {low:.2f} ms, all int8 {high:.2f} ms; the budget is {budget}")
    chosen, program = folder / "chosen", folder / "chosen-native"
    targets = ["torch", "native"]
    for again in (False, True):
        if again:
            costs = measured_costs(program / "model.moss", asked.threads, folder / "costs.json")
        quantize(full, chosen, recipe="int4", budget=budget, costs=folder / "costs.json", targets=targets, force=True)
        export(chosen, program, target="native", force=True)
        weights = open_weights(chosen, verb="bench")
        by_costs = predicted_ms(costs, original, weights)
        print(f"chosen: {weights.origin.payload_bytes:,} bytes, {by_costs:.2f} ms by these costs", flush=True)
    # With one thread, the time of its processor, as moss-costs takes it.
    clock = time.thread_time if asked.threads == 1 else time.perf_counter
    ratios = []
    for _ in range(asked.repeats):
        costs = measured_costs(program / "model.moss", asked.threads, folder / "again.json")
        should, took = predicted_ms(costs, original, weights), steps_ms(program, asked.threads, clock)
        ratios.append(min(took) / should)
        print(f"should take {should:.2f} ms; takes {min(took):.2f}, median {statistics.median(took):.2f}", flush=True)
    middle = statistics.median(ratios)
    print(f"measured ÷ predicted: {middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) on {machine()['cpu']}")


if __name__ == "__main__":
    main()
