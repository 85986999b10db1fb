# SPDX-License-Identifier: Apache-2.0
"""A Runner whose next tokens are known."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mossquant.runner import RunnerInfo, State


class Scripted:
    """A Runner whose most likely tokens are a script, again and again, whatever it reads."""

    def __init__(self, script: Sequence[int], *, vocab_size: int = 256) -> None:
        self.script = list(script)
        self.read_tokens: list[int] = []
        self.info = RunnerInfo("script", "checkpoint", vocab_size, "fp32", "fp32", "float32", 1, 1, 1, {}, {})

    def initial_state(self, batch: int = 1) -> State:
        return State(-1, batch)

    def __call__(
        self, tokens: NDArray[np.int64], state: State, *, logits: str = "last"
    ) -> tuple[NDArray[np.float32], State]:
        self.read_tokens += tokens[0].tolist()
        at = state.take() + 1
        found = np.zeros((1, 1, self.info.vocab_size), np.float32)
        found[0, 0, self.script[at % len(self.script)]] = 9
        return found, State(at, 1)
