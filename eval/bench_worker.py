# SPDX-License-Identifier: Apache-2.0
"""The process in which `mossquant.eval.bench` runs one artifact.

It answers orders (`mossquant.targets.child`): "open" loads, "turn" times a prefill and a decode, "memory" says how much
was used, "read" times reads of the mapping that holds the weights, "profile" says where the time of a turn goes.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mossquant.checkpoint.locate import Located, locate
from mossquant.eval.machine import peak_rss_mb, read_bandwidth
from mossquant.eval.open import open_model
from mossquant.eval.scores import advance
from mossquant.runner import Runner
from mossquant.targets.child import serve
from mossquant.targets.target import target_of
from mossquant.targets.trial import accept

_SEED = 0


def main() -> None:
    """Answer orders until there are no more."""
    runners: list[Runner] = []
    reads: list[Callable[[], float]] = []

    def answer(order: Mapping[str, Any]) -> dict[str, Any]:
        if order["do"] == "open":
            runner, opened = _open(order)
            runners.append(runner)
            return opened
        if order["do"] == "turn":
            return _turn(runners[0], prompt=order["prompt"], decode=order["decode"])
        if order["do"] == "memory":
            return {"peak_rss_mb": peak_rss_mb()}
        if order["do"] == "read":
            if not reads:
                reads.append(_reader(locate(order["path"]), runners[0], order["threads"]))
            return {"read_gb_s": reads[0]()}
        lengths = {name: order[name] for name in ("prompt", "decode", "turns")}
        return _profile(runners[0], locate(order["path"]), **lengths)

    serve(answer)


def _open(order: Mapping[str, Any]) -> tuple[Runner, dict[str, Any]]:
    located = locate(order["path"])
    accept(order["passed"])
    _warm(located)
    idle = peak_rss_mb()
    start = time.perf_counter()
    opened = open_model(located, threads=order["threads"])
    load_ms = (time.perf_counter() - start) * 1e3
    info = opened.runner.info
    mapped = target_of(located).mapped(opened.runner)
    return opened.runner, {
        "path": opened.path,
        "kind": info.kind,
        "weights": info.weights,
        "activations": info.activations,
        "bytes_per_token": round(info.weight_bytes * target_of(located).active_share_of(opened.runner)),
        "load_ms": load_ms,
        "idle_rss_mb": idle,
        "mapped_mb": None if mapped is None else mapped.stat().st_size / 1e6,
    }


def _warm(located: Located) -> None:
    """Import the runtime and bring the files into memory: an application's second start is what is timed."""
    target_of(located).warm(located)
    files = [located.path] if located.path.is_file() else sorted(located.path.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def _reader(located: Located, runner: Runner, threads: int) -> Callable[[], float]:
    """What times reads of a file's mapping. It is a second one, which this process's memory counts once more."""
    path = target_of(located).mapped(runner)
    assert path is not None
    mapped = np.memmap(path, np.uint8, mode="r")
    read_bandwidth(mapped, threads)  # its pages are mapped now
    return lambda: read_bandwidth(mapped, threads)


def _turn(runner: Runner, *, prompt: int, decode: int) -> dict[str, Any]:
    tokens = np.random.default_rng(_SEED).integers(0, runner.info.vocab_size, (1, prompt), np.int64)
    state = runner.initial_state(1)
    start = time.perf_counter()
    logits, state = advance(runner, tokens, state)
    prefill_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(decode):
        token = np.array([[int(np.argmax(logits[0, -1]))]], np.int64)
        logits, state = runner(token, state, logits="last")
    return {"prefill": prefill_seconds, "decode": time.perf_counter() - start}


def _profile(runner: Runner, located: Located, *, prompt: int, decode: int, turns: int) -> dict[str, Any]:
    """Microseconds a token of each part, of the prefill and of the decode; empty where the runtime does not say.

    Medians over turns: one that the system interrupts changes nothing.
    """
    target = target_of(located)
    tokens = np.random.default_rng(_SEED).integers(0, runner.info.vocab_size, (1, prompt), np.int64)
    state = runner.initial_state(1)

    def prefill() -> None:
        nonlocal state
        _, state = advance(runner, tokens, state)

    def steps() -> None:
        nonlocal state
        for step in range(decode):
            _, state = runner(tokens[:, step % prompt][:, None], state, logits="last")

    found: dict[str, dict[str, float]] = {}
    for name, work, count in (("prefill_us", prefill, prompt), ("decode_us", steps, decode)):
        seconds = [target.profiled(runner, work) or {} for _ in range(turns)]
        medians = {part: statistics.median(turn[part] for turn in seconds) for part in seconds[0]}
        found[name] = {part: 1e6 * median / count for part, median in medians.items() if median > 0}
    return found


if __name__ == "__main__":
    main()
