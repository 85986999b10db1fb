# SPDX-License-Identifier: Apache-2.0
"""How well logits predict a text, and how far one model's predictions lie from another's. No I/O.

    nll_t = −log p_t(token_t)                                   nats
    KL_t  = Σ_v p_t(v) (log p_t(v) − log q_t(v))                nats; p the original, q the candidate
    agreement_t = [argmax p_t = argmax q_t]

Logits come in fp32 from most Runners, and KL between a model and its faithful copy is far below fp32's resolution, so
that everything is computed in float64: identical logits give exactly 0, and nothing is clamped. Rounding may leave a
KL of nearly identical logits negative, never below `NEGATIVE_KL`.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEGATIVE_KL = -1e-12
"""Lowest KL that rounding leaves: V terms of at most |log p| < 1e3, each rounded at 1e-16 and weighted by p."""


class Predictions:
    """What a model predicts at some positions; what is asked for more than once is computed once.

    Attributes:
        log_p: log softmax over the vocabulary, float64 [..., V].
    """

    def __init__(self, logits: NDArray[np.floating[Any]]) -> None:
        """logits [..., V] of any float type."""
        self.log_p: Tensor = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(logits)).to(torch.float64), -1)

    @cached_property
    def p(self) -> Tensor:
        """Probabilities, float64 [..., V]."""
        return self.log_p.exp()

    @cached_property
    def top(self) -> Tensor:
        """The most likely token [...]; of several equally likely ones the first."""
        return self.log_p.argmax(-1)


def nll(predicted: Predictions, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """−log p of the tokens that came, targets [...], in nats [...]."""
    index = torch.from_numpy(np.ascontiguousarray(targets)).unsqueeze(-1)
    losses: NDArray[np.float64] = (-predicted.log_p.gather(-1, index)).squeeze(-1).numpy()
    return losses


def kl(original: Predictions, candidate: Predictions) -> NDArray[np.float64]:
    """KL(original ‖ candidate) in nats [...]."""
    # Differences first: terms of nearly equal predictions are then small, and so is their rounding.
    divergences: NDArray[np.float64] = (original.log_p - candidate.log_p).mul_(original.p).sum(-1).numpy()
    return divergences


def agreement(original: Predictions, candidate: Predictions) -> NDArray[np.bool_]:
    """Whether both find the same token most likely [...]."""
    same: NDArray[np.bool_] = (original.top == candidate.top).numpy()
    return same
