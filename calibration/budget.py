# SPDX-License-Identifier: Apache-2.0
"""From a budget to a recipe: a format for every group whose format a recipe leaves open.

What a group loses in a format is measured on text (`mossquant.calibration.sensitivity`) or, without text, what its role
is known to lose:   sensitivity · ‖W − Q‖² / ‖W‖² / groups of its rule. The second ranks formats and promises
nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mossquant.calibration.allocate import Choice, Option, choose, frontier
from mossquant.calibration.options import OpenGroup, dtypes_of, open_groups, relative_error
from mossquant.calibration.sensitivity import Sensitivities
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.plan.groups import groups_of
from mossquant.plan.plan import FrontierPoint, make_plan
from mossquant.plan.recipe import Budget, Recipe, first_match, rewritten

_BY = {
    None: "by what roles are known to lose",
    "measured": "by what was lost on text",
    "estimated": "by what is lost on text, estimated",
}


@dataclass(frozen=True)
class Chosen:
    """What a budget came to.

    Attributes:
        recipe: an ordinary recipe, every format named.
        budget: what it was, as a user would write it.
        predicted_kl: nats a token, after rounding by `nearest-mse`; None where nothing was measured on text.
        gap: the predicted loss is at most this share above the least that is possible; 0 where that is proved.
        frontier: (bytes, predicted KL) from the smallest model to the most exact; empty where nothing was measured.
        notes: what the user should know, a sentence each.
    """

    recipe: Recipe
    budget: str
    predicted_kl: float | None
    gap: float
    frontier: tuple[FrontierPoint, ...]
    notes: tuple[str, ...]


def spend(
    weights: Weights,
    recipe: Recipe,
    *,
    budget: str | None = None,
    targets: Sequence[str] | None = None,
    sensitivities: Sensitivities | None = None,
) -> Chosen:
    """Choose formats.

    Args:
        weights: the full-precision model.
        recipe: with rules that leave formats open.
        budget: in place of the recipe's own.
        targets: where it must run, in place of the recipe's own.
        sensitivities: what groups lose, measured on text.

    Raises:
        InputError: no budget, one that no choice keeps, a KL to keep where nothing was measured, sensitivities that
            lack a group or format; a recipe that leaves nothing open.
    """
    wanted, held, groups, fixed = _opened(weights, recipe, budget, targets)
    if wanted.kind == "kl" and sensitivities is None:
        raise InputError(
            f"a budget of {wanted} needs losses that were measured; give text (and no --dry-run) or sensitivities"
        )
    losses = _known(weights, recipe, groups) if sensitivities is None else _measured(groups, sensitivities)
    options = [
        [Option(storage, size, loss) for (storage, size), loss in zip(group.bytes.items(), own, strict=True)]
        for group, own in zip(groups, losses, strict=True)
    ]
    at_most = wanted.bytes_at_most(weights.origin.parameters) - fixed
    keep = sensitivities.within(wanted.value) if sensitivities is not None and wanted.kind == "kl" else None
    choice = choose(options, bytes_at_most=at_most, loss_at_most=keep)
    notes: tuple[str, ...] = ()
    if choice is None and wanted.kind == "kl":
        raise InputError(f"no choice of formats keeps {wanted}; allow more formats under choose, or a larger KL")
    if choice is None:
        least = sum(own[0].bytes for own in options)
        choice = Choice((0,) * len(options), least, sum(own[0].loss for own in options))
        bits = _bits(weights, fixed + least)
        notes = (f"the smallest choice takes {bits}, more than the recipe's {wanted}; it is taken",)
    if choice.gap > 0:
        notes += (f"the choice is not proved to be the best: another may lose up to {choice.gap:.1%} less",)
    picks = {group.group: own[pick].storage for group, own, pick in zip(groups, options, choice.picks, strict=True)}
    chosen = rewritten(
        recipe,
        picks,
        targets=held,
        why=f"chosen for {wanted} {_BY[None if sensitivities is None else sensitivities.method]}",
    )
    if sensitivities is None:
        return Chosen(chosen, str(wanted), None, choice.gap, (), notes)
    promised = sensitivities.promised
    points = tuple(FrontierPoint(fixed + point.bytes, promised(point.loss)) for point in frontier(options))
    return Chosen(chosen, str(wanted), promised(choice.loss), choice.gap, points, notes)


def _known(weights: Weights, recipe: Recipe, groups: Sequence[OpenGroup]) -> list[list[float]]:
    rules = [recipe.weights.index(group.rule) for group in groups]
    unknown = [
        recipe.place("weights", index) for index in sorted(set(rules)) if recipe.weights[index].sensitivity is None
    ]
    if unknown:
        raise InputError(
            f"{recipe.where}, {', '.join(unknown)}: nothing says what these formats lose; add sensitivity, or give "
            "--sensitivity, or --text without --dry-run"
        )
    sharing = Counter(rules)
    return [
        [
            (group.rule.sensitivity or 0.0) / sharing[rule] * relative_error(weights, group.group, storage) ** 2
            for storage in group.bytes
        ]
        for group, rule in zip(groups, rules, strict=True)
    ]


def _measured(groups: Sequence[OpenGroup], sensitivities: Sensitivities) -> list[list[float]]:
    by_name = {losses.name: {loss.storage: loss.kl for loss in losses.losses} for losses in sensitivities.groups}
    missing = [
        f"{group.group.name} in {storage}"
        for group in groups
        for storage in group.bytes
        if storage not in by_name.get(group.group.name, {})
    ]
    if missing:
        raise InputError.listing("the sensitivities lack", missing, "Measure them again with this recipe and targets.")
    return [[by_name[group.group.name][storage] for storage in group.bytes] for group in groups]


def smallest(
    weights: Weights, recipe: Recipe, *, budget: str | None = None, targets: Sequence[str] | None = None
) -> Recipe:
    """The recipe with every open group in its smallest format: what can be refused without measuring anything.

    Raises:
        InputError: as `spend`, but for what sensitivities decide.
    """
    wanted, held, groups, fixed = _opened(weights, recipe, budget, targets)
    least = fixed + sum(min(group.bytes.values()) for group in groups)
    if budget is not None and least > wanted.bytes_at_most(weights.origin.parameters):
        bits = _bits(weights, least)
        raise InputError(f"the smallest choice takes {bits}, more than the budget of {wanted}; give a larger one")
    return _smallest(recipe, groups, held)


def _opened(
    weights: Weights, recipe: Recipe, budget: str | None, targets: Sequence[str] | None
) -> tuple[Budget, tuple[str, ...], list[OpenGroup], int]:
    """(the budget, the targets, the groups that are open, bytes of all that is not)."""
    if not recipe.chooses:
        raise InputError(f"{recipe.where} names every format, so there is nothing to spend a budget on; add choose")
    asked = budget or recipe.budget
    if asked is None:
        raise InputError(f"{recipe.where} leaves formats open and has no budget; give one with --budget, e.g. 4.75bpw")
    wanted, held = Budget.parse(asked), tuple(targets or recipe.targets)
    groups = open_groups(weights, recipe, held)
    grouped = {spec.name for group in groups_of(weights.config) for spec in group.specs}
    fixed: dict[int, dict[str, None]] = {}  # rule → roles of tensors that are in no group, and so are not chosen for
    for spec in weights.specs.values():
        index = first_match(recipe.weights, role=spec.role, name=spec.name)
        if spec.name not in grouped and index is not None and recipe.weights[index].choose is not None:
            fixed.setdefault(index, {})[spec.role] = None
    if fixed:
        rules = [
            f"{recipe.place('weights', index)}: the formats of {', '.join(roles)} are no choice"
            for index, roles in fixed.items()
        ]
        raise InputError(f"{recipe.where}, {'; '.join(rules)}; keep them by a rule before this one")
    plan = make_plan(weights.config, dtypes_of(weights), _smallest(recipe, groups, held))
    return wanted, held, groups, plan.predicted_bytes - sum(min(group.bytes.values()) for group in groups)


def _smallest(recipe: Recipe, groups: Sequence[OpenGroup], targets: Sequence[str]) -> Recipe:
    # Bytes rise.
    return rewritten(
        recipe, {group.group: next(iter(group.bytes)) for group in groups}, targets=targets, why="smallest"
    )


def _bits(weights: Weights, size: int) -> str:
    return f"{size:,} bytes ({8 * size / weights.origin.parameters:.3f} bits a weight)"
