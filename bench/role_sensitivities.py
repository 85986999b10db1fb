# SPDX-License-Identifier: Apache-2.0
"""What roles are known to lose: the `sensitivity` values of the recipes that need no text.

    mossquant sensitivity MODEL --text FILE -o FILE.json       once a model, on text that nothing is judged on
    python bench/role_sensitivities.py FORMAT MODEL=FILE.json…

For each role, KL with all of its layers in a format over the mean square of their relative errors; of several models
the geometric mean, each divided by the model's own mean over roles first: models lose more the longer they trained.
"""

import sys
from collections import defaultdict
from math import exp, log
from pathlib import Path

from mossquant.calibration.options import relative_error
from mossquant.calibration.sensitivity import read_sensitivities
from mossquant.checkpoint.open import open_weights
from mossquant.plan.groups import groups_of


def of_model(path: str, file: Path, wanted: str) -> dict[str, float]:
    """Role → KL over squared relative error."""
    weights = open_weights(path, verb="role sensitivities")
    found = read_sensitivities(file, weights)
    assert found is not None
    groups = {group.name: group for group in groups_of(weights.config)}
    kl: dict[str, float] = defaultdict(float)
    errors: dict[str, list[float]] = defaultdict(list)
    for losses in found.groups:
        storages = {loss.storage: loss.kl for loss in losses.losses}
        storage = next((s for s in (wanted, "int8", "int8_g32") if s in storages), None)
        if storage is None:
            continue
        kl[losses.role] += storages[storage]
        errors[losses.role].append(relative_error(weights, groups[losses.name], storage) ** 2)
    return {role: kl[role] * len(errors[role]) / sum(errors[role]) for role in kl if sum(errors[role])}


def main() -> None:
    """Print the table."""
    wanted, *models = sys.argv[1:]
    tables = [of_model(path, Path(file), wanted) for path, _, file in (model.partition("=") for model in models)]
    roles = list(dict.fromkeys(role for table in tables for role in table))
    levels = [exp(sum(map(log, table.values())) / len(table)) for table in tables]
    for role in roles:
        values = [table[role] / level for table, level in zip(tables, levels, strict=True) if role in table]
        raw = [table.get(role, float("nan")) for table in tables]
        mean = exp(sum(map(log, values)) / len(values))
        print(f"{role:28} {mean:9.3f}   " + "  ".join(f"{value:9.4f}" for value in raw))


if __name__ == "__main__":
    main()
