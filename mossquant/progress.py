# SPDX-License-Identifier: Apache-2.0
"""How far a long call is, for whoever shows it."""

from collections.abc import Callable

__all__ = ["Count", "Progress"]

Progress = Callable[[str, int, int], None]
"""(what was just finished, done, in all): tensors with weights or bytes, or stages."""

Count = Callable[[int, int], None]
"""(done, in all): tokens, or turns."""
