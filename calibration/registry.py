# SPDX-License-Identifier: Apache-2.0
"""Every solver, by the name that recipes use; a new one is its file and its entry here."""

from collections.abc import Mapping

from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.nearest import NEAREST, NEAREST_MSE
from mossquant.calibration.solver import BlockSolver, Solver
from mossquant.calibration.tune import TUNE
from mossquant.errors import InputError
from mossquant.plan.plan import Plan
from mossquant.plan.recipe import Recipe

SOLVERS: dict[str, Solver | BlockSolver] = {solver.name: solver for solver in (NEAREST, NEAREST_MSE, GPTQ, TUNE)}

_GATHERED = {"hessian", "rows"}
"""What text gives to a matrix solver where no statistics are at hand (`mossquant.calibration.walk`)."""


def check_solvers(recipe: Recipe) -> None:
    """Raise `InputError`: a recipe names solvers that are none, all of them with their lines."""
    named: list[tuple[tuple[str | int, ...], str]] = [(("solver",), recipe.solver)]
    named += [(("weights", index, "solver"), rule.solver) for index, rule in enumerate(recipe.weights) if rule.solver]
    offenders = [f"{recipe.place(*at)}: unknown solver {name!r}" for at, name in named if name not in SOLVERS]
    if offenders:
        raise InputError.listing(
            f"{recipe.where} is not a valid recipe", offenders, f"Known solvers: {', '.join(SOLVERS)}."
        )


def planned_solvers(plan: Plan, *, measured: bool, text: bool = False) -> dict[str, Solver | BlockSolver]:
    """The solvers that a plan names, by name.

    Args:
        plan: the plan, of a recipe whose solvers are known (`check_solvers`).
        measured: whether statistics are at hand.
        text: whether text is.

    Raises:
        InputError: some need statistics or text where there are none: all of them at once.
    """
    names = sorted({entry.solver for entry in plan.tensors if entry.solver is not None})
    solvers, offenders = {name: SOLVERS[name] for name in names}, list[str]()
    for name, solver in solvers.items():
        if isinstance(solver, BlockSolver):
            offenders += [] if text else [f"{name} needs text (--text FILE) to run the blocks on"]
        elif solver.needs and not measured and not (text and _GATHERED.issuperset(solver.needs)):
            needs = " and ".join(solver.needs)
            offenders.append(f"{name} needs {needs} (--stats FOLDER that `mossquant calibrate` wrote, or --text FILE)")
    if offenders:
        raise InputError.listing(f"recipe {plan.recipe}", offenders, f"Known solvers: {', '.join(SOLVERS)}.")
    return solvers


def needs_walk(solvers: Mapping[str, Solver | BlockSolver], *, measured: bool) -> bool:
    """Whether some of them must be shown the blocks on text."""
    return any(isinstance(solver, BlockSolver) or (solver.needs and not measured) for solver in solvers.values())
