# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, with which gates, and the balance loss, against numbers worked out by hand."""

import math

import pytest
import torch

from mossquant.model.routing import Routing, balance_loss, route

# With u = e_i the logits are column i of the router.
ROUTER = torch.tensor(
    [[0.0, 1.0, -5.0], [math.log(3), 2.0, -6.0], [-1.0, 3.0, -4.0], [0.0, 0.0, -7.0]], dtype=torch.float64
)
ROWS = torch.eye(3, dtype=torch.float64)


def test_gates_are_a_softmax_over_the_chosen_logits() -> None:
    routing = route(ROWS[1:], ROUTER, experts=4, chosen=2)
    e = math.e
    assert routing.chosen.tolist() == [[2, 1], [2, 0]]
    assert routing.gates.flatten().tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)] * 2, rel=1e-14)
    assert routing.dense()[0].tolist() == pytest.approx([0, 1 / (1 + e), e / (1 + e), 0], rel=1e-14)
    whole = route(ROWS[:1], ROUTER[:2], experts=2, chosen=2)
    assert whole.dense().flatten().tolist() == pytest.approx([0.25, 0.75], rel=1e-14)


def test_rows_of_an_expert_with_their_gates() -> None:
    routing = route(ROWS[1:], ROUTER, experts=4, chosen=2)
    rows, gates = routing.rows_of(2)
    assert rows.tolist() == [0, 1]
    assert gates.shape == (2, 1)
    assert routing.rows_of(0)[0].tolist() == [1]
    assert routing.rows_of(3)[0].tolist() == []


def test_one_expert_needs_no_router() -> None:
    routing = route(ROWS, None, experts=1, chosen=1)
    assert routing.logits is None
    assert routing.dense().tolist() == [[1.0]] * 3
    with pytest.raises(ValueError, match="one expert"):
        balance_loss(routing)


def test_routing_stays_in_the_models_type_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(ROWS.float(), ROUTER.float(), experts=4, chosen=2)
    assert routing.logits is not None
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    assert routing.logits[0, 1] == ROUTER.float()[1, 0], "ln 3 rounded to bf16 is another number"


def test_balance_loss_by_hand() -> None:
    """Even load and even probabilities: 1. Everything to one of four experts with probability 1: 4."""
    even = Routing(torch.zeros(4, 4), torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]), torch.full((4, 2), 0.5), 4)
    assert float(balance_loss(even)) == pytest.approx(1, abs=1e-6)
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    one = Routing(logits, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 4)
    assert float(balance_loss(one)) == pytest.approx(4, abs=1e-6)
    # f = (3/4, 1/4), P = (softmax of (ln 3, 0)) = (3/4, 1/4): 2 · (9 + 1) / 16
    logits = torch.tensor([[math.log(3), 0.0]]).expand(4, 2)
    part = Routing(logits, torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), 2)
    assert float(balance_loss(part)) == pytest.approx(1.25, abs=1e-6)
