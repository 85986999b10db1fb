# SPDX-License-Identifier: Apache-2.0
"""Top-k routing, shared by both kinds of experts: which experts a token goes to, and with which gates.

    gates = softmax over the k largest logits (Mixtral's rule); every other expert gets none.

Logits and gates are computed in fp32 (float64 in a float64 model), from the normed block input.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each row goes to.

    Attributes:
        logits: [rows, X] router logits, or None where there is one expert and so no router.
        chosen: [rows, K] expert indices.
        gates: [rows, K], positive, each row sums to 1.
        experts: X.
    """

    logits: Tensor | None
    chosen: Tensor
    gates: Tensor
    experts: int

    def rows_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows that chose an expert, ascending, and their gates [n, 1]."""
        hit = self.chosen == expert
        rows, slots = hit.nonzero(as_tuple=True)
        return rows, self.gates[rows, slots].unsqueeze(1)

    def dense(self) -> Tensor:
        """Gates as [rows, X], zero where an expert was not chosen."""
        empty = torch.zeros((self.chosen.shape[0], self.experts), dtype=self.gates.dtype, device=self.gates.device)
        return empty.scatter(1, self.chosen, self.gates)

    def without(self, gone: Collection[int]) -> "Routing":
        """The routing by the same logits where these experts are gone: the rule again, over those that are left.

        Raises:
            ValueError: there is no router, or no expert is left.
        """
        left = self.experts - len(gone)
        if self.logits is None or left < 1:
            raise ValueError(f"of {self.experts} experts {len(gone)} are gone: nothing is left to route to")
        logits = self.logits.index_fill(1, torch.tensor(sorted(gone), device=self.logits.device), -math.inf)
        values, chosen = torch.topk(logits, min(self.chosen.shape[1], left), dim=-1)
        return Routing(self.logits, chosen, torch.softmax(values, -1), self.experts)


def route(u: Tensor, router: Tensor | None, *, experts: int, chosen: int) -> Routing:
    """Route rows u [rows, D] by router [X, D]; without a router every row goes to expert 0 with gate 1."""
    if router is None:
        first = torch.zeros((u.shape[0], 1), dtype=torch.int64, device=u.device)
        return Routing(None, first, torch.ones((u.shape[0], 1), dtype=u.dtype, device=u.device), experts)
    with torch.autocast(u.device.type, enabled=False):
        logits = u @ router.T
        values, indices = torch.topk(logits, chosen, dim=-1)
        return Routing(logits, indices, torch.softmax(values, -1), experts)


def balance_loss(routing: Routing) -> Tensor:
    """X · Σ_e f_e P_e (Fedus et al. 2021, eq. 4): f_e the share of choices that fell on expert e, P_e its mean
    probability.

    1 when the load is even, X when one expert gets everything.
    """
    if routing.logits is None:
        raise ValueError("a layer with one expert has no balance loss")
    share = torch.bincount(routing.chosen.flatten(), minlength=routing.experts) / routing.chosen.numel()
    return routing.experts * (share * torch.softmax(routing.logits, -1).mean(0)).sum()
