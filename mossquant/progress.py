# SPDX-License-Identifier: Apache-2.0
"""How far a long call is, for whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being worked on, done, in all): tensors with weights or bytes, stages, tokens, or turns."""


def about(seconds: float) -> str:
    """A time as a user is told it beforehand: "half a minute", "about 7 minutes", "about 5 hours"."""
    minutes = round(seconds / 60)
    if minutes > 180:
        return f"about {minutes / 60:,.0f} hours"
    if seconds < 45:
        return "half a minute" if seconds > 15 else "some seconds"
    return "about a minute" if minutes <= 1 else f"about {minutes} minutes"
