# SPDX-License-Identifier: Apache-2.0
"""Every solver, by the name that recipes use; a new one is its file and its entry here."""

from mossquant.calibration.gptq import GPTQ
from mossquant.calibration.nearest import NEAREST, NEAREST_MSE
from mossquant.calibration.solver import Solver
from mossquant.errors import InputError
from mossquant.plan.plan import Plan

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (NEAREST, NEAREST_MSE, GPTQ)}


def planned_solvers(plan: Plan, *, measured: bool) -> dict[str, Solver]:
    """The solvers that a plan names, by name.

    Args:
        plan: the plan.
        measured: whether statistics are at hand.

    Raises:
        InputError: unknown solvers, or some that need statistics where there are none: all of them at once.
    """
    names = sorted({entry.solver for entry in plan.tensors if entry.solver is not None})
    offenders = [f"unknown solver {name[:40]!r}" for name in names if name not in SOLVERS]
    solvers = {name: SOLVERS[name] for name in names if name in SOLVERS}
    offenders += [
        f"{name} needs {' and '.join(solver.needs)}, and nothing was measured"
        for name, solver in solvers.items()
        if solver.needs and not measured
    ]
    if offenders:
        raise InputError.listing(f"recipe {plan.recipe}", offenders, f"Known solvers: {', '.join(SOLVERS)}.")
    return solvers
