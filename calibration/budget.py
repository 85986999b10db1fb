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
from mossquant.plan.plan import FrontierPoint, make_plan
from mossquant.plan.recipe import Budget, Recipe, rewritten

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
        predicted_kl: nats a token; None where nothing was measured on text.
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
    if not recipe.chooses:
        raise InputError(f"{recipe.where} names every format, so there is nothing to spend a budget on; add choose")
    asked = budget or recipe.budget
    if asked is None:
        raise InputError(f"{recipe.where} leaves formats open and has no budget; give one with --budget, e.g. 4.75bpw")
    wanted, held = Budget.parse(asked), tuple(targets or recipe.targets)
    if wanted.kind == "kl" and sensitivities is None:
        raise InputError(f"a budget of {wanted} needs losses that were measured; give text or sensitivities")
    groups = open_groups(weights, recipe, held)
    losses = _known(weights, recipe, groups) if sensitivities is None else _measured(groups, sensitivities)
    options = [
        [Option(storage, size, loss) for (storage, size), loss in zip(group.bytes.items(), own, strict=True)]
        for group, own in zip(groups, losses, strict=True)
    ]
    least = [0] * len(options)  # bytes rise
    fixed = _bytes(weights, recipe, groups, options, least, held) - sum(
        own[index].bytes for own, index in zip(options, least, strict=True)
    )
    at_most = wanted.bytes_at_most(weights.origin.parameters) - fixed
    scale = 1.0 if sensitivities is None else sensitivities.additivity
    choice = choose(options, bytes_at_most=at_most, loss_at_most=wanted.value / scale if wanted.kind == "kl" else None)
    notes: tuple[str, ...] = ()
    parameters = weights.origin.parameters
    if choice is None:
        smallest = fixed + sum(own[index].bytes for own, index in zip(options, least, strict=True))
        bits = f"{smallest:,} bytes ({8 * smallest / parameters:.3f} bits a weight)"
        if wanted.kind == "kl":
            raise InputError(f"no choice of formats keeps {wanted}; allow more formats under choose, or a larger KL")
        if budget is not None:
            raise InputError(f"the smallest choice takes {bits}, more than the budget of {wanted}; give a larger one")
        choice = Choice(tuple(least), smallest - fixed, sum(own[i].loss for own, i in zip(options, least, strict=True)))
        notes = (f"the smallest choice takes {bits}, more than the recipe's {wanted}; it is taken",)
    picks = {group.group: own[pick].storage for group, own, pick in zip(groups, options, choice.picks, strict=True)}
    chosen = rewritten(
        recipe,
        picks,
        targets=held,
        why=f"chosen for {wanted} {_BY[None if sensitivities is None else sensitivities.method]}",
    )
    if sensitivities is None:
        return Chosen(chosen, str(wanted), None, choice.gap, (), notes)
    points = tuple(FrontierPoint(fixed + point.bytes, scale * point.loss) for point in frontier(options))
    return Chosen(chosen, str(wanted), scale * choice.loss, choice.gap, points, notes)


def _known(weights: Weights, recipe: Recipe, groups: Sequence[OpenGroup]) -> list[list[float]]:
    rules = [recipe.weights.index(group.rule) for group in groups]
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


def _bytes(
    weights: Weights,
    recipe: Recipe,
    groups: Sequence[OpenGroup],
    options: Sequence[Sequence[Option]],
    picks: Sequence[int],
    targets: Sequence[str],
) -> int:
    """Payload bytes of the whole model with these picks."""
    chosen = {group.group: own[pick].storage for group, own, pick in zip(groups, options, picks, strict=True)}
    written = rewritten(recipe, chosen, targets=targets, why="smallest")
    return make_plan(weights.config, dtypes_of(weights), written).predicted_bytes
