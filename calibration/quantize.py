# SPDX-License-Identifier: Apache-2.0
"""`quantize`: execute a recipe on a checkpoint, tensor by tensor.

Tensors are read from the memory-mapped checkpoint one at a time and matrices are solved in blocks of rows, so that
peak memory is bounded by the largest tensor (and the writer's shard), not by the model. The output folder appears whole
or not at all; the same checkpoint, recipe and release give the same bytes. Where text is at hand the model is run, and
what was solved is held until it was judged.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from mossquant.calibration.budget import smallest, spend
from mossquant.calibration.effort import (
    PASSES,
    PASSING,
    Effort,
    Pace,
    choosing,
    choosing_bytes,
    distilling,
    judging,
    solving,
)
from mossquant.calibration.meter import WINDOW, Meter, check_device, interval
from mossquant.calibration.nearest import fixed_sum
from mossquant.calibration.options import dtypes_of, open_groups
from mossquant.calibration.recover import LEAST_TOKENS, check_snapshot
from mossquant.calibration.recover import recover as recovered
from mossquant.calibration.registry import needs_walk, planned_solvers
from mossquant.calibration.sensitivity import (
    LOOKED_AT,
    Sensitivities,
    is_estimated,
    losses_of,
    read_sensitivities,
    windows_of,
)
from mossquant.calibration.solver import BlockSolver, Measured, Solve, Solver
from mossquant.calibration.statistics import Statistics
from mossquant.calibration.student import Stored
from mossquant.calibration.text import CalibrationText
from mossquant.calibration.walk import Walk
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.packing import PackedTensor, read_quantized
from mossquant.checkpoint.tensorfiles import ONE_FILE_BYTES, SHARD_BYTES
from mossquant.checkpoint.weights import Weights
from mossquant.checkpoint.writer import QuantizedWriter, container_bytes
from mossquant.errors import InputError
from mossquant.files.outputs import check_apart, check_free, check_outside, new_folder
from mossquant.files.space import BLOCK_WEIGHTS, check_space, row_blocks, trim_heap
from mossquant.formats import QuantizedTensor, get_format
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import Held, check
from mossquant.plan.plan import Calibrated, Ledger, Plan, make_plan
from mossquant.plan.recipe import STORED, Recipe, load_recipe, recipe_files, rewritten
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
_JUDGING, _DISTILLING = 10, 28
"""Bytes a parameter that is held then: fp32 weights and what was made, and what distilling trains."""

Piece = PackedTensor | Tensor
"""A tensor as it is stored: quantized, or kept."""


def quantize(
    model: str | Path | Weights,
    output: str | Path,
    *,
    recipe: str | Path = "int4",
    budget: str | None = None,
    targets: Sequence[str] | None = None,
    text: Sequence[str | Path | Text] = (),
    sensitivities: str | Path | Sensitivities | None = None,
    recover: int | None = None,
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
        budget: "4.75bpw", "40MB" or "kl=0.01", in place of the recipe's own.
        targets: where it must run, in place of the recipe's own.
        text: files to calibrate on; none: no text, or for a recipe that needs some the bundled text of the bundled
            model. With text, formats that a recipe leaves open are chosen by what they lose on it.
        sensitivities: what groups lose, from `sensitivity`, or its file.
        recover: tokens of the text to distil over after rounding, in place of the recipe's own.
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
    asked, destination = load_recipe(recipe), Path(output)
    inputs = [*recipe_files(recipe), *(Path(item) for item in text if not isinstance(item, Text))]
    inputs += [Path(sensitivities)] if isinstance(sensitivities, str | Path) else []
    inputs += [] if stats is None else [Path(stats)]
    if isinstance(model, str | Path):
        inputs.append(locate(model).require("checkpoint", verb="quantize"))
    if not dry_run:
        check_free(destination, force=force, inputs=inputs)
    weights = open_weights(model, verb="quantize")
    origin = weights.origin
    if origin.recipe is not None:
        raise InputError(f"{origin.path} is quantized already; give the full-precision model that it was made from")
    if origin.tokenizer is not None:
        check_tokenizer_size(origin.tokenizer)
    origin.declared_text(weights.config.vocab_size)  # is taken along, and so must be readable
    statistics = None if stats is None else Statistics.open(stats, weights)
    measured = measured if statistics is None else statistics.measured
    say = said or (lambda line: None)
    tokens = asked_tokens = asked.recover if recover is None else recover
    if tokens < 0:
        raise InputError(f"recovery over {tokens} tokens; ask for none or more")
    check_device(device)
    snapshot = destination.with_name(f"{destination.name}.recovering.safetensors")
    if tokens and not dry_run:
        check_outside(snapshot)
        check_apart(snapshot, inputs)
        check_snapshot(snapshot)
    needs_text = bool(text) or bool(tokens) or asked.measure
    calibration = CalibrationText.of(weights, text) if needs_text and not dry_run else None
    learned, judged = (None, None) if calibration is None else calibration.split(JUDGED_TOKENS)
    if tokens and learned is not None and len(learned) < LEAST_TOKENS:
        raise InputError(f"{learned.name} has {len(learned)} tokens to learn from, {LEAST_TOKENS} are needed")
    chosen, losses = None, read_sensitivities(sensitivities, weights)

    def foretold(plan: Plan, solvers: Mapping[str, Solver | BlockSolver], choose: Recipe | None) -> None:
        effort = _effort(
            weights,
            plan,
            solvers,
            choose,
            targets,
            tokens=(learned, judged, tokens),
            statistics=statistics,
            measured=measured is not None,
            device=device,
        )
        check_space(destination, disk_bytes=effort.disk_bytes, memory_bytes=effort.memory_bytes)
        say(effort.said())

    if asked.chooses:
        # What can be refused is refused before anything is measured.
        first = smallest(weights, asked, budget=budget, targets=targets)
        least, solvers = _checked(weights, first, measured=measured is not None, text=needs_text)
        if learned is not None and judged is not None:
            foretold(least, solvers, asked if losses is None else None)
        if losses is None and learned is not None:
            losses = losses_of(
                weights,
                [asked],
                learned,
                targets=targets,
                most_work=_WORK_TO_CHOOSE,
                device=device,
                said=say,
                progress=progress,
            )
        chosen = spend(weights, asked, budget=budget, targets=targets, sensitivities=losses)
        asked = chosen.recipe
    elif budget is not None:
        raise InputError(f"{asked.where} names every format, so there is nothing to spend {budget} on; add choose")
    elif targets is not None:
        asked = rewritten(asked, {}, targets=targets, why="for other targets")
    plan, solvers = _checked(weights, asked, measured=measured is not None, text=needs_text)
    if chosen is None and not dry_run and (calibration is not None or statistics is not None):
        foretold(plan, solvers, None)
    notes = () if chosen is None else chosen.notes
    if dry_run:
        if needs_text and losses is None and chosen is not None:
            say("formats as roles are known to lose; without --dry-run they are chosen by what is lost on the text")
        for line in notes:
            say(line)
        return plan
    walk = None
    if learned is not None and needs_walk(solvers, measured=measured is not None):
        walk = Walk(weights, plan, solvers, learned, measured=measured, device=device)
    copied = sum(path.stat().st_size for path in origin.beside)
    seen = (*(() if learned is None else learned.sha256), *(() if losses is None else losses.text_sha256))
    if statistics is not None:
        seen = (*seen, *statistics.manifest.text)
    needed = _memory(weights, plan, walk, tokens=(judged, tokens), statistics=statistics)
    check_space(destination, disk_bytes=disk_bytes(plan) + copied, memory_bytes=needed)
    for line in notes:
        say(line)
    with new_folder(destination, force=force) as partial:
        writer = QuantizedWriter(partial, weights, asked, plan)
        if walk is None:
            pieces = _solved(weights, plan, solvers, measured, progress)
        else:
            pieces = _walked(weights, plan, walk, say, progress)
        if learned is None or judged is None:
            for name, piece, error, note in pieces:
                writer.add(name, piece, error, note)
            given = (
                None
                if losses is None
                else Calibrated(
                    text=losses.text,
                    tokens=0,
                    judged_tokens=0,
                    budget=None if chosen is None else chosen.budget,
                    losses=losses.method,
                    predicted_kl=None if chosen is None else chosen.predicted_kl,
                    rounded_kl=None,
                    recovered_tokens=0,
                    kl=None,
                    kl_ci95=None,
                    frontier=() if chosen is None else chosen.frontier,
                )
            )
            return writer.finish(given, calibration_text=seen)
        every = list(pieces)
        rounded = {name: (piece, error) for name, piece, error, _ in every}
        lacking = {name: note for name, _, _, note in every}
        meter = Meter(weights, judged.windows(max(1, len(judged) // WINDOW), WINDOW), device=device, from_start=True)
        before = meter.kl(_values(weights, plan, rounded))
        made, after = rounded, before
        if tokens:
            expected = PASSES * meter.seconds * tokens / meter.windows.numel()
            say(f"distilling over {tokens:,} tokens of {learned.name}: {about(expected)}")
            say(f"a run that is stopped goes on from {snapshot}")
            solved = {name: _quantized(plan, name, piece) for name, (piece, _) in rounded.items()}
            stored = recovered(
                weights,
                plan,
                {name: piece for name, piece in solved.items() if isinstance(piece, QuantizedTensor)},
                learned,
                tokens=tokens,
                device=device,
                snapshot=snapshot,
                progress=progress,
            )
            made = {name: _piece(weights, plan, name, value) for name, value in stored.items()}
            after = meter.kl(_values(weights, plan, made))
            if not after.mean() < before.mean():
                say(f"distilling raised KL from {before.mean():.2e} to {after.mean():.2e}; it is left out")
                made, after, tokens = rounded, before, 0
        for name, (piece, error) in made.items():
            writer.add(name, piece, error, lacking[name])
        calibrated = Calibrated(
            text=learned.name,
            tokens=len(learned),
            judged_tokens=meter.windows.numel(),
            budget=None if chosen is None else chosen.budget,
            losses=None if chosen is None or losses is None else losses.method,
            predicted_kl=None if chosen is None else chosen.predicted_kl,
            rounded_kl=float(before.mean()),
            recovered_tokens=tokens,
            kl=float(after.mean()),
            kl_ci95=interval(after),
            frontier=() if chosen is None else chosen.frontier,
        )
        ledger = writer.finish(calibrated, calibration_text=seen)
    if asked_tokens:
        snapshot.unlink(missing_ok=True)
    return ledger


def _checked(
    weights: Weights, recipe: Recipe, *, measured: bool, text: bool
) -> tuple[Plan, dict[str, Solver | BlockSolver]]:
    """The plan of a recipe that names every format, held by its targets, and its solvers."""
    plan = make_plan(weights.config, dtypes_of(weights), recipe)
    check(Held.by(plan, weights.config), recipe.targets)
    return plan, planned_solvers(plan, measured=measured, text=text)


def _memory(
    weights: Weights,
    plan: Plan,
    walk: Walk | None,
    *,
    tokens: tuple[CalibrationText | None, int],
    statistics: Statistics | None,
) -> int:
    """Anonymous memory, at most: of the parts that come one after the other, the one that holds most.

    `tokens`: (what is judged on, those of recovery).
    """
    (judged, recovery), parameters = tokens, weights.origin.parameters
    solving = (
        memory_bytes(plan)
        + (0 if statistics is None else statistics.memory_bytes)
        + (0 if walk is None else walk.memory_bytes + weights.origin.parameters + plan.predicted_bytes)
    )
    running = 0 if judged is None else (_DISTILLING if recovery else _JUDGING) * parameters + PASSING
    return max(solving, running)


def _effort(
    weights: Weights,
    plan: Plan,
    solvers: Mapping[str, Solver | BlockSolver],
    choose: Recipe | None,
    targets: Sequence[str] | None,
    *,
    tokens: tuple[CalibrationText | None, CalibrationText | None, int],
    statistics: Statistics | None,
    measured: bool,
    device: str,
) -> Effort:
    """What is to come.

    `choose`: whose open formats are to be chosen on text; `tokens`: (learned from, judged on, those of recovery).
    """
    (learned, judged, recovery), pace = tokens, Pace(weights, device=device)
    parts: dict[str, float] = {}
    most = 0
    if choose is not None and learned is not None:
        groups = open_groups(weights, choose, tuple(targets or choose.targets))
        jobs = [(group.group.count, storage) for group in groups for storage in group.bytes if storage != STORED]
        looked_at, windows = windows_of(learned, LOOKED_AT)
        estimated = is_estimated(weights, len(jobs), looked_at, _WORK_TO_CHOOSE)
        parts["choosing"] = choosing(pace, jobs, looked_at.numel(), windows=windows if estimated else None)
        most = choosing_bytes(weights, estimated=estimated)
    walk = None
    if learned is not None and needs_walk(solvers, measured=measured):
        walk = Walk(weights, plan, solvers, learned, device=device)
    trained = 0 if walk is None else walk.trained_tokens
    walked = 0 if walk is None else walk.windows.numel()
    parts["rounding"] = solving(pace, weights, plan, walked=walked, trained=trained)
    if judged is not None:
        parts["judging"] = judging(pace, len(judged), 2 if recovery else 1)
    if recovery:
        parts["distilling"] = distilling(pace, recovery)
    copied = sum(path.stat().st_size for path in weights.origin.beside)
    memory = max(most, _memory(weights, plan, walk, tokens=(judged, recovery), statistics=statistics))
    return Effort(parts, disk_bytes(plan) + copied, memory)


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


def _values(weights: Weights, plan: Plan, made: Mapping[str, tuple[Piece, float]]) -> dict[TensorSpec, Tensor]:
    """The fp32 values of what is stored, in the shapes of the checkpoint."""
    values = {}
    for name, (piece, _) in made.items():
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


def _walked(
    weights: Weights, plan: Plan, walk: Walk, say: Callable[[str], None], progress: Progress | None
) -> Iterator[tuple[str, Piece, float, str | None]]:
    """The same as `_solved`, solved block by block on text."""
    for name, walked in walk.run(said=say, progress=progress).items():
        yield name, *_piece(weights, plan, name, walked.stored), walked.note


def _solved(
    weights: Weights,
    plan: Plan,
    solvers: Mapping[str, Solver | BlockSolver],
    measured: Measured | None,
    progress: Progress | None,
) -> Iterator[tuple[str, Piece, float, str | None]]:
    """(name, what is stored, relative error, the solver's note) of every tensor, in the plan's order."""
    total, done = sum(entry.count for entry in plan.tensors), 0
    for entry in plan.tensors:
        tensor = weights.kept(entry.name)
        if entry.kept is not None:
            yield entry.name, tensor.to(FLOAT_DTYPES[entry.kept]), 0.0, None
        else:
            solver, number_format = solvers[entry.solver or ""], get_format(entry.format or "")
            assert isinstance(solver, Solver)  # those of blocks walk
            known = measured(entry.name) if measured is not None and solver.needs else {}
            missing = " and ".join(need for need in solver.needs if need not in known)
            if missing:
                raise InputError(f"{solver.name} needs {missing} of {entry.name}, which was not measured")
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
