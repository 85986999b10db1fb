# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: run text through a model block by block, and gather the statistics of its linears.

Windows of 512 tokens, each with the state at zero, come in an order drawn once over the whole text. Up to four at a
time pass through a block, which is loaded alone; what enters it (the residual stream of all windows of a round) waits
in memory, or on disk where it is longer. A round takes every window that is new through all blocks; each round doubles
the windows, until every input has its quota of effective tokens or the tokens that may be read are used up.

What a round found of a block is added to what earlier ones found, in float64, and stored in the work folder. A killed
run goes on from there: blocks that are stored are computed again, but not measured. The products of one pass are made
in fp32. Under `torchrun` each process takes every so manieth pass, and sums are added over the processes.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mossquant.calibration.statistics import (
    Input,
    InputRecord,
    Statistics,
    StatisticsWriter,
    inputs_of,
    triangle,
)
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.tensorfiles import TensorFile, all_finite, save_tensors
from mossquant.checkpoint.weights import Weights, value
from mossquant.device import check_device
from mossquant.errors import InputError
from mossquant.files.outputs import check_apart, check_free, json_bytes, new_file, new_folder
from mossquant.files.space import check_space, trim_heap
from mossquant.model.block import Block, rms_norm
from mossquant.model.blocks import blocks_of
from mossquant.model.forward import Forward
from mossquant.model.routing import Routing
from mossquant.model.tensors import Use, outside_blocks
from mossquant.progress import Progress
from mossquant.release import release
from mossquant.text.text import Text

WINDOW = 512
"""Tokens a window."""
PASS_WINDOWS = 4
"""Windows that go through a block at once, at most."""
_PASS_VALUES = 1 << 21
"""Values of the widest input of a pass, at most, unless one window has more."""
HELD_OUT = 8
"""One window of so many is held out."""
FIRST_ROUND = 32
"""Windows of the first round."""
DEFAULT_MEMORY = 256 * 10**6
"""Bytes of waiting inputs that are kept in memory."""

_RUN = "run.json"
ROUTED, ROWS = "routed", "rows"
"""Names under which a block's file holds [X, 3] tokens, Σ g² and Σ g⁴ of each expert, and [1] all tokens."""
_PASS_ARRAYS = 24
"""fp32 arrays [tokens of a pass, widest input] that a block's pass holds, at most."""


def calibrate(
    model: str | Path | Weights,
    output: str | Path,
    *,
    text: Sequence[str | Path | Text] = (),
    tokens: int = 2_000_000,
    quota: float = 4.0,
    memory: int | None = None,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> Statistics:
    """Gather the statistics of a full-precision model.

    Finished blocks are kept in the work folder `OUTPUT.calibrating`; the same call again goes on from there, with the
    same bytes in the end. Under `torchrun` every process makes this call and they share the passes; output and text
    lie where all of them see them.

    Args:
        model: a checkpoint folder, or the name "tiny"; or weights of which every tensor is kept.
        output: folder to write; nothing may be there, unless `force`.
        text: files or texts; none: the bundled calibration text, for models with the bundled tokenizer.
        tokens: most tokens that are read.
        quota: effective tokens that every input should get, in multiples of its width.
        memory: bytes of waiting inputs that are kept in memory, 256 MB if not given; what is more lies on disk.
        threads: CPU threads; the same number gives the same bytes.
        device: "cpu" or "cuda".
        force: replace what is at `output`.
        progress: called after each pass, with the block, passes done and in all of this round.
        said: called with a line about what is expected, and about each round.

    Returns:
        The statistics, opened.

    Raises:
        InputError: a bad checkpoint or a quantized one, a bad text, no CUDA device, an output that cannot be written,
            too little disk or memory, a work folder of another run: before any work.
    """
    destination = Path(output)
    inputs = [Path(item) for item in text if not isinstance(item, Text)]
    if isinstance(model, str | Path):
        inputs.append(locate(model).require("checkpoint", verb="calibrate"))
    check_free(destination, force=force, inputs=inputs)
    work = destination.with_name(f"{destination.name}.calibrating")
    check_apart(work, inputs)
    if tokens < 1 or not 0 <= quota < math.inf or (memory is not None and memory < 0):
        raise InputError("tokens must be at least 1, quota and memory at least 0")
    check_device(device)
    weights = open_weights(model, verb="calibrate")
    if weights.origin.recipe is not None:
        raise InputError(f"{weights.origin.path} is quantized; give the full-precision model that it was made from")
    read = CalibrationText.of(weights, text)
    with _threads(threads), _processes() as processes:
        windows = _windows(read, tokens)
        waiting = DEFAULT_MEMORY if memory is None else memory
        walk = _Walk(weights, windows, work, quota, waiting, torch.device(device), processes)
        run = {
            "version": 1,
            "release": release(),
            "model": dict(weights.origin.files),
            "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "quota": quota,
            "device": device,
            "threads": torch.get_num_threads(),
            "processes": processes.count,
        }
        problem = _other_run(work, run) if processes.first else None
        if problem := processes.agreed(problem):
            raise InputError(problem)
        check_space(destination, disk_bytes=walk.disk_bytes, memory_bytes=walk.memory_bytes)
        if processes.first:
            work.mkdir(parents=True, exist_ok=True)
            with new_file(work / _RUN, force=True) as partial:
                partial.write_bytes(json_bytes(run))
        processes.wait()
        say = said if said is not None and processes.first else lambda line: None
        with torch.no_grad():
            say(walk.expected())
            seen = walk.run(progress or (lambda name, done, total: None), say)
        if processes.first:
            records = walk.records()
            with new_folder(destination, force=force) as partial:
                writer = StatisticsWriter(partial, walk.inputs)
                for entry, moments, sketch in walk.found():
                    writer.add(entry, moments, sketch)
                writer.finish(
                    weights, text=read.sha256, tokens=seen, window=windows.shape[1], quota=quota, records=records
                )
            shutil.rmtree(work)
        processes.wait()
    return Statistics.open(destination, weights)


class _Processes:
    """The processes that share the passes; one alone where there are no others."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count

    @property
    def first(self) -> bool:
        """Whether this one writes and decides."""
        return self.number == 0

    def agreed(self, decided: Any) -> Any:
        """What the first process decided."""
        if self.count == 1:
            return decided
        box = [decided]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Sums over all processes, in place."""
        if self.count > 1:
            for tensor in sums.values():
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def _processes() -> Iterator[_Processes]:
    """Those that `torchrun` started, joined by gloo."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield _Processes(0, 1)
        return
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo")
    try:
        yield _Processes(dist.get_rank(), count)
    finally:
        if not joined:
            dist.destroy_process_group()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _windows(text: CalibrationText, tokens: int) -> Tensor:
    """All windows that may be read, int64 [n, T], in the order in which they are: drawn once over the whole text."""
    length = min(WINDOW, len(text), tokens)
    every = torch.from_numpy(text.tokens[: len(text) // length * length]).view(-1, length)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return every[order[: max(1, tokens // length)]].contiguous()


def _other_run(work: Path, run: Mapping[str, Any]) -> str | None:
    """What is wrong with a work folder that is there already."""
    if not work.exists():
        return None
    try:
        before = json.loads((work / _RUN).read_bytes())
    except (OSError, ValueError):
        before = None if work.is_dir() and not any(work.iterdir()) else {}
    if before is None or before == dict(run):
        return None
    return f"{work} was left by another run, or is none of ours; remove it, or choose another output path"


@dataclass
class Step:
    """What one pass goes through: a block, or the last norm before the head.

    Attributes:
        name: for progress.
        kind: of the block, None for the last norm.
        layer: of the block.
        inputs: of its linears.
        experts: X, 0 where it has none.
    """

    name: str
    kind: type[Block] | None
    layer: int
    inputs: list[Input]
    experts: int


def steps_of(weights: Weights) -> list[Step]:
    """What a model's residual stream goes through, in order; the last norm before the head at the end."""
    steps = []
    for layer, kind in blocks_of(weights.config):
        experts = kind.experts(weights.config, layer)
        own = inputs_of(kind.specs(weights.config, layer))
        steps.append(Step(f"layer {layer}, {kind.kind}", kind, layer, own, 0 if experts is None else experts.count))
    head = inputs_of(spec for spec in weights.specs.values() if spec.layer is None)
    return [*steps, Step("head", None, 0, head, 0)]


class Sums:
    """What one block's inputs sum up to, over some passes."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._device = device
        self._readers = {entry.tensors[0]: entry for entry in step.inputs}
        self._moments = {entry.name: _zeros(entry.width, entry.width, device=device) for entry in step.inputs}
        self._sketches = {entry.name: _zeros(entry.sketched, entry.width, device=device) for entry in step.inputs}
        self._routed = _zeros(step.experts, 3, device=device)
        self._rows = _zeros(1, device=device)
        self._held = torch.zeros(0, dtype=torch.bool)
        self._signs = torch.zeros(0)

    def begin(self, number: int, held: Tensor) -> None:
        """A pass is about to come, of this number, with these of its rows held out: bool [n]."""
        most = max((sketch.shape[0] for sketch in self._sketches.values()), default=0)
        generator = torch.Generator().manual_seed(number)
        signs = torch.randint(0, 2, (most, len(held)), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs, self._held = signs.float().to(self._device), held.to(self._device)
        self._rows += (~self._held).sum()

    def observe(
        self, names: Sequence[str], x: Tensor, rows: Tensor | None, gates: Tensor | None, out: Tensor | None
    ) -> None:
        """An `Observe`: of the linears that read one input, the first shows it."""
        entry = self._readers.get(names[0])
        if entry is None or len(x) == 0:
            return
        x = x if gates is None else x * gates
        held = self._held if rows is None else self._held[rows]
        # A power of two moves no rounding, and keeps squares of large values inside fp32.
        size = 2.0 ** int(torch.frexp(x.abs().amax()).exponent)
        x = x / size
        learned = x[~held]
        self._moments[entry.name].add_(learned.T @ learned, alpha=size**2)
        if bool(held.any()):
            signs = self._signs[: entry.sketched]
            signs = signs if rows is None else signs[:, rows]
            self._sketches[entry.name].add_(signs[:, held] @ x[held], alpha=size)

    def reroute(self, name: str, routing: Routing) -> Routing:
        """A `Reroute` that changes nothing, and counts with which gates experts were chosen."""
        gates = routing.dense()[~self._held].double()
        squares = gates.square()
        self._routed += torch.stack([(gates > 0).double().sum(0), squares.sum(0), squares.square().sum(0)], 1)
        return routing

    def stored(self, step: Step) -> dict[str, Tensor]:
        """As a block's file holds them. What is given is forgotten here."""
        tensors = {ROUTED: self._routed.cpu(), ROWS: self._rows.cpu()}
        for entry in step.inputs:
            tensors[entry.moments] = triangle(self._moments.pop(entry.name).cpu())
            tensors[entry.sketch] = self._sketches.pop(entry.name).cpu()
        return tensors


def records_of(step: Step, routed: Tensor, rows: Tensor, quota: float) -> list[InputRecord]:
    """How much text each input of a step was measured on, by what `Sums` counted."""
    records = []
    for entry in step.inputs:
        counted = [float(rows)] * 3 if entry.expert is None else routed[entry.expert].tolist()
        tokens, squares, fourths = counted
        records.append(
            InputRecord(
                name=entry.name,
                layer=entry.layer,
                expert=entry.expert,
                width=entry.width,
                tokens=int(tokens),
                squares=squares,
                effective=squares**2 / fourths if fourths > 0 else 0.0,
                needed=quota * entry.width,
            )
        )
    return records


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


class _Walk:
    """The rounds."""

    def __init__(
        self,
        weights: Weights,
        windows: Tensor,
        work: Path,
        quota: float,
        memory: int,
        device: torch.device,
        processes: _Processes,
    ) -> None:
        self._weights, self._windows, self._work, self._quota = weights, windows, work, quota
        self._memory, self._device, self._processes = memory, device, processes
        self._scan: Literal["kernel", "chunked"] = "kernel" if device.type == "cpu" else "chunked"
        specs = weights.specs.values()
        self.inputs = inputs_of(spec for spec in specs if spec.layer is not None)
        self.inputs += inputs_of(spec for spec in specs if spec.layer is None)
        self._steps = steps_of(weights)

    @property
    def _pass_windows(self) -> int:
        widest = max(entry.width for entry in self.inputs)
        return max(1, min(PASS_WINDOWS, _PASS_VALUES // (self._windows.shape[1] * widest)))

    @property
    def _most_waiting(self) -> int:
        """Bytes of the residual stream of the longest round that may come, in one process."""
        longest = max(min(FIRST_ROUND, len(self._windows)), -(-len(self._windows) // 2))
        share = -(-longest // self._processes.count) + self._pass_windows
        return share * self._windows.shape[1] * self._weights.config.hidden_size * 4

    @property
    def disk_bytes(self) -> int:
        """Disk that the output and the work folder take, at most."""
        largest = max(sum(entry.stored_bytes for entry in step.inputs) for step in self._steps)
        waiting = self._most_waiting if self._most_waiting > self._memory else 0
        return 2 * sum(entry.stored_bytes for entry in self.inputs) + largest + waiting * self._processes.count

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory: the largest block, what a pass computes, one block's sums, inputs that wait."""
        specs = self._weights.specs.values()
        sizes: dict[tuple[int, str], int] = {}
        for spec in specs:
            if spec.layer is not None:
                at = (spec.layer, spec.role.partition(".")[0])
                sizes[at] = sizes.get(at, 0) + 4 * spec.count
        widest = max(entry.width for entry in self.inputs)
        sums = max(
            sum(8 * entry.width * (entry.width + entry.sketched) for entry in step.inputs) for step in self._steps
        )
        waiting = min(self._most_waiting, self._memory)
        return (
            max(sizes.values())
            + sums
            + _PASS_ARRAYS * 4 * self._pass_windows * self._windows.shape[1] * widest
            + waiting
        )

    def expected(self) -> str:
        """Minutes, disk and memory, in a line: a pass through the first layer is timed for it."""
        first, total = min(FIRST_ROUND, len(self._windows)), len(self._windows)
        timed = [step for step in self._steps if step.kind is not None and step.layer == 0]
        batch = self._windows[: self._pass_windows]
        x = self._embedded(batch)
        took = 0.0
        for step in timed:
            block, sums = self._loaded(step), Sums(step, self._device)
            sums.begin(0, torch.zeros(batch.numel(), dtype=torch.bool))
            self._passed(block, x, sums)  # the first pass of a process pays for what libraries set up
            began = time.monotonic()
            x = self._passed(block, x, sums)
            took += time.monotonic() - began
        a_window = took / len(batch) * sum(step.kind is not None for step in self._steps) / len(timed)
        a_window /= self._processes.count
        length, disk, room = self._windows.shape[1], self.disk_bytes / 1e6, self.memory_bytes / 1e6
        return (
            f"about {_minutes(first * a_window)} for the first {first * length:,} tokens, at most "
            f"{_minutes(total * a_window)} for {total * length:,}; up to {disk:,.0f} MB of disk, about "
            f"{room:,.0f} MB of memory beside Python's own"
        )

    def run(self, progress: Progress, say: Callable[[str], None]) -> int:
        """All rounds; returns tokens read."""
        total, length, done, number = len(self._windows), self._windows.shape[1], 0, 0
        while True:
            last = min(total, max(2 * done, FIRST_ROUND))
            began, measured = time.monotonic(), self._round(number, done, last, progress)
            lacking = self._processes.agreed(self._lacking(number) if self._processes.first else None)
            line = f"round {number + 1}: {last * length:,} tokens"
            if not lacking:
                say(line)
                return last * length
            line += f", {lacking[0]} of {len(self.inputs)} inputs want more"
            if last == total:
                say(f"{line}, and the text or --tokens is used up")
                return last * length
            if measured:
                a_window = (time.monotonic() - began) / (last - done)
                wanted = min(total, max(2 * last, last * lacking[1]))
                line += f"; about {_minutes((wanted - last) * a_window)} more, for {int(wanted) * length:,} tokens"
            say(line)
            done, number = last, number + 1

    def records(self) -> list[InputRecord]:
        """How much text each input was measured on."""
        return [record for step in range(len(self._steps)) for record in self._records_of(step)]

    def found(self) -> Iterator[tuple[Input, Tensor, Tensor]]:
        """Each input with its triangle and its sketch."""
        for at, step in enumerate(self._steps):
            file = TensorFile(self._file(at, self._stored(at)))
            for entry in step.inputs:
                yield entry, file.tensor(entry.moments), file.tensor(entry.sketch)

    def _records_of(self, at: int) -> list[InputRecord]:
        step, file = self._steps[at], TensorFile(self._file(at, self._stored(at)))
        return records_of(step, file.tensor(ROUTED), file.tensor(ROWS), self._quota)

    def _lacking(self, number: int) -> tuple[int, float] | None:
        """(inputs that lack, by which factor the tokens should grow at most) after a round; None where none lacks."""
        if any(self._stored(at) > number for at in range(len(self._steps))):
            return 1, 2.0  # a run that was killed had decided to go on
        lacking = [record for record in self.records() if record.lacks]
        if not lacking:
            return None
        return len(lacking), max(record.needed / max(record.effective, 1.0) for record in lacking)

    def _round(self, number: int, start: int, last: int, progress: Progress) -> bool:
        """Windows start…last through all blocks; returns whether all of them had to be measured."""
        processes = self._processes
        finished = processes.agreed([self._stored(at) >= number for at in range(len(self._steps))])
        if all(finished):
            return False
        size = self._pass_windows
        passes = list(enumerate(range(start, last, size)))
        own = [(at, min(at + size, last)) for i, at in passes if i % processes.count == processes.number]
        stream = self._stream(sum(end - at for at, end in own))
        filled = 0
        for at, end in own:
            stream[filled : filled + end - at] = self._embedded(self._windows[at:end]).cpu()
            filled += end - at
        steps = len(self._steps) - finished[::-1].index(False)  # nobody asks for what comes after the last
        for index, step in enumerate(self._steps[:steps]):
            sums = None if finished[index] else Sums(step, self._device)
            block, filled = self._loaded(step), 0
            for i, (at, end) in enumerate(own):
                if sums is not None:
                    held = torch.arange(at, end) % HELD_OUT == 1
                    sums.begin(at, held.repeat_interleave(self._windows.shape[1]))
                mine = slice(filled, filled + end - at)
                x = self._passed(block, stream[mine].to(self._device), sums)
                if step.kind is not None:
                    stream[mine] = x.cpu()
                filled += end - at
                progress(step.name, index * len(own) + i + 1, steps * len(own))
            del block
            if sums is not None:
                self._store(index, step, number, sums)
            trim_heap()
        return not any(finished)

    def _stream(self, windows: int) -> Tensor:
        """Room for the residual stream of so many windows: fp32 [windows, T, D]."""
        shape = (windows, self._windows.shape[1], self._weights.config.hidden_size)
        size = shape[0] * shape[1] * shape[2]
        if 4 * size <= self._memory:
            return torch.empty(shape)
        path = self._work / f"stream-{self._processes.number}"
        path.unlink(missing_ok=True)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def _embedded(self, tokens: Tensor) -> Tensor:
        table = outside_blocks(self._weights.specs.values())[Use.TABLE]
        return self._weights.kept(table.name)[tokens].float().to(self._device)

    def _loaded(self, step: Step) -> Block | Tensor:
        """The block, or the weight of the last norm."""
        if step.kind is None:
            norm = outside_blocks(self._weights.specs.values())[Use.NORM]
            return value(self._weights, norm.name).to(self._device)
        block = step.kind(self._weights.config, step.layer)
        block.load(lambda name: value(self._weights, name))
        return block.requires_grad_(False).to(self._device)

    def _passed(self, block: Block | Tensor, x: Tensor, sums: Sums | None) -> Tensor:
        """What a block makes of the residual stream [B, T, D]; `sums` sees its inputs."""
        config = self._weights.config
        if isinstance(block, Tensor):
            head = outside_blocks(self._weights.specs.values())[Use.LINEAR]
            normed = rms_norm(x, block, config.rms_norm_eps)
            if sums is not None:
                sums.observe([head.name], normed.flatten(0, 1), None, None, None)
            return normed
        state = {spec.name: spec.zeros(len(x), device=x.device) for spec in block.states(config, block.layer)}
        run = Forward(scan=self._scan)
        if sums is not None:
            run = Forward(scan=self._scan, observe=sums.observe, reroute=sums.reroute)
        return block.added(x, state, run)[0]

    def _file(self, at: int, number: int) -> Path:
        return self._work / f"{at:05d}-{number:02d}.safetensors"

    def _stored(self, at: int) -> int:
        """The last round that is stored of a block, −1 where there is none."""
        found = [int(path.stem.partition("-")[2]) for path in self._work.glob(f"{at:05d}-*.safetensors")]
        return max(found, default=-1)

    def _store(self, at: int, step: Step, number: int, sums: Sums) -> None:
        """Add what all processes found to what earlier rounds did, and store it.

        Raises:
            InputError: the model computes values that are not finite on this text.
        """
        tensors = sums.stored(step)
        self._processes.add(tensors)
        broken = [entry.name for entry in step.inputs if not all_finite(tensors[entry.moments])]
        if broken:
            advice = "Look at the weights before it, or take other text."
            raise InputError.listing(f"{self._weights.origin.path} computes NaN or infinite values", broken, advice)
        if self._processes.first:
            if number > 0:
                before = TensorFile(self._file(at, number - 1))
                for name, tensor in tensors.items():
                    tensor += before.tensor(name)
            with new_file(self._file(at, number), force=True) as partial:
                save_tensors(tensors, partial)
            self._file(at, number - 1).unlink(missing_ok=True)
        self._processes.wait()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
