# SPDX-License-Identifier: Apache-2.0
"""The walk of `quantize` through a model on text: block by block, inputs from the quantized blocks before.

Two residual streams of the same windows wait in memory: what full precision makes of the text, and what the quantized
blocks so far make of it. A block is loaded alone. Its matrix solvers see the second moments of what enters its linears
on the quantized stream, a block solver that stream and what full precision has after the block; then both streams go
through it. Outside the blocks the table begins the stream by `nearest-mse` where its solver wants to know what enters
the head, which is known at the end alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from mossquant.calibration.calibrate import HELD_OUT, ROUTED, ROWS, Step, Sums, records_of, steps_of
from mossquant.calibration.nearest import NEAREST_MSE
from mossquant.calibration.solver import BlockSolver, BlockTask, Measured, Solver
from mossquant.calibration.solver import Statistics as OfTensor
from mossquant.calibration.statistics import measured_of
from mossquant.calibration.student import Planned, Stored
from mossquant.calibration.text import CalibrationText
from mossquant.calibration.tune import RATES
from mossquant.checkpoint.weights import Weights, value
from mossquant.errors import InputError
from mossquant.files.space import row_blocks, trim_heap
from mossquant.formats import QuantizedTensor, get_format
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.block import Block, rms_norm
from mossquant.model.forward import Forward
from mossquant.model.tensors import Use, outside_blocks
from mossquant.plan.entries import TensorEntry
from mossquant.plan.plan import Plan
from mossquant.progress import Progress

WINDOWS, WINDOW = 128, 256
"""Windows that go through the model, at most, and tokens of each."""
QUOTA = 4.0
"""Effective tokens that an input of a linear should get, in multiples of its width."""
_PASS_WINDOWS = 8
_BLOCK_ARRAYS = 8
"""fp32 arrays of a block's size: two models, what is trained, its gradients and moments, the best so far."""
_PASS_ARRAYS = 40
"""fp32 arrays [tokens of a step, widest input] that training a block holds, at most."""


@dataclass(frozen=True)
class Walked:
    """What became of a tensor.

    Attributes:
        stored: as it is stored.
        note: what was lacking and what was done instead.
    """

    stored: Stored
    note: str | None = None


class Walk:
    """A model's walk.

    Args:
        weights: the full-precision model.
        plan: its plan.
        solvers: those that the plan names.
        text: what is learned from.
        measured: what was measured of the full-precision model, in the place of moments of the quantized stream.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        solvers: Mapping[str, Solver | BlockSolver],
        text: CalibrationText,
        *,
        measured: Measured | None = None,
        device: str = "cpu",
    ) -> None:
        self._weights, self._plan, self._solvers, self._measured = weights, plan, solvers, measured
        self._device = torch.device(device)
        self._scan: Literal["kernel", "chunked"] = "kernel" if device == "cpu" else "chunked"
        self.windows = text.windows(WINDOWS, max(1, min(WINDOW, len(text) // HELD_OUT)))
        self._held = torch.arange(len(self.windows)) % HELD_OUT == 1
        self._outside = outside_blocks(weights.specs.values())
        self._steps = steps_of(weights)
        self._made: dict[str, Walked] = {}

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory: the streams, one block with what is trained of it, what a step computes."""
        config, specs = self._weights.config, self._weights.specs
        sizes = [
            sum(specs[name].count for name in self._tensors(step)) for step in self._steps if step.kind is not None
        ]
        widest = max(entry.width for step in self._steps for entry in step.inputs)
        sums = max(sum(8 * entry.width**2 for entry in step.inputs) for step in self._steps)
        length = self.windows.shape[1]
        streams = 2 * 4 * self.windows.numel() * config.hidden_size
        passing = _PASS_ARRAYS * 4 * min(_PASS_WINDOWS, len(self.windows)) * length * widest
        return streams + _BLOCK_ARRAYS * 4 * max(sizes) + 2 * sums + passing

    @property
    def trained_tokens(self) -> int:
        """Tokens of the steps that block solvers take in each block."""
        blocks = any(isinstance(solver, BlockSolver) for solver in self._solvers.values())
        return RATES.steps * RATES.batch * self.windows.shape[1] if blocks else 0

    def run(self, *, said: Callable[[str], None], progress: Progress | None = None) -> dict[str, Walked]:
        """Solve every tensor.

        Args:
            said: called with a line about what is expected.
            progress: called after each block, with weights done and in all.

        Returns:
            Every tensor of the plan, in its order.

        Raises:
            InputError: values that are not finite.
        """
        count, blocks = self.windows.numel(), len(self._steps) - 1
        said(
            f"walking through {blocks} blocks with {count:,} tokens; about {self.memory_bytes / 1e6:,.0f} MB of memory "
            "beside Python's own"
        )
        total, done = sum(entry.count for entry in self._plan.tensors), 0
        with torch.no_grad():
            own, exact = self._streams()
            began = perf_counter()
            for at, step in enumerate(self._steps[:-1]):
                self._walk(step, own, exact)
                trim_heap()
                done += sum(self._plan.by_name[name].count for name in self._tensors(step))
                if progress is not None:
                    progress(step.name, done, total)
                if at + 1 == blocks // 4:
                    left = (perf_counter() - began) / (at + 1) * (blocks - at - 1)
                    said(f"about {max(1, round(left))} seconds more for the other blocks")
            self._finish(own)
        if progress is not None:
            progress("head", total, total)
        return {entry.name: self._made[entry.name] for entry in self._plan.tensors}

    def _streams(self) -> tuple[Tensor, Tensor | None]:
        """fp32 [W, T, D]: what the stored table makes of the text, and the full-precision one where that is needed."""
        table = self._outside[Use.TABLE]
        entry = self._plan.by_name[table.name]
        if entry.kept is None and self._start(entry).needs and self._measured is None:
            begins: Stored = self._matrix(entry, NEAREST_MSE, {})
        else:
            begins = self._by_matrix(entry, self._measured or _nothing).stored
        own = value(Planned(self._weights, self._plan, {table.name: begins}), table.name)[self.windows]
        blocks = any(isinstance(solver, BlockSolver) for solver in self._solvers.values())
        return own, value(self._weights, table.name)[self.windows] if blocks else None

    def _walk(self, step: Step, own: Tensor, exact: Tensor | None) -> None:
        """Solve one block, and take both streams through it."""
        block = self._loaded(step, self._weights)
        entries = [self._plan.by_name[name] for name in self._tensors(step)]
        known = self._known(step, entries, lambda sums: self._pass(block, own, sums))
        for entry in entries:
            self._made[entry.name] = self._by_matrix(entry, known)
        if exact is not None:
            self._advance(block, exact)
            for name, solver in self._solvers.items():
                asked = frozenset(entry.name for entry in entries if entry.solver == name)
                if isinstance(solver, BlockSolver) and asked:
                    self._by_block(solver, asked, block, own, exact)
        stored = {entry.name: self._made[entry.name].stored for entry in entries}
        self._advance(self._loaded(step, Planned(self._weights, self._plan, stored)), own)

    def _by_block(self, solver: BlockSolver, names: frozenset[str], block: Block, own: Tensor, exact: Tensor) -> None:
        start = {
            spec.name: stored
            for spec in block.specs(block.config, block.layer)
            if isinstance(stored := self._made[spec.name].stored, QuantizedTensor)
        }
        task = BlockTask(self._weights, self._plan, block, start, names, own, exact, self._held)
        with torch.enable_grad():
            found = solver.solve(task)
        for name, tensor in found.tensors.items():
            said = [note for note in (self._made[name].note, found.notes.get(name)) if note is not None]
            reasons = {note.partition(":")[0]: note for note in reversed(said)}  # one reason is said once
            self._made[name] = Walked(tensor, "; ".join(reversed(reasons.values())) or None)

    def _finish(self, own: Tensor) -> None:
        """Solve what lies outside the blocks: what enters the head is known now."""
        step = self._steps[-1]
        entries = [self._plan.by_name[name] for name in {spec.name: spec for spec in self._outside.values()}]
        norm = self._outside[Use.NORM]
        stored = self._by_matrix(self._plan.by_name[norm.name], self._measured or _nothing).stored
        weight = value(Planned(self._weights, self._plan, {norm.name: stored}), norm.name).to(self._device)

        def observed(sums: Sums) -> None:
            for first in range(0, len(own), _PASS_WINDOWS):
                x = own[first : first + _PASS_WINDOWS].to(self._device)
                self._begin(sums, first, len(x))
                normed = rms_norm(x, weight, self._weights.config.rms_norm_eps)
                sums.observe([self._outside[Use.LINEAR].name], normed.flatten(0, 1), None, None, None)

        known = self._known(step, entries, observed)
        for entry in entries:
            self._made[entry.name] = self._by_matrix(entry, known)

    def _by_matrix(self, entry: TensorEntry, known: Callable[[str], OfTensor]) -> Walked:
        """A tensor as its matrix solver leaves it."""
        if entry.kept is not None:
            return Walked(self._kept(entry))
        solver = self._start(entry)
        statistics = solver.known(entry.name, known)
        note = solver.note(statistics)
        planned = self._solvers[entry.solver or ""]
        if isinstance(planned, BlockSolver) and self._weights.specs[entry.name].layer is None:
            outside = f"outside the blocks: {solver.name}"
            note = outside if note is None else f"{outside}; {note}"
        return Walked(self._matrix(entry, solver, statistics), note)

    def _matrix(self, entry: TensorEntry, solver: Solver, statistics: OfTensor) -> QuantizedTensor:
        number_format = get_format(entry.format or "")
        matrix = self._weights.specs[entry.name].to_matrix(self._weights.kept(entry.name))
        solve = solver.prepare(number_format, statistics)
        parts = [solve(matrix[rows].float().contiguous()) for rows in row_blocks(*matrix.shape)]
        codes, scales = (torch.cat([getattr(part, of) for part in parts]) for of in ("codes", "scales"))
        return QuantizedTensor(number_format, codes, scales, *matrix.shape)

    def _kept(self, entry: TensorEntry) -> Tensor:
        return self._weights.kept(entry.name).to(FLOAT_DTYPES[entry.kept or ""])

    def _start(self, entry: TensorEntry) -> Solver:
        """The matrix solver of a quantized tensor."""
        planned = self._solvers[entry.solver or ""]
        return planned.start if isinstance(planned, BlockSolver) else planned

    def _known(
        self, step: Step, entries: Iterable[TensorEntry], gather: Callable[[Sums], None]
    ) -> Callable[[str], OfTensor]:
        """Tensor name → what its matrix solver needs: what was measured, or what is gathered now."""
        if self._measured is not None or not any(self._start(entry).needs for entry in entries if entry.kept is None):
            return self._measured or _nothing
        sums = Sums(step, self._device)
        gather(sums)
        tensors = sums.stored(step)
        records = {record.name: record for record in records_of(step, tensors[ROUTED], tensors[ROWS], QUOTA)}
        readers = {name: entry for entry in step.inputs for name in entry.tensors}

        def known(name: str) -> OfTensor:
            if name not in readers:
                return _nothing(name)
            matrix = self._weights.specs[name].to_matrix(self._weights.kept(name))
            return measured_of(readers[name], matrix, step.inputs, records, tensors.__getitem__)

        return known

    def _tensors(self, step: Step) -> list[str]:
        assert step.kind is not None
        return [spec.name for spec in step.kind.specs(self._weights.config, step.layer)]

    def _loaded(self, step: Step, weights: Weights) -> Block:
        assert step.kind is not None
        block = step.kind(weights.config, step.layer)
        block.load(lambda name: value(weights, name))
        return block.requires_grad_(False).to(self._device)

    def _begin(self, sums: Sums, first: int, count: int) -> None:
        held = self._held[first : first + count]
        sums.begin(first, held.repeat_interleave(self.windows.shape[1]))

    def _pass(self, block: Block, stream: Tensor, sums: Sums) -> None:
        """A stream through a block; `sums` sees what enters its linears."""
        run = Forward(scan=self._scan, observe=sums.observe, reroute=sums.reroute)
        for first in range(0, len(stream), _PASS_WINDOWS):
            x = stream[first : first + _PASS_WINDOWS].to(self._device)
            self._begin(sums, first, len(x))
            block.added(x, self._state(block, len(x)), run)

    def _advance(self, block: Block, stream: Tensor) -> None:
        """A stream through a block, in place."""
        for first in range(0, len(stream), _PASS_WINDOWS):
            x = stream[first : first + _PASS_WINDOWS].to(self._device)
            stream[first : first + _PASS_WINDOWS] = block.added(
                x, self._state(block, len(x)), Forward(scan=self._scan)
            )[0].cpu()
        if not bool(torch.isfinite(stream).all()):
            raise InputError(
                f"{self._weights.origin.path} computes NaN or infinite values in layer {block.layer}, {block.kind}; "
                "look at the weights, or take other text"
            )

    def _state(self, block: Block, batch: int) -> dict[str, Tensor]:
        states = block.states(block.config, block.layer)
        return {spec.name: spec.zeros(batch, device=self._device) for spec in states}


def _nothing(name: str) -> OfTensor:
    """Of a tensor that no linear multiplies."""
    return {"hessian": None, "rows": None}
