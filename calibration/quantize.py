# SPDX-License-Identifier: Apache-2.0
"""`quantize`: execute a recipe on a checkpoint, tensor by tensor.

Tensors are read from the memory-mapped checkpoint one at a time and matrices are solved in blocks of rows, so that
peak memory is bounded by the largest tensor (and the writer's shard), not by the model. The output folder appears whole
or not at all; the same checkpoint, recipe and release give the same bytes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mossquant.calibration.nearest import SOLVERS, Solver, fixed_sum
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.packing import pack
from mossquant.checkpoint.tensorfiles import ONE_FILE_BYTES, SHARD_BYTES
from mossquant.checkpoint.writer import QuantizedWriter, container_bytes
from mossquant.files.outputs import check_free, new_folder
from mossquant.files.space import BLOCK_WEIGHTS, check_space, row_blocks, trim_heap
from mossquant.formats import NumberFormat, get_format
from mossquant.plan.capabilities import check
from mossquant.plan.plan import KEPT_DTYPES, Ledger, Plan, make_plan
from mossquant.plan.recipe import load_recipe, recipe_files
from mossquant.text.tokenizer_checks import check_tokenizer_size

__all__ = ["Progress", "disk_bytes", "memory_bytes", "quantize"]

Progress = Callable[[str, int, int], None]
"""(tensor just finished, weights done, weights in all)."""

_BLOCK_ARRAYS = 12
"""fp32 arrays of a block's size that solving it holds, at most."""

_REST_BYTES = 1 << 24
"""What libraries allocate when they are first used, and Python's objects for plan and headers."""


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path = "int4",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Ledger:
    """Quantize a full-precision checkpoint.

    Args:
        model: a checkpoint folder, or the name "tiny".
        output: folder to write; nothing may be there, unless `force`.
        recipe: a recipe's name ("int8", "int4") or a YAML file (`mossquant.plan.recipe`).
        force: replace what is at `output`.
        dry_run: make and check the plan, write nothing.
        progress: called after each tensor.

    Returns:
        The ledger: the plan with bytes written and relative errors (a plan without them where `dry_run`).

    Raises:
        InputError: a bad checkpoint (or a quantized one, or a program), a bad recipe, a plan that the recipe's targets
            cannot hold, an output that cannot be written, too little disk or memory: before any work.
    """
    asked = load_recipe(recipe)
    folder, destination = locate(model).require("checkpoint", verb="quantize"), Path(output)
    if not dry_run:
        check_free(destination, force=force, inputs=[folder, *recipe_files(recipe)])
    checkpoint = Checkpoint.open(folder)
    if checkpoint.tokenizer_path is not None:
        check_tokenizer_size(checkpoint.tokenizer_path)
    plan = make_plan(checkpoint.config, {name: checkpoint.dtype(name) for name in checkpoint.specs}, asked)
    check(plan, asked.targets)
    if dry_run:
        return plan
    copied = sum(path.stat().st_size for path in checkpoint.beside)
    check_space(destination, disk_bytes=disk_bytes(plan) + copied, memory_bytes=memory_bytes(plan))
    total, done = sum(entry.count for entry in plan.tensors), 0
    with (
        new_folder(destination, force=force) as partial,
        QuantizedWriter(partial, checkpoint, asked, plan) as writer,
    ):
        for entry in plan.tensors:
            tensor = checkpoint.tensor(entry.name)
            if entry.kept is not None:
                writer.add_kept(entry.name, tensor.to(KEPT_DTYPES[entry.kept]))
            else:
                matrix = checkpoint.specs[entry.name].to_matrix(tensor)
                words, scales, error = _execute(matrix, get_format(entry.format or ""), SOLVERS[entry.solver or ""])
                writer.add_quantized(entry.name, words, scales, relative_error=error)
            before, done = done, done + entry.count
            if done // BLOCK_WEIGHTS > before // BLOCK_WEIGHTS:
                trim_heap()
            if progress is not None:
                progress(entry.name, done, total)
    return writer.ledger


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


def _execute(matrix: Tensor, form: NumberFormat, solver: Solver) -> tuple[Tensor, Tensor, float]:
    """Packed codes, scales and ‖W − Q‖ / ‖W‖ of a matrix in its stored type, block of rows by block of rows."""
    rows, columns = matrix.shape
    words = torch.empty((rows, form.padded_columns(columns) * form.bits // 32), dtype=torch.int32)
    scales = torch.empty((rows, form.groups(columns)), dtype=form.scale_dtype)
    lost = norm = 0.0
    for block_rows in row_blocks(rows, form.padded_columns(columns)):
        block = matrix[block_rows].float().contiguous()
        found = solver(block, form)
        words[block_rows] = pack(found.codes, form.bits)
        scales[block_rows] = found.scales
        exact = block.double()
        lost += float(fixed_sum((found.dequantize().double() - exact).square().flatten()))
        norm += float(fixed_sum(exact.square().flatten()))
    return words, scales, math.sqrt(lost / norm) if norm > 0 else 0.0
