# SPDX-License-Identifier: Apache-2.0
"""What choosing experts costs in decode: a MossNet in libmoss against a dense model with the same active weights.

    python bench/experts.py FOLDER [--preset 8x200m] [--layers N] [--threads 1,2] [--repeats 9] [--steps 32]
        [--json FILE] [--markdown docs/performance.md]

Two minutes on two idle cores, the first time; FOLDER keeps what is made, and what is there already is used again.

Random weights, rounded to nearest by the formats of int4-uniform (speed does not depend on the values), as .moss:

    all experts   the preset: X experts of both kinds, of which a token takes K
    K experts     of both kinds, all of which a token takes: the same weights a token, and nothing left over
    dense         no routers: one MLP K times as wide, and one expert of the SSM whose dt has rank K R + (K - 1) N,
                  which gives its x_proj and dt_proj together as many weights as those of K experts have

All three are opened in one process. A turn is `--steps` single steps of each, one of each after the other, whose order
rotates, fed the same random tokens: so the weights of a step are never those that the step before left in the caches,
and whatever else the machine does comes upon all alike. Ratios are of the same turn; the first turn does not count.
With one thread a step is timed by the processor's time of this thread, with more by the clock. Where the time goes is
what libmoss says of as many steps of each model by themselves, of each part the least of the turns: by the clock, so
that others that run meanwhile count in it.

Random routers on random tokens choose nearly at random; how evenly is counted in the PyTorch model.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peers import cell, make_checkpoint, published
from peers_llama import made

from mossquant import export, quantize
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.eval.bench import Speed
from mossquant.eval.machine import machine
from mossquant.model.config import MossNetConfig, preset
from mossquant.model.routing import Routing
from mossquant.plan.recipe import Recipe
from mossquant.release import release
from mossquant.targets.native.runner import NativeRunner
from mossquant.targets.native.target import TARGET
from mossquant.targets.torch.runner import TorchRunner

BAR = 1.1
"""The most that all experts may take, as a multiple of the time of either other model."""
ROUTED = 128
"""Tokens whose choices are counted."""
ALL, FEW, DENSE = "all experts", "K experts", "dense"


def configs(whole: MossNetConfig) -> dict[str, MossNetConfig]:
    """The three models.

    Raises:
        InputError: a preset whose two kinds of experts do not choose alike, or that has none to choose.
    """
    chosen = whole.num_ssm_experts_per_tok
    if whole.num_mlp_experts_per_tok != chosen or not chosen < whole.ssm_experts(0) == whole.mlp_experts(0):
        raise InputError("this preset has no experts to choose from, or other numbers of them; give 8x200m or 8x30m")
    one: dict[str, Any] = {
        "num_ssm_experts_per_tok": 1,
        "num_mlp_experts_per_tok": 1,
        "num_ssm_experts": 1,
        "num_mlp_experts": 1,
    }
    rank = chosen * whole.time_step_rank + (chosen - 1) * whole.state_size
    width = chosen * whole.mlp_intermediate_size
    return {
        ALL: whole,
        FEW: replace(whole, num_ssm_experts=chosen, num_mlp_experts=chosen),
        DENSE: replace(whole, **one, time_step_rank=rank, mlp_intermediate_size=width),
    }


def made_program(folder: Path, config: MossNetConfig) -> Path:
    """Its artifact, and what it is made of, in a folder of its own.

    Raises:
        InputError: what is there is of another shape.
    """
    folder.mkdir(exist_ok=True)
    text = Recipe.named("int4-uniform").text
    (folder / "recipe.yaml").write_text(text.replace("solver: nearest-mse", "solver: nearest"))
    full = made(folder / "full", lambda path: make_checkpoint(config, path))
    if Checkpoint.open(full).config != config:
        raise InputError(f"{full} is of another shape; give another folder, or remove it")
    int4 = made(folder / "int4", lambda path: quantize(full, path, recipe=folder / "recipe.yaml"))
    return made(folder / "native", lambda path: export(int4, path, target="native"))


def routed(checkpoint: Path, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> list[float]:
    """Of each router, the share of all choices that fell on the expert that was chosen most."""
    counts: dict[str, Counter[int]] = {}

    def count(name: str, routing: Routing) -> Routing:
        counts.setdefault(name, Counter()).update(routing.chosen.flatten().tolist())
        return routing

    runner = TorchRunner.open(checkpoint)
    runner.run_routed(tokens[None], runner.initial_state(1), count, logits="last")
    return [max(own.values()) / own.total() for own in counts.values()]


class Turns:
    """The models side by side with so many threads."""

    def __init__(self, programs: Mapping[str, Path], threads: int, steps: int) -> None:
        self._runners = {name: NativeRunner(path, threads=threads) for name, path in programs.items()}
        self._states = {name: runner.initial_state(1) for name, runner in self._runners.items()}
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        vocabulary = min(runner.info.vocab_size for runner in self._runners.values())
        self.tokens = np.random.default_rng(0).integers(0, vocabulary, (steps, 1, 1), np.int64)

    def weights_mb(self) -> dict[str, float]:
        """10⁶ bytes of weights that a step reads."""
        return {
            name: runner.info.weight_bytes * TARGET.active_share_of(runner) / 1e6
            for name, runner in self._runners.items()
        }

    def turn(self) -> dict[str, float]:
        """Milliseconds a step of each model."""
        spent, names = dict.fromkeys(self._runners, 0.0), list(self._runners)
        for number, token in enumerate(self.tokens):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began = self._clock()
                self._step(name, token)
                spent[name] += self._clock() - began
        return {name: 1e3 * seconds / len(self.tokens) for name, seconds in spent.items()}

    def parts(self) -> dict[str, dict[str, float]]:
        """Microseconds a step of each part of each model."""
        found = {}
        for name, runner in self._runners.items():

            def steps(name: str = name) -> None:
                for token in self.tokens:
                    self._step(name, token)

            seconds = runner.model.profiled(steps)
            found[name] = {part: 1e6 * value / len(self.tokens) for part, value in seconds.items()}
        return found

    def _step(self, name: str, token: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        _, self._states[name] = self._runners[name](token, self._states[name])


def measured(programs: Mapping[str, Path], threads: int, repeats: int, steps: int) -> dict[str, Any]:
    """Times, ratios and parts with so many threads."""
    turns = Turns(programs, threads, steps)
    found, parts = [], []
    for number in range(repeats + 1):
        one, of_parts = turns.turn(), turns.parts()
        if number > 0:
            found.append(one)
            parts.append(of_parts)
        print(f"threads {threads}: turn {number} of {repeats}", file=sys.stderr, flush=True)
    return {
        "step_ms": {name: Speed.of([one[name] for one in found]) for name in programs},
        "weights_mb": turns.weights_mb(),
        "ratios": {name: Speed.of([one[ALL] / one[name] for one in found]) for name in (FEW, DENSE)},
        "parts_us": {
            name: {part: min(one[name][part] for one in parts) for part in parts[0][name]} for name in programs
        },
    }


def tables(found: Mapping[str, Any], threads: str, names: Mapping[str, str]) -> list[str]:
    """A model a row, then a part of the model a row."""
    many = f"{threads} thread{'' if threads == '1' else 's'}"
    lines = [f"| {many} | a step, ms | weights a step, MB | GB/s | all experts take, times | at most {BAR} |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, shown in names.items():
        step, weights, ratio = found["step_ms"][name], found["weights_mb"][name], found["ratios"].get(name)
        held = "—" if ratio is None else "yes" if ratio.median <= BAR else "no"
        speed = f"{weights:,.1f} | {weights / step.median:,.1f}"
        lines.append(f"| {shown} | {cell(step, 2)} | {speed} | {cell(ratio, 3)} | {held} |")
    lines += ["", f"| {many}, µs of a step | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    parts = {name: found["parts_us"][name] for name in names}
    for part in parts[ALL]:
        lines.append(f"| {part} | {' | '.join(f'{own[part]:,.0f}' for own in parts.values())} |")
    lines.append(f"| in all | {' | '.join(f'{sum(own.values()):,.0f}' for own in parts.values())} |")
    return lines


def section(report: Mapping[str, Any]) -> str:
    """The section of docs/performance.md."""
    ran, whole, dense = (report[name] for name in ("machine", "model", "dense"))
    count, chosen = whole["num_ssm_experts"], whole["num_ssm_experts_per_tok"]
    names = {
        ALL: f"{count} experts, of which a token takes {chosen}",
        FEW: f"{chosen} experts, both taken" if chosen == 2 else f"{chosen} experts, all taken",
        DENSE: f"dense: MLP of {dense['mlp_intermediate_size']}, dt of rank {dense['time_step_rank']}",
    }
    most = report["most_chosen"]
    text = [
        "## What choosing experts costs",
        "",
        f"Written by `{report['command']}` with mossquant {release()} on {ran['cpu']}, {ran['cores']} cores. Decode in "
        f"libmoss, int4, of `{report['preset']}` ({whole['num_hidden_layers']} × {whole['hidden_size']}) with random "
        f"weights, against models that have as many weights a token and nothing to choose. Single steps, one of each "
        f"model after the other, so that none finds its weights in a cache; median and range of {report['repeats']} "
        f"turns of {report['steps']} steps, ratios of the same turn; parts are the least of the turns, by the clock; "
        f"`bench/experts.py` says more. Random routers "
        f"choose for random tokens: of {report['routed']} tokens the most chosen expert of a router has "
        f"{100 * statistics.median(most):.0f} % of the choices ({100 * min(most):.0f}–{100 * max(most):.0f} % over "
        f"{len(most)} routers; even would be {100 / count:.1f} %). Ratios hold for this machine alone.",
    ]
    for threads, found in report["threads"].items():
        text += ["", *tables(found, threads, names)]
    return "\n".join(text) + "\n"


def report_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, and measure."""
    whole, folder = preset(asked.preset), asked.folder.absolute()
    whole = replace(whole, num_hidden_layers=asked.layers or whole.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = configs(whole)
    folders = dict(zip(shapes, ("all", "few", "dense"), strict=True))
    programs = {name: made_program(folder / folders[name], config) for name, config in shapes.items()}
    tokens = np.random.default_rng(1).integers(0, whole.vocab_size, ROUTED, np.int64)
    most = made(
        folder / "most_chosen.json",
        lambda path: path.write_text(json.dumps(routed(folder / "all" / "int4", tokens))),
    )
    settings = f"--preset {asked.preset}" + (f" --layers {asked.layers}" if asked.layers else "")
    settings += f" --threads {asked.threads} --repeats {asked.repeats} --steps {asked.steps}"
    return {
        "version": 1,
        "command": f"python bench/experts.py FOLDER {settings}",
        "machine": machine(),
        "preset": asked.preset,
        "model": shapes[ALL].to_json(torch_dtype="bfloat16"),
        "dense": shapes[DENSE].to_json(torch_dtype="bfloat16"),
        "repeats": asked.repeats,
        "steps": asked.steps,
        "routed": ROUTED,
        "most_chosen": json.loads(most.read_text()),
        "threads": {
            many: measured(programs, int(many), asked.repeats, asked.steps) for many in asked.threads.split(",")
        },
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="8x200m")
    parser.add_argument("--layers", type=int, help="cut the preset to so many")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="page whose section is written anew")
    published(parser.parse_args, report_of, section)


if __name__ == "__main__":
    main()
