# SPDX-License-Identifier: Apache-2.0
"""How far a long call is, for whoever shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being worked on, done, in all): tensors with weights or bytes, stages, tokens, or turns."""
