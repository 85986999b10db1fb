# SPDX-License-Identifier: Apache-2.0
"""`quantize`: execute a recipe on a checkpoint, tensor by tensor.

Tensors are read from the memory-mapped checkpoint one at a time and matrices are solved in blocks of rows, so that
peak memory is bounded by the largest tensor (and the writer's shard), not by the model. The output folder appears whole
or not at all; the same checkpoint, recipe and release give the same bytes. Where text is at hand the model is run, and
what was solved is held until it was judged.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.calibration.budget import Chosen, smallest, spend
from mossquant.calibration.costs import Costs
from mossquant.calibration.decays import decay_errors, steps_seen
from mossquant.calibration.effort import (
    LIBRARIES,
    PASSES,
    Effort,
    Pace,
    choosing,
    choosing_bytes,
    distilling,
    judging,
    solving,
)
from mossquant.calibration.meter import WINDOW, Meter, interval, metering_bytes, pass_windows
from mossquant.calibration.nearest import fixed_sum
from mossquant.calibration.options import dtypes_of, open_groups
from mossquant.calibration.recover import LEAST_TOKENS, SNAPSHOT, check_snapshot, recovery_bytes
from mossquant.calibration.recover import recover as recovered
from mossquant.calibration.registry import check_solvers, needs_walk, planned_solvers
from mossquant.calibration.sensitivity import (
    LEVELS,
    LOOKED_AT,
    Sensitivities,
    is_estimated,
    losses_of,
    read_sensitivities,
    windows_of,
)
from mossquant.calibration.solver import BlockSolver, Measured, Solve, Solver
from mossquant.calibration.statistics import Statistics
from mossquant.calibration.student import Planned, Stored
from mossquant.calibration.text import CalibrationText
from mossquant.calibration.walk import Walk
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.packing import PackedTensor, read_quantized
from mossquant.checkpoint.tensorfiles import ONE_FILE_BYTES, SHARD_BYTES
from mossquant.checkpoint.weights import Weights
from mossquant.checkpoint.writer import QuantizedWriter, container_bytes
from mossquant.device import check_device
from mossquant.errors import InputError
from mossquant.files.outputs import check_free, check_outside, new_folder
from mossquant.files.space import BLOCK_WEIGHTS, check_space, row_blocks, trim_heap
from mossquant.formats import QuantizedTensor, get_format
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import Held, check
from mossquant.plan.entries import DecayError
from mossquant.plan.plan import Calibrated, Ledger, Plan, make_plan
from mossquant.plan.recipe import STORED, Recipe, RecoveryActivations, load_recipe, recipe_files, rewritten
from mossquant.progress import Progress, about
from mossquant.text.text import Text
from mossquant.text.tokenizer_checks import check_tokenizer_size

_BLOCK_ARRAYS = 12
"""fp32 arrays of a block's size that solving it holds, at most."""

_REST_BYTES = 1 << 24
"""What libraries allocate when they are first used, and Python's objects for plan and headers."""

JUDGED_TOKENS = 16384
"""Tokens at the end of a calibration text that nothing is learned from, and on which what was learned is judged."""
_WORK_TO_CHOOSE = 2.5e12
"""Changes · tokens · parameters that are measured here, about a minute's; beyond that losses are estimated."""
_JUDGING = 10
"""Bytes a parameter that is held then: the model and what was made of it in fp32, and that as it is stored."""
_STEPS_WINDOWS = 32
"""Windows of the text on which the time steps of decays are looked at, at most."""

Piece = PackedTensor | Tensor
"""A tensor as it is stored: quantized, or kept."""
Made = tuple[str, Piece, float, str | None]
"""Name, what is stored, relative error, and the solver's note of a tensor."""


def quantize(
    model: str | Path | Weights,
    output: str | Path,
    *,
    recipe: str | Path = "int4",
    budget: str | None = None,
    targets: Sequence[str] | None = None,
    text: Sequence[str | Path | Text] = (),
    sensitivities: str | Path | Sensitivities | None = None,
    costs: str | Path | Costs | None = None,
    recover: int | None = None,
    recover_activations: RecoveryActivations | None = None,
    measured: Measured | None = None,
    stats: str | Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
    dry_run: bool = False,
    said: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Ledger:
    """Quantize a full-precision model.

    Args:
        model: a checkpoint folder, or the name "tiny"; or weights of which every tensor is kept.
        output: folder to write; nothing may be there, unless `force`.
        recipe: a recipe's name or a YAML file (`mossquant.plan.recipe`).
        budget: "4.75bpw", "40MB", "8ms" (of one decoded token) or "kl=0.01", in place of the recipe's own.
        targets: where it must run, in place of the recipe's own.
        text: files to calibrate on; none: no text, or for a recipe that needs some the bundled text of the bundled
            model. With text, formats that a recipe leaves open are chosen by what they lose on it.
        sensitivities: what groups lose, from `sensitivity`, or its file.
        costs: what a decoded token costs, a file that `moss-costs` wrote; for a budget of time.
        recover: tokens of the text to distil over after rounding, in place of the recipe's own.
        recover_activations: what enters the linears while it trains, in place of the recipe's own: "fp32", or "planned"
            for how the plan rounds it.
        measured: gives what was measured for a tensor to solvers that need it.
        stats: a folder that `calibrate` wrote for this model, in the place of `measured`.
        device: where the model is run.
        force: replace what is at `output`.
        dry_run: make and check the plan, write nothing, and run nothing on text.
        said: called with one line about each thing that takes long or that the user should know.
        progress: called with what is worked on, done and in all.

    Returns:
        The ledger: the plan with bytes written and relative errors (a plan without them where `dry_run`).

    Raises:
        InputError: a bad checkpoint (or a quantized one, or a program), a bad recipe, a budget that cannot be kept, a
            plan that its targets cannot hold, a solver that is unknown or lacks statistics or text, text that is needed
            and not given, an output that cannot be written, too little disk or memory: before any work. Statistics that
            were not measured for one tensor: when its turn comes.
    """
    say = said or (lambda line: None)
    request = _request(
        model,
        Path(output),
        recipe=load_recipe(recipe),
        files=recipe_files(recipe),
        targets=targets,
        text=text,
        sensitivities=sensitivities,
        recover=recover,
        recover_activations=recover_activations,
        measured=measured,
        stats=stats,
        device=device,
        force=force,
        dry_run=dry_run,
    )
    priced = Costs.read(Path(costs)) if isinstance(costs, str | Path) else costs
    decided = _decided(request, budget, priced, say, progress)
    for line in () if decided.chosen is None else decided.chosen.notes:
        say(line)
    if dry_run:
        if request.text:
            needed = f"{_memory(request, decided) / 1e6:,.0f} MB of memory beside Python's own"
            say(f"running the model on text takes about {needed}, and what solvers that walk through its blocks hold")
        if request.text and not text:
            try:
                CalibrationText.of(request.weights, text)
            except InputError as refusal:
                say(f"without --dry-run this is refused: {refusal}")
        return decided.plan
    with new_folder(request.destination, force=force) as partial:
        writer = QuantizedWriter(partial, request.weights, decided.recipe, decided.plan)
        pieces = _solved(request, decided, say, progress)
        judged = None
        if request.learned is not None:
            judged = _judged(request, decided, list(pieces), say, progress)
            pieces = iter(judged.pieces)
        for name, piece, error, note in pieces:
            writer.add(name, piece, error, note)
        ledger = writer.finish(
            _calibrated(request, decided, judged),
            calibration_text=_seen(request, decided),
            decays=None if judged is None else judged.decays,
        )
    if request.tokens:
        request.snapshot.unlink(missing_ok=True)
    return ledger


@dataclass(frozen=True)
class _Request:
    """What is asked, of which model.

    Attributes:
        weights: the full-precision model.
        destination: folder to write.
        recipe: as it was given.
        targets: in place of the recipe's own.
        text: whether text enters: where it is only planned, what a run would read is not read.
        learned: what is learned from.
        judged: what that is judged on.
        losses: what groups lose, as far as it was given.
        tokens: to distil over.
        activations: what enters the linears then.
        snapshot: file in which recovery is kept.
        statistics: what `calibrate` wrote.
        measured: what was measured for a tensor, in these or by whoever asks.
        device: where the model is run.
        dry_run: nothing is measured or written.
    """

    weights: Weights
    destination: Path
    recipe: Recipe
    targets: Sequence[str] | None
    text: bool
    learned: CalibrationText | None
    judged: CalibrationText | None
    losses: Sensitivities | None
    tokens: int
    activations: RecoveryActivations
    snapshot: Path
    statistics: Statistics | None
    measured: Measured | None
    device: str
    dry_run: bool


def _request(
    model: str | Path | Weights,
    destination: Path,
    *,
    recipe: Recipe,
    files: Sequence[Path],
    targets: Sequence[str] | None,
    text: Sequence[str | Path | Text],
    sensitivities: str | Path | Sensitivities | None,
    recover: int | None,
    recover_activations: RecoveryActivations | None,
    measured: Measured | None,
    stats: str | Path | None,
    device: str,
    force: bool,
    dry_run: bool,
) -> _Request:
    """What is asked, opened and checked; `files` are those of the recipe. Raises `InputError` as `quantize`."""
    check_solvers(recipe)
    inputs = [*files, *(Path(item) for item in text if not isinstance(item, Text))]
    inputs += [Path(sensitivities)] if isinstance(sensitivities, str | Path) else []
    inputs += [] if stats is None else [Path(stats)]
    if isinstance(model, str | Path):
        inputs.append(locate(model).require("checkpoint", verb="quantize"))
    if not dry_run:
        check_free(destination, force=force, inputs=inputs)
        check_outside(destination)
    weights = open_weights(model, verb="quantize")
    origin = weights.origin
    if origin.recipe is not None:
        raise InputError(f"{origin.path} is quantized already; give the full-precision model that it was made from")
    if origin.tokenizer is not None:
        check_tokenizer_size(origin.tokenizer)
    origin.declared_text(weights.config.vocab_size)  # is taken along, and so must be readable
    statistics = None if stats is None else Statistics.open(stats, weights)
    tokens = recipe.recover if recover is None else recover
    if tokens < 0:
        raise InputError(f"recovery over {tokens} tokens; ask for none or more")
    activations = recover_activations or recipe.recover_activations
    if activations not in get_args(RecoveryActivations):
        raise InputError.unknown("activation mode", activations, get_args(RecoveryActivations))
    if recover_activations is not None and not tokens:
        raise InputError(f"--recover-activations {activations} without recovery; add --recover TOKENS, or leave it out")
    check_device(device)
    snapshot = destination.parent / f"{destination.name}.recovering.safetensors"
    if tokens and not dry_run:
        check_outside(snapshot)
        check_free(snapshot, force=True, as_file=True, inputs=inputs)
        check_snapshot(snapshot)
    needs_text = bool(text) or bool(tokens) or recipe.measure
    calibration = CalibrationText.of(weights, text) if needs_text and not dry_run else None
    learned, judged = (None, None) if calibration is None else calibration.split(JUDGED_TOKENS)
    if tokens and learned is not None and len(learned) < LEAST_TOKENS:
        raise InputError(f"{learned.name} has {len(learned)} tokens to learn from, {LEAST_TOKENS} are needed")
    return _Request(
        weights=weights,
        destination=destination,
        recipe=recipe,
        targets=targets,
        text=needs_text,
        learned=learned,
        judged=judged,
        losses=read_sensitivities(sensitivities, weights),
        tokens=tokens,
        activations=activations,
        snapshot=snapshot,
        statistics=statistics,
        measured=measured if statistics is None else statistics.measured,
        device=device,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Decided:
    """What every tensor becomes.

    Attributes:
        recipe: an ordinary one, every format named.
        plan: its plan, which its targets hold.
        solvers: those that the plan names.
        walk: where some of them are shown the blocks on text.
        chosen: what the budget came to; None where the recipe named the formats itself.
        losses: what groups lose, given or measured.
    """

    recipe: Recipe
    plan: Plan
    solvers: Mapping[str, Solver | BlockSolver]
    walk: Walk | None
    chosen: Chosen | None
    losses: Sensitivities | None


def _decided(
    request: _Request,
    budget: str | None,
    costs: Costs | None,
    say: Callable[[str], None],
    progress: Progress | None,
) -> _Decided:
    """Formats for all that is open. Raises `InputError` as `quantize`, before anything is measured if it can be."""
    recipe, weights, targets = request.recipe, request.weights, request.targets
    if not recipe.chooses:
        if budget is not None:
            raise InputError(f"{recipe.where} names every format, so there is nothing to spend {budget} on; add choose")
        if request.losses is not None:
            raise InputError(f"{recipe.where} names every format, so sensitivities choose nothing; add choose")
        recipe = recipe if targets is None else rewritten(recipe, {}, targets=targets, why="for other targets")
        if recipe.budget is not None:
            say(f"{recipe.where} names every format, so its budget of {recipe.budget} is not spent")
        decided = _planned(request, recipe, None, request.losses)
        if request.learned is not None or request.statistics is not None:
            say(_effort(request, decided, None).said())
        return decided
    # The smallest plan: what can be refused, room included, is refused before anything is measured.
    least = _planned(
        request, smallest(weights, recipe, budget=budget, targets=targets, costs=costs), None, request.losses
    )
    losses = request.losses
    if request.learned is not None:
        effort = _effort(request, least, recipe if losses is None else None)
        check_space(request.destination, disk_bytes=effort.disk_bytes, memory_bytes=effort.memory_bytes)
        say(effort.said())
        losses = losses or losses_of(
            weights,
            [recipe],
            request.learned,
            targets=targets,
            most_work=_WORK_TO_CHOOSE,
            device=request.device,
            progress=progress,
        )
    chosen = spend(weights, recipe, budget=budget, targets=targets, sensitivities=losses, costs=costs)
    if request.dry_run and request.text and losses is None:
        say("formats as roles are known to lose; without --dry-run they are chosen by what is lost on the text")
    return _planned(request, chosen.recipe, chosen, losses)


def _planned(request: _Request, recipe: Recipe, chosen: Chosen | None, losses: Sensitivities | None) -> _Decided:
    """A recipe that names every format, with its plan.

    Raises:
        InputError: its targets do not hold it, a solver lacks what it needs, too little disk or memory.
    """
    weights, measured = request.weights, request.measured is not None
    plan = make_plan(weights.config, dtypes_of(weights), recipe)
    check(Held.by(plan, weights.config), recipe.targets)
    solvers = planned_solvers(plan, measured=measured, text=request.text)
    walk = None
    if request.learned is not None and needs_walk(solvers, measured=measured):
        walk = Walk(weights, plan, solvers, request.learned, measured=request.measured, device=request.device)
    decided = _Decided(recipe, plan, solvers, walk, chosen, losses)
    if not request.dry_run:
        check_space(request.destination, disk_bytes=_disk(request, plan), memory_bytes=_memory(request, decided))
    return decided


def _effort(request: _Request, decided: _Decided, choose: Recipe | None) -> Effort:
    """What is to come; `choose`: whose formats are to be chosen on text."""
    weights, learned, plan, walk = request.weights, request.learned, decided.plan, decided.walk
    pace, parts, most = Pace(weights, device=request.device), dict[str, float](), 0
    if choose is not None and learned is not None:
        groups = open_groups(weights, choose, tuple(request.targets or choose.targets))
        jobs = [(group.group.count, storage) for group in groups for storage in group.bytes if storage != STORED]
        looked_at, windows = windows_of(learned, LOOKED_AT)
        estimated = is_estimated(weights, len(jobs), looked_at, _WORK_TO_CHOOSE)
        of_gradients = windows if estimated else None
        parts["choosing"] = choosing(pace, jobs, looked_at.numel(), windows=of_gradients, levels=LEVELS)
        most = choosing_bytes(weights, jobs, looked_at.numel(), windows=of_gradients)
    trained = 0 if walk is None else walk.trained_tokens
    walked = 0 if walk is None else walk.windows.numel()
    parts["rounding"] = solving(pace, weights, plan, decided.solvers, walked=walked, trained=trained)
    if request.judged is not None:
        parts["judging"] = judging(pace, len(request.judged), 2 if request.tokens else 1)
    if request.tokens:
        parts["distilling"] = distilling(pace, request.tokens)
    return Effort(parts, _disk(request, plan), max(most, _memory(request, decided)))


def _disk(request: _Request, plan: Plan) -> int:
    """Room that is needed, at most: for the output folder with what is taken along, and for recovery's snapshot."""
    copied = sum(path.stat().st_size for path in request.weights.origin.beside)
    return disk_bytes(plan) + copied + (SNAPSHOT * request.weights.origin.parameters if request.tokens else 0)


def _memory(request: _Request, decided: _Decided) -> int:
    """Anonymous memory, at most: of the parts that come one after the other, the one that holds most."""
    weights, plan, walk = request.weights, decided.plan, decided.walk
    parameters = weights.origin.parameters
    rounding = memory_bytes(plan)
    rounding += 0 if request.statistics is None else request.statistics.memory_bytes
    rounding += 0 if walk is None else walk.memory_bytes + parameters + plan.predicted_bytes
    if not request.text:
        return rounding
    judged = JUDGED_TOKENS if request.judged is None else len(request.judged)
    running = LIBRARIES + metering_bytes(weights, judged, from_start=True)
    return max(rounding, running + max(_JUDGING * parameters, recovery_bytes(weights) if request.tokens else 0))


def _solved(
    request: _Request, decided: _Decided, say: Callable[[str], None], progress: Progress | None
) -> Iterator[Made]:
    """Every tensor as its solver leaves it, in the plan's order."""
    if decided.walk is None:
        yield from _each(request.weights, decided.plan, decided.solvers, request.measured, progress)
        return
    for name, walked in decided.walk.run(said=say, progress=progress).items():
        yield name, *_piece(request.weights, decided.plan, name, walked.stored), walked.note


@dataclass(frozen=True)
class _Judged:
    """What was solved, as it was recovered where that was asked and helped.

    Attributes:
        pieces: every tensor.
        tokens: that it was judged on.
        rounded: KL of each window before recovery [W], nats a token.
        kl: the same of what is stored.
        recovered: tokens that were distilled over.
        decays: what became of decays on the text that was learned from, by the names of their tensors.
    """

    pieces: Sequence[Made]
    tokens: int
    rounded: NDArray[np.float64]
    kl: NDArray[np.float64]
    recovered: int
    decays: Mapping[str, DecayError]


def _judged(
    request: _Request,
    decided: _Decided,
    pieces: Sequence[Made],
    say: Callable[[str], None],
    progress: Progress | None,
) -> _Judged:
    """Run what was solved on text, and recover it where that is asked."""
    weights, plan, learned, judged = request.weights, decided.plan, request.learned, request.judged
    assert learned is not None
    assert judged is not None
    windows = judged.windows(max(1, len(judged) // WINDOW), WINDOW)
    meter = Meter(weights, windows, device=request.device, from_start=True)
    kl = meter.kl(_values(weights, plan, pieces))
    looked_at = learned.windows(_STEPS_WINDOWS, WINDOW).to(request.device)
    steps = steps_seen(meter.model, torch.split(looked_at, pass_windows(weights, looked_at)))

    def found(pieces: Sequence[Made], after: NDArray[np.float64], recovered: int) -> _Judged:
        stored = {name: _quantized(plan, name, piece) for name, piece, _, _ in pieces if name in steps}
        decays = decay_errors(weights, Planned(weights, plan, stored), steps)
        return _Judged(pieces, meter.windows.numel(), kl, after, recovered, decays)

    if not request.tokens:
        return found(pieces, kl, 0)
    expected = PASSES * meter.seconds * request.tokens / meter.windows.numel()
    say(f"distilling over {learned.said(request.tokens)}: {about(expected)}")
    say(f"a run that is stopped goes on from {request.snapshot}")
    solved = {name: _quantized(plan, name, piece) for name, piece, _, _ in pieces}
    stored = recovered(
        weights,
        plan,
        {name: piece for name, piece in solved.items() if isinstance(piece, QuantizedTensor)},
        learned,
        tokens=request.tokens,
        activations=request.activations,
        device=request.device,
        model=meter.model,
        snapshot=request.snapshot,
        progress=progress,
    )
    made = [(name, *_piece(weights, plan, name, stored[name]), note) for name, _, _, note in pieces]
    after = meter.kl(_values(weights, plan, made))
    if not after.mean() < kl.mean():
        say(f"distilling raised KL from {kl.mean():.2e} to {after.mean():.2e}; it is left out")
        return found(pieces, kl, 0)
    return found(made, after, request.tokens)


def _calibrated(request: _Request, decided: _Decided, judged: _Judged | None) -> Calibrated | None:
    """How text entered; None where none did."""
    learned, chosen, losses = request.learned, decided.chosen, decided.losses
    if learned is not None:
        text, tokens = learned.name, len(learned)
    elif losses is not None:
        text, tokens = losses.text, 0
    else:
        return None
    recovered_tokens = 0 if judged is None else judged.recovered
    return Calibrated(
        text=text,
        tokens=tokens,
        judged_tokens=0 if judged is None else judged.tokens,
        budget=None if chosen is None else chosen.budget,
        losses=None if chosen is None or losses is None else losses.method,
        predicted_kl=None if chosen is None else chosen.predicted_kl,
        rounded_kl=None if judged is None else float(judged.rounded.mean()),
        recovered_tokens=recovered_tokens,
        kl=None if judged is None else float(judged.kl.mean()),
        kl_ci95=None if judged is None else interval(judged.kl),
        frontier=() if chosen is None else chosen.frontier,
        recovered_activations=request.activations if recovered_tokens else None,
    )


def _seen(request: _Request, decided: _Decided) -> tuple[str, ...]:
    """SHA-256 of every text that entered."""
    learned = () if request.learned is None else request.learned.sha256
    losses = () if decided.losses is None else decided.losses.text_sha256
    statistics = () if request.statistics is None else request.statistics.manifest.text
    return (*learned, *losses, *statistics)


def _quantized(plan: Plan, name: str, piece: Piece) -> Stored:
    """What is stored, as codes and scales where it is quantized."""
    entry = plan.by_name[name]
    if isinstance(piece, Tensor):
        return piece
    number_format = get_format(entry.format or "")
    return read_quantized(name, number_format, entry.rows, entry.columns, piece.tensors.__getitem__)


def _piece(weights: Weights, plan: Plan, name: str, stored: Stored) -> tuple[Piece, float]:
    """What is written, and its relative error."""
    spec, exact = weights.specs[name], weights.kept(name).double()
    if isinstance(stored, Tensor):
        piece: Piece = stored
        found = stored.double()
    else:
        packed = PackedTensor(name, stored.format, stored.rows, stored.columns)
        packed.put(slice(0, stored.rows), stored)
        piece, found = packed, spec.from_matrix(stored.dequantize()).double()
    norm = float(fixed_sum(exact.square().flatten()))
    lost = float(fixed_sum((found - exact).square().flatten()))
    return piece, math.sqrt(lost / norm) if norm > 0 else 0.0


def _values(weights: Weights, plan: Plan, made: Sequence[Made]) -> dict[TensorSpec, Tensor]:
    """The fp32 values of what is stored, in the shapes of the checkpoint."""
    values = {}
    for name, piece, _, _ in made:
        spec, stored = weights.specs[name], _quantized(plan, name, piece)
        values[spec] = stored.float() if isinstance(stored, Tensor) else spec.from_matrix(stored.dequantize())
    return values


def disk_bytes(plan: Plan) -> int:
    """Room that the output folder needs, at most, without a tokenizer."""
    return plan.predicted_bytes + container_bytes(plan)


def memory_bytes(plan: Plan) -> int:
    """Anonymous memory that executing a plan needs beside Python: the writer's open file or shard, and one block.

    A shard is closed by the tensor that fills it, so it may be larger by the largest one.
    """
    largest = max(entry.predicted_bytes for entry in plan.tensors)
    longest = max(entry.padded_columns for entry in plan.tensors)
    whole = plan.predicted_bytes
    held = whole if whole <= ONE_FILE_BYTES else SHARD_BYTES + largest
    return held + container_bytes(plan) + _BLOCK_ARRAYS * 4 * max(BLOCK_WEIGHTS, longest) + _REST_BYTES


def _each(
    weights: Weights,
    plan: Plan,
    solvers: Mapping[str, Solver | BlockSolver],
    measured: Measured | None,
    progress: Progress | None,
) -> Iterator[Made]:
    """Every tensor, solved alone."""
    total, done = sum(entry.count for entry in plan.tensors), 0
    for entry in plan.tensors:
        tensor = weights.kept(entry.name)
        if entry.kept is not None:
            yield entry.name, tensor.to(FLOAT_DTYPES[entry.kept]), 0.0, None
        else:
            solver, number_format = solvers[entry.solver or ""], get_format(entry.format or "")
            assert isinstance(solver, Solver)  # those of blocks walk
            known = solver.known(entry.name, measured)
            matrix = weights.specs[entry.name].to_matrix(tensor)
            packed = PackedTensor(entry.name, number_format, *matrix.shape)
            error = _solve(matrix, solver.prepare(number_format, known), packed)
            yield entry.name, packed, error, solver.note(known)
        before, done = done, done + entry.count
        if done // BLOCK_WEIGHTS > before // BLOCK_WEIGHTS:
            trim_heap()
        if progress is not None:
            progress(entry.name, done, total)


def _solve(matrix: Tensor, solve: Solve, packed: PackedTensor) -> float:
    """Fill `packed` from a matrix in its stored type, block of rows by block of rows; returns ‖W − Q‖ / ‖W‖."""
    lost = norm = 0.0
    for block_rows in row_blocks(*packed.padded_shape):
        block = matrix[block_rows].float().contiguous()
        solved = solve(block)
        packed.put(block_rows, solved)
        exact = block.double()
        lost += float(fixed_sum((solved.dequantize().double() - exact).square().flatten()))
        norm += float(fixed_sum(exact.square().flatten()))
    return math.sqrt(lost / norm) if norm > 0 else 0.0
