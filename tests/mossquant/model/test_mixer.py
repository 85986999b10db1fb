# SPDX-License-Identifier: Apache-2.0
"""Mixing the experts' parameters: the sum over expert pairs, experts that nobody chose, their order, and stacks."""

from collections.abc import Iterator
from dataclasses import replace

import bounds
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import SMALL, difference, random_model, random_tokens
from torch import Tensor

from mossquant.model.forward import Forward
from mossquant.model.mixer import Mixer
from mossquant.model.mossnet import MossNet, tensor_specs
from mossquant.model.routing import Routing
from mossquant.model.scan import ScanForm

Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def explicit_sum(raw: dict[str, Array], u: Array, chosen: int, fault: str = "") -> Array:
    """The mixer unrolled into attention over expert pairs, for one sequence u [T, D] from a zero state.

        y_t = Σ_{s≤t} Σ_{e,f} g_e(t) g_f(s) · C_e(t)ᵀ exp(A Σ_{s<r≤t} Δ_r) B_f(s) · Δ_s x_s + D x_t

    `raw` holds the checkpoint's tensors under their own names. `fault` plants a mistake in the gates of the sum.
    """
    time, experts = len(u), len(raw["router.weight"])
    states, rank = raw["A_log"].shape[1], raw["experts.0.dt_proj.weight"].shape[1]
    x, z = np.split(u @ raw["in_proj.weight"].T, 2, axis=1)
    taps = raw["conv1d.weight"][:, 0]
    padded = np.concatenate([np.zeros((taps.shape[1] - 1, x.shape[1])), x])
    x = silu(raw["conv1d.bias"] + sum(padded[j : j + time] * taps[:, j] for j in range(taps.shape[1])))
    logits = u @ raw["router.weight"].T
    best = np.argsort(-logits, axis=1)[:, :chosen]
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, best, np.exp(np.take_along_axis(logits, best, 1)), 1)
    gates = weights / weights.sum(1, keepdims=True)
    projected = np.stack([x @ raw[f"experts.{e}.x_proj.weight"].T for e in range(experts)])  # [X, T, R + 2N]
    B, C = projected[:, :, rank : rank + states], projected[:, :, rank + states :]
    each = [
        projected[e, :, :rank] @ raw[f"experts.{e}.dt_proj.weight"].T + raw[f"experts.{e}.dt_proj.bias"]
        for e in range(experts)
    ]
    delta = np.log1p(np.exp(np.einsum("te,etc->tc", gates, np.stack(each))))
    A = -np.exp(raw["A_log"])
    if fault == "unnormalised gates":
        gates = weights / np.exp(logits).sum(1, keepdims=True)  # softmax over all experts, not over the chosen ones
    y = raw["D"] * x
    for t in range(time):
        for s in range(t + 1):
            decay = np.exp(A * delta[s + 1 : t + 1].sum(0)[:, None])  # [E, N]
            read, wrote = (s, t) if fault == "swapped gates" else (t, s)
            for e in range(experts):
                for f in range(experts):
                    score = (decay * C[e, t] * B[f, s]).sum(1)
                    y[t] += gates[read, e] * gates[wrote, f] * score * delta[s] * x[s]
    return np.asarray((y * silu(z)) @ raw["out_proj.weight"].T, np.float64)


@pytest.fixture
def mixer() -> Mixer:
    found = next(random_model(SMALL).blocks)
    assert isinstance(found, Mixer)
    return found


@pytest.fixture
def raw(mixer: Mixer) -> dict[str, Array]:
    at = "backbone.layers.0.mixer."
    return {spec.name.removeprefix(at): mixer.parameter_of(spec).numpy() for spec in Mixer.own_specs(SMALL, 0)}


@pytest.fixture
def u() -> Tensor:
    return torch.randn(12, SMALL.hidden_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def of_mixer(mixer: Mixer, u: Tensor, form: ScanForm = "sequential") -> Array:
    state = {spec.name: spec.zeros(1, dtype=torch.float64) for spec in Mixer.states(SMALL, 0)}
    out, _ = mixer(u[None], state, Forward(scan=form))
    return np.asarray(out[0].numpy(), np.float64)


def test_the_mixer_is_the_sum_over_expert_pairs(mixer: Mixer, raw: dict[str, Array], u: Tensor) -> None:
    expected = explicit_sum(raw, u.numpy(), SMALL.ssm_chosen(0))
    for form in ("sequential", "chunked", "kernel"):
        assert np.abs(of_mixer(mixer, u, form) - expected).max() < bounds.REFERENCE_FLOAT64, form


@pytest.mark.parametrize("fault", ["swapped gates", "unnormalised gates"])
def test_the_sum_over_expert_pairs_notices_wrong_gates(
    mixer: Mixer, raw: dict[str, Array], u: Tensor, fault: str
) -> None:
    planted = explicit_sum(raw, u.numpy(), SMALL.ssm_chosen(0), fault)
    assert np.abs(of_mixer(mixer, u) - planted).max() > bounds.PLANTED_FAULT


def chosen_experts(model: MossNet, tokens: Tensor) -> dict[str, set[int]]:
    """Router name → the experts that some token chose."""
    seen: dict[str, set[int]] = {}

    def watch(name: str, routing: Routing) -> Routing:
        seen.setdefault(name, set()).update(routing.chosen.flatten().tolist())
        return routing

    model(tokens, run=Forward(scan="sequential", reroute=watch))
    return seen


@pytest.mark.parametrize("form", ["sequential", "chunked", "kernel"])
def test_an_expert_that_nobody_chose_has_no_effect(form: ScanForm) -> None:
    """Its weights may be NaN: it is not read, neither in the prompt nor in a step."""
    config = replace(SMALL, num_ssm_experts=7, num_mlp_experts=7)
    model, tokens = random_model(config), random_tokens(config, 1, 3)
    following = random_tokens(config, 1, 1, seed=9)
    expected, state = model(tokens, run=Forward(scan=form))
    expected_next, _ = model(following, state, run=Forward(scan="step"))
    used = chosen_experts(model, torch.cat([tokens, following], 1))
    spoiled = 0
    for spec in tensor_specs(config):
        router = f"layers.{spec.layer}.{'mlp' if spec.role.startswith('mlp.') else 'mixer'}.router"
        if ".expert." in spec.role and spec.expert not in used[router]:
            model.parameter_of(spec).fill_(float("nan"))
            spoiled += 1
    assert spoiled >= 12, "nothing was left unchosen"
    logits, state = model(tokens, run=Forward(scan=form))
    assert torch.equal(logits, expected)
    assert torch.equal(model(following, state, run=Forward(scan="step"))[0], expected_next)


@pytest.mark.parametrize("form", ["sequential", "chunked", "kernel"])
def test_the_order_of_the_experts_does_not_matter(form: ScanForm) -> None:
    """Experts permuted together with the rows of their router; their router alone must change the logits."""
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 33)
    expected, _ = model(tokens, run=Forward(scan=form))
    order = torch.tensor([2, 0, 3, 1])
    for parameter in of_experts(model, routers=True):
        parameter.copy_(parameter[order])
    assert difference(model(tokens, run=Forward(scan=form))[0], expected) < bounds.SAME_SUM_FLOAT64
    for parameter in of_experts(model, routers=False):
        parameter.copy_(parameter[order])
    assert difference(model(tokens, run=Forward(scan=form))[0], expected) > bounds.PLANTED_FAULT


def of_experts(model: MossNet, *, routers: bool) -> Iterator[torch.nn.Parameter]:
    """The parameters with a leading axis of experts, of both kinds."""
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in ("x_proj", "dt_proj", "dt_bias", "w1", "w2", "w3") or (routers and kind == "router"):
            yield parameter


@pytest.mark.parametrize("form", ["chunked", "kernel"])
@pytest.mark.parametrize("experts", [1, 4])
def test_the_training_form_has_the_same_values_and_gradients(form: ScanForm, experts: int) -> None:
    model = random_model(replace(SMALL, num_ssm_experts=experts)).requires_grad_(True)
    tokens = random_tokens(SMALL, 2, 33)
    weight = torch.randn(2, 33, SMALL.vocab_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def gradients(run: Forward) -> tuple[Tensor, list[Tensor]]:
        logits, _ = model(tokens, run=run)
        return logits, list(torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True))

    expected, expected_gradients = gradients(Forward(scan="sequential"))
    logits, found = gradients(Forward(scan=form, dense_ssm=True))
    assert difference(logits, expected) < bounds.FORMS_FLOAT64
    for (name, _), one, other in zip(model.named_parameters(), found, expected_gradients, strict=True):
        assert one is not None, name
        assert other is not None, name
        scale = float(other.abs().max())
        assert scale > 0, f"{name} gets no gradient"
        assert difference(one, other) < bounds.FORMS_FLOAT64 * max(1.0, scale), name


def test_activations_are_seen_by_every_linear() -> None:
    """The hook meets each weight under its checkpoint name: a target's arithmetic is modelled with it."""
    model, tokens = random_model(SMALL), random_tokens(SMALL, 4, 50)
    met: dict[str, int] = {}

    def activation(name: str, x: Tensor) -> Tensor:
        met[name] = x.shape[-1]
        return x

    expected, _ = model(tokens, run=Forward(scan="kernel"))
    logits, _ = model(tokens, run=Forward(scan="kernel", activation=activation))
    assert torch.equal(logits, expected)
    assert met == {spec.name: spec.shape[1] for spec in tensor_specs(SMALL) if spec.site is not None}


def test_a_reroute_replaces_the_decision() -> None:
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 20)

    def to_first(name: str, routing: Routing) -> Routing:
        return replace(routing, chosen=0 * routing.chosen[:, :1], gates=torch.ones_like(routing.gates[:, :1]))

    run = Forward(scan="kernel", reroute=to_first)
    rerouted, _ = model(tokens, run=run)
    for spec in tensor_specs(SMALL):
        if ".expert." in spec.role and spec.expert != 0:
            model.parameter_of(spec).fill_(float("nan"))
    assert torch.equal(model(tokens, run=run)[0], rerouted)
