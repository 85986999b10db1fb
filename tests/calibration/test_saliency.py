# SPDX-License-Identifier: Apache-2.0
"""What experts are worth, against the formulas written out over whole models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import CONFIGS, SMALL, random_model, random_tokens, write_model
from torch import Tensor

from mossquant.calibration.saliency import Saliencies, saliencies
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, experts_of
from mossquant.model.routing import Routing

CLOSE = 1e-4
"""Relative: fp32 against float64, sums of some hundred values whose differences have lost a digit."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("saliency") / "model"
    return open_weights(write_model(folder, random_model(SMALL, dtype=torch.float32)), verb="test")


def behind(model: MossNet, tokens: Tensor, at: int, without: Callable[[str, Routing], Routing] | None) -> Tensor:
    """The residual stream [B, T, D] behind block `at`."""
    x, state = model.embeddings[tokens], model.initial_state(len(tokens))
    blocks = list(model.blocks)
    for block in blocks[:at]:
        x, _ = block.added(x, state, Forward(scan="sequential"))
    return blocks[at].added(x, state, Forward(scan="sequential", reroute=without))[0]


def test_against_the_formulas(weights: Weights) -> None:
    tokens = random_tokens(SMALL, 6, 48)
    model = load_model(weights, dtype=torch.float64)
    found = {(w.expert.kind, w.expert.layer, w.expert.number): w for w in saliencies(weights, tokens)}
    assert len(found) == 16
    for at, experts in enumerate(experts_of(SMALL)):
        seen: dict[str, Routing] = {}

        def keep(name: str, routing: Routing, seen: dict[str, Routing] = seen) -> Routing:
            seen[name] = routing
            return routing

        x = behind(model, tokens, at, keep)
        routing = seen[experts.routing or ""]
        for number in range(experts.count):
            one: Saliencies = found[experts.kind, experts.layer, number]
            rows, gates = routing.rows_of(number)
            assert one.tokens == len(rows)
            assert one.frequency == pytest.approx(len(rows) / routing.chosen.numel())

            def masked(name: str, own: Routing, number: int = number) -> Routing:
                assert own.logits is not None
                logits = own.logits.clone()
                logits[:, number] = -torch.inf
                values, chosen = torch.topk(logits, 2, -1)
                return Routing(own.logits, chosen, torch.softmax(values, -1), own.experts)

            other = behind(model, tokens, at, masked)
            apart = (other / other.norm(dim=-1, keepdim=True) - x / x.norm(dim=-1, keepdim=True)).square().sum(-1)
            assert one.change == pytest.approx(float(apart.mean()), rel=CLOSE)
            block = list(model.blocks)[at]
            entering = model.embeddings[tokens] if at == 0 else behind(model, tokens, at - 1, None)
            u = entering * torch.rsqrt(entering.square().mean(-1, keepdim=True) + SMALL.rms_norm_eps) * block.norm
            if experts.kind == "mlp":
                seen = u.flatten(0, 1)[rows]
                hidden = torch.nn.functional.silu(seen @ block.w1[number].T) * (seen @ block.w3[number].T)
                given = hidden @ block.w2[number].T
            else:
                x_half = (u @ block.in_proj.T)[..., : SMALL.d_inner].transpose(1, 2)
                padded = torch.nn.functional.pad(x_half, (SMALL.conv_kernel - 1, 0))
                taps = block.conv.view(SMALL.d_inner, 1, -1)
                convolved = torch.conv1d(padded, taps, block.conv_bias, groups=SMALL.d_inner).transpose(1, 2)
                seen = torch.nn.functional.silu(convolved).flatten(0, 1)[rows]
                given = seen @ block.x_proj[number].T  # δ, B and C
            expected = (gates.squeeze(1) * given.norm(dim=-1)).mean()
            assert one.reap == pytest.approx(float(expected), rel=CLOSE)


def test_what_is_never_chosen_is_worth_nothing(tmp_path: Path) -> None:
    model = random_model(SMALL, dtype=torch.float32)
    block = next(iter(model.blocks))
    block.router.zero_()  # of equal logits always the same two are chosen
    weights = open_weights(write_model(tmp_path / "model", model), verb="test")
    found = [
        w for w in saliencies(weights, random_tokens(SMALL, 2, 20)) if (w.expert.kind, w.expert.layer) == ("ssm", 0)
    ]
    assert sorted(w.tokens for w in found) == [0, 0, 40, 40]
    assert [w.change > 0 for w in found] == [w.reap > 0 for w in found] == [w.tokens > 0 for w in found]


def test_a_model_without_routers_has_none(tmp_path: Path) -> None:
    weights = open_weights(write_model(tmp_path / "model", random_model(CONFIGS["mamba"])), verb="test")
    assert saliencies(weights, random_tokens(CONFIGS["mamba"], 1, 8)) == []
