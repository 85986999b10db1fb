# SPDX-License-Identifier: Apache-2.0
"""Every solver, by the name that recipes use; a new one is its file and its entry here."""

from collections.abc import Mapping

from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.nearest import NEAREST, NEAREST_MSE
from mossquant.calibration.solver import BlockSolver, Solver
from mossquant.calibration.tune import TUNE
from mossquant.errors import InputError
from mossquant.plan.plan import Plan

SOLVERS: dict[str, Solver | BlockSolver] = {solver.name: solver for solver in (NEAREST, NEAREST_MSE, GPTQ, TUNE)}

_GATHERED = {"hessian", "rows"}
"""What text gives to a matrix solver where no statistics are at hand (`mossquant.calibration.walk`)."""


def planned_solvers(plan: Plan, *, measured: bool, text: bool = False) -> dict[str, Solver | BlockSolver]:
    """The solvers that a plan names, by name.

    Args:
        plan: the plan.
        measured: whether statistics are at hand.
        text: whether text is.

    Raises:
        InputError: unknown solvers, or some that need statistics or text where there are none: all of them at once.
    """
    names = sorted({entry.solver for entry in plan.tensors if entry.solver is not None})
    offenders = [f"unknown solver {name[:40]!r}" for name in names if name not in SOLVERS]
    solvers = {name: SOLVERS[name] for name in names if name in SOLVERS}
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
