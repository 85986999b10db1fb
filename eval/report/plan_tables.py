# SPDX-License-Identifier: Apache-2.0
"""Plans and recipes as tables."""

from collections.abc import Iterable

import torch
from rich.table import Table

from mossquant.calibration.quantize import disk_bytes, memory_bytes
from mossquant.eval.report.grid import DASH, grid, left, right, spaced
from mossquant.model.config import PRESETS
from mossquant.model.mossnet import tensor_specs
from mossquant.plan.entries import TensorEntry
from mossquant.plan.plan import Calibrated, Plan, make_plan
from mossquant.plan.recipe import Recipe, Rule, recipes


def plan_tables(plan: Plan) -> list[Table | str]:
    """A plan before it is executed, or the ledger after: by role, the reasons, what solvers noted, and by format."""
    roles: dict[tuple[str, str], list[TensorEntry]] = {}
    reasons: dict[str, dict[str, None]] = {}
    noted: list[tuple[str, str]] = []
    for entry in plan.tensors:
        roles.setdefault((entry.role, entry.storage), []).append(entry)
        reasons.setdefault(entry.reason, {})[entry.role] = None
        if entry.note is not None:
            noted.append((entry.name, entry.note))
    rows = [
        (
            role,
            storage if of[0].format is not None else f"kept in {storage}",
            of[0].solver or DASH,
            str(len(of)),
            f"{sum(entry.predicted_bytes for entry in of):,}",
            _largest_error(of),
        )
        for (role, storage), of in roles.items()
    ]
    summary = [
        (row.storage, str(row.tensors), f"{row.weights:,}", f"{row.bytes:,}", f"{row.bits_per_weight:.3f}")
        for row in plan.summary()
    ]
    tensors, weights = str(len(plan.tensors)), f"{sum(entry.count for entry in plan.tensors):,}"
    summary.append(("all", tensors, weights, f"{plan.predicted_bytes:,}", f"{plan.bits_per_weight:.3f}"))
    caption = (
        f"From {plan.stored_bytes:,} bytes. Needs {disk_bytes(plan) / 1e6:.1f} MB of disk and about "
        f"{memory_bytes(plan) / 1e6:.0f} MB of memory beside Python's own."
    )
    by_role = [*left("role", "becomes", "solver"), *right("tensors", "bytes", "largest\nerror")]
    by_format = [*left("format"), *right("tensors", "weights", "bytes", "bits a\nweight")]
    decays = [
        (entry.name, f"{entry.decay_error.largest:.5f}", f"{entry.decay_error.mean:.5f}")
        for entry in plan.tensors
        if entry.decay_error is not None
    ]
    of_decays = [*left("decays, by the text's time steps"), *right("largest\nerror", "mean\nerror")]
    because = [(why, ", ".join(names)) for why, names in reasons.items()]
    calibrated = [] if plan.calibrated is None else [_calibrated_table(plan.calibrated)]
    return spaced(
        *calibrated,
        grid(by_role, rows, whole_names=True),
        grid(left("because", "these are stored so"), because),
        *([grid(left("tensor", "its solver says"), noted, whole_names=True)] if noted else []),
        *([grid(of_decays, decays, whole_names=True)] if decays else []),
        grid(by_format, summary, caption=caption, whole_names=True),
    )


def recipe_tables() -> list[Table | str]:
    """The recipes that ship with the package: their rules, and what they cost on the smallest preset."""
    return spaced(*map(_recipe_table, recipes()))


def _recipe_table(recipe: Recipe) -> Table:
    rows = []
    for weight in recipe.weights:
        formats = weight.format or ", ".join(weight.choose or ())
        quantized = f"{formats}, {weight.solver or recipe.solver}" if weight.format else f"one of {formats}"
        becomes = quantized if weight.keep is None else f"kept in {weight.keep}"
        rows.append(("weights", _which(weight), becomes, weight.why or ""))
    rows += [("activations", _which(rule), rule.format, "") for rule in recipe.activations]
    rows += [("state", _which(rule), rule.format, "") for rule in recipe.state]
    if recipe.chooses:
        cost = f"{recipe.budget} over all tensors" + (", chosen by what they lose on text" if recipe.measure else "")
        cost += f", then distilled over {recipe.recover:,} tokens" if recipe.recover else ""
    else:
        name, config = next(iter(PRESETS.items()))
        plan = make_plan(config, {spec.name: torch.bfloat16 for spec in tensor_specs(config)}, recipe)
        cost = f"{plan.bits_per_weight:.2f} bits a weight on {name}"
    caption = f"Recipe {recipe.name}: {cost}; runs on {', '.join(recipe.targets)}."
    return grid(left("what", "which", "becomes", "because"), rows, caption=caption)


def _calibrated_table(calibrated: Calibrated) -> Table:
    rows = []
    if calibrated.predicted_kl is not None:
        what = f"predicted for {calibrated.budget} by nearest-mse, {calibrated.losses}"
        rows.append((what, f"{calibrated.predicted_kl:.2e}", ""))
    if calibrated.rounded_kl is not None:
        rows.append(("after rounding", f"{calibrated.rounded_kl:.2e}", ""))
    if calibrated.recovered_tokens and calibrated.kl is not None:
        ci95 = calibrated.kl_ci95
        interval = DASH if ci95 is None else f"{ci95[0]:.2e} to {ci95[1]:.2e}"
        what = f"after recovery over {calibrated.recovered_tokens:,} tokens"
        rows.append((what, f"{calibrated.kl:.2e}", interval))
    measured = f", measured on the last {calibrated.judged_tokens:,} tokens" if calibrated.judged_tokens else ""
    caption = f"Nats a token, fp32, on {calibrated.text}{measured}."
    return grid([*left("on text"), *right("KL", "95 %")], rows, caption=caption)


def _which(rule: Rule) -> str:
    return rule.pattern + (", where there is one" if rule.optional else "")


def _largest_error(entries: Iterable[TensorEntry]) -> str:
    quantized = [entry for entry in entries if entry.format is not None]
    errors = [entry.relative_error for entry in quantized if entry.relative_error is not None]
    return f"{max(errors):.4f}" if errors else DASH
