# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with its plan and what `nearest-mse` makes of it, for tests of what comes after."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from small import random_model, write_model

from mossquant.calibration.nearest import nearest_mse
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.formats import QuantizedTensor, get_format
from mossquant.model.config import MossNetConfig
from mossquant.plan.plan import Plan, make_plan
from mossquant.plan.recipe import Recipe


@dataclass(frozen=True)
class Solved:
    """A full-precision model, a plan for it, and its quantized tensors."""

    weights: Checkpoint
    recipe: Recipe
    plan: Plan
    tensors: dict[str, QuantizedTensor]


def solved(
    folder: Path,
    config: MossNetConfig,
    *,
    recipe: str = "int4-uniform",
    dtype: torch.dtype = torch.float32,
    rounded: int = 0,
) -> Solved:
    """A random model of this shape, in `folder`, and what a recipe makes of it.

    Args:
        folder: where its checkpoint is made.
        config: its shape.
        recipe: a recipe's name.
        dtype: in which the checkpoint stores it.
        rounded: codes by which every quantized value is off, as after a solver that compensates.
    """
    weights = Checkpoint.open(write_model(folder, random_model(config, dtype=torch.float32), dtype=dtype))
    asked = Recipe.named(recipe)
    plan = make_plan(config, {name: weights.kept(name).dtype for name in weights.specs}, asked)
    tensors = {}
    for entry in plan.tensors:
        if entry.format is not None:
            number_format = get_format(entry.format)
            matrix = weights.specs[entry.name].to_matrix(weights.kept(entry.name)).float().contiguous()
            one = nearest_mse(number_format, matrix)
            moved = (one.codes.int() + rounded * (one.codes != 0)).clamp(number_format.code_min, number_format.code_max)
            tensors[entry.name] = QuantizedTensor(number_format, moved.to(torch.int8), one.scales, *matrix.shape)
    return Solved(weights, asked, plan, tensors)


def random_text(vocab_size: int, length: int) -> CalibrationText:
    """So many random tokens."""
    tokens = np.random.default_rng(3).integers(0, vocab_size, length)
    return CalibrationText("text", ("0" * 64,), tokens.astype(np.int64))
