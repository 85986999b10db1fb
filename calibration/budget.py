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
from mossquant.calibration.costs import Costs
from mossquant.calibration.options import OpenGroup, dtypes_of, open_groups, relative_error
from mossquant.calibration.sensitivity import Sensitivities
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.plan.groups import groups_of
from mossquant.plan.plan import FrontierPoint, make_plan
from mossquant.plan.recipe import STORED, Budget, Recipe, first_match, rewritten

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
        predicted_ms: of one decoded token; None where no costs were given.
        gap: the predicted loss is at most this share above the least that is possible; 0 where that is proved.
        frontier: (bytes, predicted KL) from the smallest model to the most exact; empty where nothing was measured.
        notes: what the user should know, a sentence each.
    """

    recipe: Recipe
    budget: str
    predicted_kl: float | None
    predicted_ms: float | None
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
    costs: Costs | None = None,
) -> Chosen:
    """Choose formats.

    Args:
        weights: the full-precision model.
        recipe: with rules that leave formats open.
        budget: in place of the recipe's own.
        targets: where it must run, in place of the recipe's own.
        sensitivities: what groups lose, measured on text.
        costs: what a token takes, for a budget of time.

    Raises:
        InputError: no budget, one of time without costs or with those of another shape, one that no choice keeps, a KL
            to keep where nothing was measured, sensitivities that lack a group or format; a recipe that leaves nothing
            open.
    """
    opened = _opened(weights, recipe, budget, targets, costs)
    wanted, held, groups, fixed = opened.budget, opened.targets, opened.groups, opened.fixed_bytes
    if wanted.kind == "kl" and sensitivities is None:
        raise InputError(
            f"a budget of {wanted} needs losses that were measured; give text (and no --dry-run) or sensitivities"
        )
    losses = _known(weights, recipe, groups) if sensitivities is None else _measured(groups, sensitivities)
    options = [
        [Option(storage, cost, loss) for (storage, cost), loss in zip(costing.items(), own, strict=True)]
        for costing, own in zip(opened.costs, losses, strict=True)
    ]
    keep = sensitivities.within(wanted.value) if sensitivities is not None and wanted.kind == "kl" else None
    choice = choose(options, cost_at_most=opened.at_most(weights), loss_at_most=keep)
    notes: tuple[str, ...] = ()
    if choice is None and wanted.kind == "kl":
        raise InputError(f"no choice of formats keeps {wanted}; allow more formats under choose, or a larger KL")
    if choice is None:
        cheapest = tuple(min(range(len(own)), key=[option.cost for option in own].__getitem__) for own in options)
        picked = [own[pick] for own, pick in zip(options, cheapest, strict=True)]
        choice = Choice(cheapest, sum(option.cost for option in picked), sum(option.loss for option in picked))
        takes = opened.said(weights, choice.cost)
        notes = (f"the smallest choice takes {takes}, more than the recipe's {wanted}; it is taken",)
    if choice.gap > 0:
        notes += (f"the choice is not proved to be the best: another may lose up to {choice.gap:.1%} less",)
    picks = {group.group: own[pick].storage for group, own, pick in zip(groups, options, choice.picks, strict=True)}
    chosen = rewritten(
        recipe,
        picks,
        targets=held,
        why=f"chosen for {wanted} {_BY[None if sensitivities is None else sensitivities.method]}",
    )
    took = None
    if costs is not None:
        took = (opened.fixed_ns + sum(own[picks[g.group]] for own, g in zip(opened.times, groups, strict=True))) / 1e6
        threads = f"{costs.threads} thread{'s' if costs.threads > 1 else ''}"
        notes += (f"one decoded token should take {took:.2f} ms with {threads} of {costs.machine}",)
    if sensitivities is None:
        return Chosen(chosen, str(wanted), None, took, choice.gap, (), notes)
    promised = sensitivities.promised

    def size(point: Choice) -> int:
        return fixed + sum(list(group.bytes.values())[pick] for group, pick in zip(groups, point.picks, strict=True))

    points = tuple(FrontierPoint(size(point), promised(point.loss)) for point in frontier(options))
    return Chosen(chosen, str(wanted), promised(choice.loss), took, choice.gap, points, notes)


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
    weights: Weights,
    recipe: Recipe,
    *,
    budget: str | None = None,
    targets: Sequence[str] | None = None,
    costs: Costs | None = None,
) -> Recipe:
    """The recipe with every open group in its smallest format: what can be refused without measuring anything.

    Raises:
        InputError: as `spend`, but for what sensitivities decide.
    """
    opened = _opened(weights, recipe, budget, targets, costs)
    least = sum(min(costing.values()) for costing in opened.costs)
    if budget is not None and least > opened.at_most(weights):
        takes = opened.said(weights, least)
        raise InputError(
            f"the smallest choice takes {takes}, more than the budget of {opened.budget}; give a larger one"
        )
    return _smallest(recipe, opened.groups, opened.targets)


@dataclass(frozen=True)
class _Opened:
    """What a budget is spent on.

    Attributes:
        budget: the budget.
        targets: the targets.
        groups: the groups that are open.
        fixed_bytes: of all that is not open.
        times: of each group, storage → nanoseconds of a token; empty without costs.
        fixed_ns: nanoseconds of a token beside those.
    """

    budget: Budget
    targets: tuple[str, ...]
    groups: list[OpenGroup]
    fixed_bytes: int
    times: list[dict[str, int]]
    fixed_ns: int

    @property
    def costs(self) -> list[dict[str, int]]:
        """Of each group, storage → what the budget counts."""
        return self.times if self.budget.kind == "ms" else [group.bytes for group in self.groups]

    def at_most(self, weights: Weights) -> float:
        """What is left of the budget for the groups."""
        if self.budget.kind == "ms":
            return self.budget.value * 1e6 - self.fixed_ns
        return self.budget.bytes_at_most(weights.origin.parameters) - self.fixed_bytes

    def said(self, weights: Weights, cost: int) -> str:
        """What the groups and all else cost, as a user reads it."""
        if self.budget.kind == "ms":
            return f"{(self.fixed_ns + cost) / 1e6:.2f} ms a token"
        return _bits(weights, self.fixed_bytes + cost)


def _opened(
    weights: Weights, recipe: Recipe, budget: str | None, targets: Sequence[str] | None, costs: Costs | None
) -> _Opened:
    if not recipe.chooses:
        raise InputError(f"{recipe.where} names every format, so there is nothing to spend a budget on; add choose")
    asked = budget or recipe.budget
    if asked is None:
        raise InputError(f"{recipe.where} leaves formats open and has no budget; give one with --budget, e.g. 4.75bpw")
    wanted, held = Budget.parse(asked), tuple(targets or recipe.targets)
    if wanted.kind == "ms" and costs is None:
        raise InputError(
            f"a budget of {wanted} needs to know what a token costs; give --costs, which moss-costs writes"
        )
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
    fixed_bytes = plan.predicted_bytes - sum(min(group.bytes.values()) for group in groups)
    if costs is None:
        return _Opened(wanted, held, groups, fixed_bytes, [], 0)
    times = [
        {storage: round(costs.tensors_ns(weights, group.group.specs, storage)) for storage in group.bytes}
        for group in groups
    ]
    free = {name for group in groups for name in group.group.tensors}
    rest = [spec for spec in weights.specs.values() if spec.name not in free]
    named = {spec.name: plan.by_name[spec.name].format or STORED for spec in rest}
    fixed_ns = costs.fixed_ns + sum(costs.tensors_ns(weights, [spec], named[spec.name]) for spec in rest)
    return _Opened(wanted, held, groups, fixed_bytes, times, round(fixed_ns))


def _smallest(recipe: Recipe, groups: Sequence[OpenGroup], targets: Sequence[str]) -> Recipe:
    # Bytes rise.
    return rewritten(
        recipe, {group.group: next(iter(group.bytes)) for group in groups}, targets=targets, why="smallest"
    )


def _bits(weights: Weights, size: int) -> str:
    return f"{size:,} bytes ({8 * size / weights.origin.parameters:.3f} bits a weight)"
