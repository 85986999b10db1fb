# SPDX-License-Identifier: Apache-2.0
"""`quantize`: execute a recipe on a checkpoint, tensor by tensor.

Tensors are read from the memory-mapped checkpoint one at a time and matrices are solved in blocks of rows, so that
peak memory is bounded by the largest tensor (and the writer's shard), not by the model. The output folder appears whole
or not at all; the same checkpoint, recipe and release give the same bytes.
"""

import math
from pathlib import Path

from torch import Tensor

from mossquant.calibration.nearest import fixed_sum
from mossquant.calibration.registry import planned_solvers
from mossquant.calibration.solver import Measured, Solve
from mossquant.calibration.statistics import Statistics
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.packing import PackedTensor
from mossquant.checkpoint.tensorfiles import ONE_FILE_BYTES, SHARD_BYTES
from mossquant.checkpoint.weights import Weights
from mossquant.checkpoint.writer import QuantizedWriter, container_bytes
from mossquant.errors import InputError
from mossquant.files.outputs import check_free, new_folder
from mossquant.files.space import BLOCK_WEIGHTS, check_space, row_blocks, trim_heap
from mossquant.formats import get_format
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.plan.capabilities import Held, check
from mossquant.plan.plan import Ledger, Plan, make_plan
from mossquant.plan.recipe import load_recipe, recipe_files
from mossquant.progress import Progress
from mossquant.text.tokenizer_checks import check_tokenizer_size

_BLOCK_ARRAYS = 12
"""fp32 arrays of a block's size that solving it holds, at most."""

_REST_BYTES = 1 << 24
"""What libraries allocate when they are first used, and Python's objects for plan and headers."""


def quantize(
    model: str | Path | Weights,
    output: str | Path,
    *,
    recipe: str | Path = "int4",
    measured: Measured | None = None,
    stats: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Ledger:
    """Quantize a full-precision model.

    Args:
        model: a checkpoint folder, or the name "tiny"; or weights of which every tensor is kept.
        output: folder to write; nothing may be there, unless `force`.
        recipe: a recipe's name ("int8", "int4") or a YAML file (`mossquant.plan.recipe`).
        measured: gives what was measured for a tensor to solvers that need it.
        stats: a folder that `calibrate` wrote for this model, in the place of `measured`.
        force: replace what is at `output`.
        dry_run: make and check the plan, write nothing.
        progress: called after each tensor, with weights done and in all.

    Returns:
        The ledger: the plan with bytes written and relative errors (a plan without them where `dry_run`).

    Raises:
        InputError: a bad checkpoint (or a quantized one, or a program), a bad recipe, a plan that the recipe's targets
            cannot hold, a solver that is unknown or lacks statistics, an output that cannot be written, too little disk
            or memory: before any work. Statistics that were not measured for one tensor: when its turn comes.
    """
    asked, destination = load_recipe(recipe), Path(output)
    inputs = recipe_files(recipe) + ([] if stats is None else [Path(stats)])
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
    plan = make_plan(weights.config, {name: weights.kept(name).dtype for name in weights.specs}, asked)
    check(Held.by(plan, weights.config), asked.targets)
    statistics = None if stats is None else Statistics.open(stats, weights)
    measured = measured if statistics is None else statistics.measured
    solvers = planned_solvers(plan, measured=measured is not None)
    if dry_run:
        return plan
    copied = sum(path.stat().st_size for path in origin.beside)
    held, seen = (0, ()) if statistics is None else (statistics.memory_bytes, tuple(statistics.manifest.text))
    check_space(destination, disk_bytes=disk_bytes(plan) + copied, memory_bytes=memory_bytes(plan) + held)
    total, done = sum(entry.count for entry in plan.tensors), 0
    with new_folder(destination, force=force) as partial:
        writer = QuantizedWriter(partial, weights, asked, plan, calibration_text=seen)
        for entry in plan.tensors:
            tensor = weights.kept(entry.name)
            if entry.kept is not None:
                writer.add_kept(entry.name, tensor.to(FLOAT_DTYPES[entry.kept]))
            else:
                solver, number_format = solvers[entry.solver or ""], get_format(entry.format or "")
                known = measured(entry.name) if measured is not None and solver.needs else {}
                missing = " and ".join(need for need in solver.needs if need not in known)
                if missing:
                    raise InputError(f"{solver.name} needs {missing} of {entry.name}, which was not measured")
                matrix = weights.specs[entry.name].to_matrix(tensor)
                packed = PackedTensor(entry.name, number_format, *matrix.shape)
                error = _solve(matrix, solver.prepare(number_format, known), packed)
                writer.add_quantized(entry.name, packed, error, solver.note(known))
            before, done = done, done + entry.count
            if done // BLOCK_WEIGHTS > before // BLOCK_WEIGHTS:
                trim_heap()
            if progress is not None:
                progress(entry.name, done, total)
        return writer.finish()


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
