# SPDX-License-Identifier: Apache-2.0
"""The formats among which a recipe leaves a choice, for each group of tensors: bytes, and what rounding loses.

relative error = ‖W − Q‖ / ‖W‖ over all weights of the group (Frobenius)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mossquant.calibration.nearest import nearest_mse
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.space import row_blocks
from mossquant.formats import get_format
from mossquant.model.tensors import TensorSpec
from mossquant.plan.capabilities import get_capabilities
from mossquant.plan.entries import TensorEntry
from mossquant.plan.groups import Group, groups_of
from mossquant.plan.recipe import STORED, Recipe, WeightRule, rule_of

_SAMPLED_ROWS = 256
"""Rows of a matrix whose rounding stands for all of them where no text is at hand."""


@dataclass(frozen=True)
class OpenGroup:
    """A group whose format is open.

    Attributes:
        group: the tensors.
        rule: what the recipe says of it.
        bytes: storage → bytes of the whole group, in rising order.
        expert: where its tensors are those of one expert alone.
    """

    group: Group
    rule: WeightRule
    bytes: dict[str, int]
    expert: int | None = None


def open_groups(weights: Weights, recipe: Recipe, targets: Sequence[str]) -> list[OpenGroup]:
    """The groups whose format the recipe leaves open, with the formats that every target holds.

    Raises:
        InputError: a group for which no format is left.
    """
    capabilities = [get_capabilities(name) for name in targets]
    found = []
    for group in groups_of(weights.config):
        rule = rule_of(recipe, group)
        if rule is None or rule.choose is None:
            continue
        sizes: dict[str, int] = {}
        for storage in rule.choose:
            held = all(storage == STORED or storage in of.holds(spec) for of in capabilities for spec in group.specs)
            if held:
                sizes[storage] = sum(stored_bytes(weights, spec, storage) for spec in group.specs)
        if not sizes:
            names = ", ".join(rule.choose)
            raise InputError(
                f"{recipe.where}: {', '.join(targets)} hold {group.name} in none of {names}; add a format to choose"
            )
        # A format that would make no tensor smaller leaves all of them as stored, and is no choice beside that.
        whole = sizes.get(STORED)
        distinct = [(size, storage) for storage, size in sizes.items() if storage == STORED or size != whole]
        found.append(OpenGroup(group, rule, {storage: size for size, storage in sorted(distinct)}))
    return found


def stored_bytes(weights: Weights, spec: TensorSpec, storage: str) -> int:
    """Bytes that a tensor takes in a format, or as stored where that is not more."""
    dtype = weights.kept(spec.name).dtype
    kept = spec.count * dtype.itemsize
    if storage == STORED:
        return kept
    return min(kept, TensorEntry.of(spec, storage, stored_bytes=kept, reason="").predicted_bytes)


def rounded(weights: Weights, spec: TensorSpec, storage: str) -> Tensor:
    """The fp32 values of a tensor in a format, by `nearest-mse`, in the shape of the checkpoint."""
    tensor = weights.kept(spec.name)
    if storage == STORED or stored_bytes(weights, spec, storage) == tensor.nbytes:
        return tensor.float()
    number_format, matrix = get_format(storage), spec.to_matrix(tensor)
    # By blocks of rows: searching for scales holds many times what is rounded.
    values = torch.empty(matrix.shape)
    for rows in row_blocks(*matrix.shape):
        values[rows] = nearest_mse(number_format, matrix[rows].float().contiguous()).dequantize()
    return spec.from_matrix(values)


def relative_error(weights: Weights, group: Group, storage: str) -> float:
    """The group's relative error in a format by `nearest-mse`, estimated on `_SAMPLED_ROWS` rows of each matrix."""
    if storage == STORED:
        return 0.0
    lost = norm = 0.0
    for spec in group.specs:
        matrix = spec.to_matrix(weights.kept(spec.name))
        step = max(1, matrix.shape[0] // _SAMPLED_ROWS)
        rows = matrix[::step].float().contiguous()
        own = float(rows.square().sum())
        norm += own * step
        if stored_bytes(weights, spec, storage) < spec.count * matrix.dtype.itemsize:
            lost += float((nearest_mse(get_format(storage), rows).dequantize() - rows).square().sum()) * step
    return (lost / norm) ** 0.5 if norm > 0 else 0.0


def dtypes_of(weights: Weights) -> dict[str, torch.dtype]:
    """Tensor name → type in which the checkpoint stores it."""
    return {name: weights.kept(name).dtype for name in weights.specs}
