# SPDX-License-Identifier: Apache-2.0
"""How far a long call is, for whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being worked on, done, in all): tensors with weights or bytes, stages, tokens, or turns."""


def about(seconds: float) -> str:
    """A time as a user is told it beforehand: "about a minute", "about 7 minutes"."""
    minutes = round(seconds / 60)
    return "about a minute" if minutes <= 1 else f"about {minutes} minutes"
