# SPDX-License-Identifier: Apache-2.0
"""What budgets promise to lose, and what is lost: KL predicted from sensitivities against KL measured.

    python bench/promises.py WORK MODEL [--text FILE…] [--tokens 8192] [--method measured|estimated]

Formats are chosen for each budget from the losses of the groups on a text; the model is rounded by `nearest-mse` and KL
measured on windows of the same text that losses were measured on, and on its last 16,384 tokens, which they were not.
Prints a Markdown table; "of sum" is what was measured over the plain sum of the losses, "promised" over what is
measured on the end of the text. Losses are kept in WORK/MODEL-METHOD.json.
"""

import argparse
from pathlib import Path

import torch

from mossquant.calibration.budget import spend
from mossquant.calibration.meter import WINDOW, Meter, interval
from mossquant.calibration.options import dtypes_of, rounded
from mossquant.calibration.quantize import JUDGED_TOKENS
from mossquant.calibration.sensitivity import Sensitivities, losses_of
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.files.outputs import json_bytes
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import Recipe, load_recipe

BUDGETS = {"int4-best": ("4.5bpw", "4.75bpw", "5.25bpw"), "int8-best": ("8.6bpw", "8.8bpw")}


def values(weights: Weights, recipe: Recipe) -> dict[TensorSpec, torch.Tensor]:
    """What `nearest-mse` makes of every tensor that a recipe quantizes."""
    plan = make_plan(weights.config, dtypes_of(weights), recipe)
    quantized = [entry for entry in plan.tensors if entry.format is not None]
    return {weights.specs[of.name]: rounded(weights, weights.specs[of.name], of.storage) for of in quantized}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", type=Path, default=[])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--method", choices=("measured", "estimated"), default="measured")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    weights = open_weights(asked.model, verb="bench")
    learned, judged = CalibrationText.of(weights, asked.text).split(JUDGED_TOKENS)
    stored = asked.work / f"{Path(asked.model).name}-{asked.method}.json"
    recipes = {name: load_recipe(name) for name in BUDGETS}
    if not stored.exists():
        found = losses_of(weights, [*recipes.values()], learned, tokens=asked.tokens, method=asked.method, said=print)
        asked.work.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(json_bytes(found.to_json()))
    losses = Sensitivities.read(stored)
    losses.check(weights)
    meters = [
        Meter(weights, text.windows(count // WINDOW, WINDOW))
        for text, count in (
            (learned, losses.tokens),
            (judged, len(judged)),
        )
    ]
    print(f"{Path(asked.model).name}, losses {losses.method} on {losses.tokens:,} tokens\n")
    print("| recipe, budget | sum of losses | promised | there, of sum | at the end | 95 % | promised, of measured |")
    print("| --- |" + " ---: |" * 6)
    for name, budgets in BUDGETS.items():
        for budget in budgets:
            chosen = spend(weights, recipes[name], budget=budget, sensitivities=losses)
            made = values(weights, chosen.recipe)
            own, end = (meter.kl(made) for meter in meters)
            promised, ci95 = chosen.predicted_kl or 0.0, interval(end)
            total = losses.within(promised)
            between = "–" if ci95 is None else f"{ci95[0]:.1e} to {ci95[1]:.1e}"
            print(
                f"| {name}, {budget} | {total:.2e} | {promised:.2e} | {own.mean() / total:.2f} | {end.mean():.2e} "
                f"| {between} | {promised / end.mean():.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
