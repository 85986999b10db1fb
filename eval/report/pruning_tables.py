# SPDX-License-Identifier: Apache-2.0
"""What pruning removed and what it costs, as tables."""

from rich.table import Table

from mossquant.calibration.prune import Pruning
from mossquant.eval.report.grid import DASH, grid, left, right

_SHOWN = 40
"""Removed experts that are listed; the JSON has all of them."""


def pruning_tables(found: Pruning) -> list[Table | str]:
    """The experts that are gone, then what is left and what was lost."""
    rows = [
        (
            f"layer {one.layer}, {one.kind} {one.expert}",
            f"{100 * one.frequency:.1f}",
            f"{one.reap:.3g}",
            f"{one.change:.2e}",
            f"{one.alone:.2e}",
        )
        for one in found.removed[:_SHOWN]
    ]
    more = len(found.removed) - len(rows)
    chosen = "named" if found.by is None else f"chosen by {found.by}"
    caption = (
        f"{chosen}, in this order, on {found.tokens:,} tokens of {found.text}. frequency: share of its layer's "
        "choices; reap: gate × norm of what it gives; change: of the direction of the residual stream without it; "
        f"alone: KL at the output without it alone{f'. {more} more are in the JSON' if more else ''}"
    )
    removed = grid([*left("gone"), *right("frequency, %", "reap", "change", "alone")], rows, caption=caption)
    before, after = found.parameters
    facts = [
        *((f"{kind} experts", f"{kept} of {all_} are left") for kind, (all_, kept) in found.experts.items()),
        ("parameters", f"{after:,} of {before:,}, {100 * (before - after) / before:.1f} % gone"),
        (f"KL on {found.judged_tokens:,} other tokens", f"{found.kl:.2e} nats a token{_between(found.kl_ci95)}"),
        (
            "after recovery",
            DASH
            if found.recovered_kl is None
            else f"{found.recovered_kl:.2e}{_between(found.recovered_ci95)}, {found.recovered_tokens:,} tokens",
        ),
    ]
    return [removed, grid(left("", ""), facts, header=False)]


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2e}, {interval[1]:.2e}]"
