# SPDX-License-Identifier: Apache-2.0
"""Sensitivities as tables: by role, and the groups that lose most."""

from rich.table import Table

from mossquant.calibration.sensitivity import GroupLosses, Sensitivities
from mossquant.eval.report.grid import DASH, grid, left, right, spaced

_MOST = 12
"""Groups that are listed one by one."""


def sensitivity_tables(found: Sensitivities) -> list[Table | str]:
    """What each role loses in each format, all layers together; then the groups that lose most in their smallest."""
    storages = list(dict.fromkeys(loss.storage for group in found.groups for loss in group.losses if loss.kl))
    whole = [group for group in found.groups if group.expert is None]
    roles: dict[str, list[GroupLosses]] = {}
    for group in whole:
        roles.setdefault(group.role, []).append(group)
    rows = [
        (role, str(len(of)), f"{_smallest_bytes(of):,}", *(_summed(of, storage) for storage in storages))
        for role, of in roles.items()
    ]
    caption = (
        f"KL in nats a token, {found.method} on {found.tokens:,} tokens of {found.text}, each group alone and fp32 "
        f"elsewhere.{_together(found)}"
    )
    worst = sorted(found.groups, key=lambda group: -group.losses[0].kl)[:_MOST]
    listed = [
        (
            group.name,
            group.losses[0].storage,
            f"{group.losses[0].kl:.2e}",
            _interval(group),
            f"{group.losses[0].bytes:,}",
        )
        for group in worst
    ]
    return spaced(
        grid([*left("role"), *right("groups", "least\nbytes", *storages)], rows, caption=caption, whole_names=True),
        grid([*left("loses most", "in"), *right("KL", "95 %", "bytes")], listed, whole_names=True),
    )


def _together(found: Sensitivities) -> str:
    if not found.levels:
        return ""
    less = ", ".join(f"{level.kl / level.sum:.2f} at {level.sum:.1e}" for level in found.levels[1:])
    said = f" All in their smallest format together: {found.levels[0].kl:.2e}, {found.additivity:.2f} times the sum"
    return f"{said}; of smaller sums {less}." if less else f"{said}."


def _smallest_bytes(groups: list[GroupLosses]) -> int:
    return sum(group.losses[0].bytes for group in groups)


def _summed(groups: list[GroupLosses], storage: str) -> str:
    values = [loss.kl for group in groups for loss in group.losses if loss.storage == storage]
    return f"{sum(values):.2e}" if values else DASH


def _interval(group: GroupLosses) -> str:
    ci95 = group.losses[0].ci95
    return DASH if ci95 is None else f"{ci95[0]:.1e} to {ci95[1]:.1e}"
