# SPDX-License-Identifier: Apache-2.0
"""How fast artifacts run on this machine: prefill and decode in tokens a second, load time, memory.

Every artifact runs in a process of its own (`mossquant.eval.bench_worker`), so that its load time and peak memory are
its own. All are loaded first, then take turns, one at a time: drift of the machine hits all alike. One turn to warm up
is thrown away. Prefill: one call with `prompt` tokens from the initial state, logits of the last position. Decode:
`decode` single steps after it, each fed the most likely token of the one before.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mossquant.checkpoint.locate import locate
from mossquant.errors import InputError
from mossquant.eval.machine import copy_bandwidth, cpu_count, machine
from mossquant.progress import Progress
from mossquant.targets.child import Child
from mossquant.targets.target import target_of
from mossquant.targets.trial import passed

PROFILED_TURNS = 5
"""In which runtimes say where their time goes."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second over the repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Speed":
        """Median and range of one value a repeat."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """One artifact.

    Attributes:
        path: as given.
        kind: "checkpoint", "quantized checkpoint", or the target of a program.
        weights: recipe name or stored type.
        activations: activation format that it ran with.
        decode_tok_s: single steps a second.
        prefill_tok_s: tokens a second of one call with the whole prompt.
        load_ms: from the path to a Runner; its files were read before, so that they are in memory.
        peak_rss_mb: highest resident memory of its process after the first turn, Python and runtime included, in 10⁶
            bytes.
        idle_rss_mb: the same before anything was loaded.
        bytes_per_token: weight bytes that a decode step reads: all of them, times the share of the parameters that
            one token uses (only the chosen experts).
        mapped_mb: bytes of the file whose mapping holds the weights that a step reads, in 10⁶, a part of the peak; None
            where they lie elsewhere.
        read_gb_s: 10⁹ bytes a second that as many threads read of that file, once all artifacts have taken a turn.
        read_share: share of that bandwidth at which decode reads `bytes_per_token`.
        prefill_us: part of the model → microseconds a token of the prefill, where the runtime says so and was asked.
        decode_us: the same of a decode step.
    """

    path: str
    kind: str
    weights: str
    activations: str
    decode_tok_s: Speed
    prefill_tok_s: Speed
    load_ms: float
    peak_rss_mb: float
    idle_rss_mb: float
    bytes_per_token: int
    mapped_mb: float | None = None
    read_gb_s: Speed | None = None
    read_share: Speed | None = None
    prefill_us: Mapping[str, float] = field(default_factory=dict)
    decode_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchReport:
    """What `bench` found.

    Attributes:
        machine: what ran it: CPU, cores, system, versions.
        threads: CPU threads of every artifact.
        bandwidth_gb_s: 10⁹ bytes a second, read and written, of a large copy with as many threads.
        prompt: tokens of the prefill.
        decode: steps of the decode.
        repeats: turns that count.
        artifacts: in the order given.
    """

    machine: Mapping[str, Any]
    threads: int
    bandwidth_gb_s: float
    prompt: int
    decode: int
    repeats: int
    artifacts: tuple[Timing, ...]

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "version": 1,
            "machine": dict(self.machine),
            "threads": self.threads,
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "prompt_tokens": self.prompt,
            "decode_tokens": self.decode,
            "repeats": self.repeats,
            "artifacts": [asdict(timing) for timing in self.artifacts],
        }


def bench(
    paths: Sequence[str | Path],
    *,
    threads: int | None = None,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 5,
    profile: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Time artifacts against one another.

    Args:
        paths: PATH arguments; all are held in memory at once.
        threads: CPU threads; None: all that this process may use.
        prompt: tokens of the prefill.
        decode: steps of the decode.
        repeats: turns that count; the first, to warm up, does not.
        profile: `PROFILED_TURNS` more, for medians of each part, in runtimes that can say where their time goes.
        progress: told how many models are loaded, then how many turns are done.

    Raises:
        InputError: bad paths or options.
    """
    offenders = [
        f"{name} is {value}, needs 1 or more"
        for name, value in (
            ("threads", 1 if threads is None else threads),
            ("prompt", prompt),
            ("decode", decode),
            ("repeats", repeats),
        )
        if value < 1
    ]
    if offenders or not paths:
        raise InputError.listing("nothing can be timed", offenders or ["no artifact was given"], "Give others.")
    for located in [locate(path) for path in paths]:
        target_of(located).warm(located)  # programs are tried here, in one child process, and not by each worker
    tell = progress or (lambda name, done, total: None)
    used = threads or cpu_count()
    bandwidth = copy_bandwidth(used)
    prefill: list[list[float]] = [[] for _ in paths]
    steps: list[list[float]] = [[] for _ in paths]
    reads: list[list[float]] = [[] for _ in paths]
    memory: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Child("mossquant.eval.bench_worker"))) for _ in paths]
        loaded = []
        for worker, path in zip(workers, paths, strict=True):
            order = {"do": "open", "path": str(path), "threads": used, "passed": passed()}
            loaded.append(_answer(worker, order))
            tell("models loaded", len(loaded), len(paths))
        for turn in range(repeats + 1):
            for i, worker in enumerate(workers):
                seconds = _answer(worker, {"do": "turn", "prompt": prompt, "decode": decode})
                if turn > 0:
                    prefill[i].append(prompt / seconds["prefill"])
                    steps[i].append(decode / seconds["decode"])
                tell("turns", turn * len(workers) + i + 1, (repeats + 1) * len(workers))
            if turn == 0:  # before any file is mapped once more, to be read
                memory = [_answer(worker, {"do": "memory"}) for worker in workers]
                continue
            for i, worker in enumerate(workers):
                if loaded[i]["mapped_mb"] is not None:
                    answer = _answer(worker, {"do": "read", "path": str(paths[i]), "threads": used})
                    reads[i].append(answer["read_gb_s"])
        profiles: list[dict[str, Any]] = [{} for _ in paths]
        if profile:
            order = {"do": "profile", "prompt": prompt, "decode": decode, "turns": PROFILED_TURNS}
            profiles = [
                _answer(worker, order | {"path": str(path)}) for worker, path in zip(workers, paths, strict=True)
            ]
    return BenchReport(
        machine=machine(),
        threads=used,
        bandwidth_gb_s=bandwidth,
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        artifacts=tuple(
            Timing(
                **(loaded[i] | memory[i] | profiles[i]),
                prefill_tok_s=Speed.of(prefill[i]),
                decode_tok_s=Speed.of(steps[i]),
                read_gb_s=Speed.of(reads[i]) if reads[i] else None,
                read_share=_shares(reads[i], steps[i], loaded[i]["bytes_per_token"]),
            )
            for i in range(len(paths))
        ),
    )


def _shares(reads: Sequence[float], steps: Sequence[float], bytes_per_token: int) -> Speed | None:
    """Of what was read at after each turn, the share that the steps of that turn took; None where nothing was read."""
    if not reads:
        return None
    return Speed.of([1e-9 * bytes_per_token * speed / read for read, speed in zip(reads, steps, strict=True)])


def _answer(worker: Child, order: Mapping[str, Any]) -> dict[str, Any]:
    answer = worker.ask(order)
    if answer is None:
        raise RuntimeError(f"the process that runs the artifact ended with status {worker.status}")
    return answer
