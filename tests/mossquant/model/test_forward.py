# SPDX-License-Identifier: Apache-2.0
"""Sums over experts whose inputs a target rounds: one vector of neighbours, or each alone, against loops of scalars."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bounds import FORMS_FLOAT32, FORMS_FLOAT64, PLANTED_FAULT
from small import SMALL, Planned, difference
from torch import Tensor

from mossquant.checkpoint.inputs import activation_model, expert_input_model
from mossquant.errors import InputError
from mossquant.formats.activations import int8_row_asym
from mossquant.model.forward import GATED, OWN, ExpertInput, ExpertPart, Forward
from mossquant.model.mossnet import tensor_specs
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import load_recipe

ROWS, EXPERTS, CHOSEN, WIDTH, OUT = 6, 5, 2, 7, 4
NAMES = [f"experts.{e}" for e in range(EXPERTS)]
A, B = ExpertInput(gated=True, joined="a"), ExpertInput(gated=True, joined="b")


@pytest.fixture
def sums() -> tuple[Tensor, Tensor, Tensor]:
    """Gates [T, X], zero where an expert was not chosen; inputs [T, X, K]; weights [X, N, K]; float64."""
    generator = torch.Generator().manual_seed(0)
    gates = torch.zeros(ROWS, EXPERTS, dtype=torch.float64)
    for row in range(ROWS):
        # The fourth expert is chosen by nobody.
        chosen = torch.tensor([0, 1, 2, 4])[torch.randperm(4, generator=generator)[:CHOSEN]]
        gates[row, chosen] = torch.softmax(torch.randn(CHOSEN, generator=generator, dtype=torch.float64), 0)
    x = torch.randn(ROWS, EXPERTS, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    return gates, x, torch.randn(EXPERTS, OUT, WIDTH, generator=generator, dtype=torch.float64)


def summed(sums: tuple[Tensor, Tensor, Tensor], ways: Sequence[ExpertInput | None], default: ExpertInput) -> Tensor:
    gates, x, weights = sums
    parts = []
    for e, name in enumerate(NAMES):
        rows = gates[:, e].nonzero()[:, 0]
        if len(rows):
            parts.append(ExpertPart(e, rows, gates[rows, e, None], x[rows, e], weights[e], name))
    run = Forward(
        activation=lambda name, values: int8_row_asym(values),
        expert_input=dict(zip(NAMES, ways, strict=True)).__getitem__,
    )
    return run.sum_experts(parts, count=ROWS, names=NAMES, default=default)


def by_hand(sums: tuple[Tensor, Tensor, Tensor], vectors: Sequence[Sequence[int]]) -> Tensor:
    """Σ over vectors of experts, whose gated inputs are rounded side by side, one number at a time."""
    gates, x, weights = sums
    out = torch.zeros(ROWS, OUT, dtype=torch.float64)
    for row in range(ROWS):
        for experts in vectors:
            joined = [float(gates[row, e] * x[row, e, k]) for e in experts for k in range(WIDTH)]
            seen = int8_row_asym(torch.tensor([joined], dtype=torch.float64))[0].tolist()
            for i, e in enumerate(experts):
                for n in range(OUT):
                    out[row, n] += sum(float(weights[e, n, k]) * seen[i * WIDTH + k] for k in range(WIDTH))
    return out


WAYS: dict[str, tuple[list[ExpertInput | None], list[list[int]]]] = {
    "all joined": ([A] * EXPERTS, [[0, 1, 2, 3, 4]]),
    "each gated": ([GATED] * EXPERTS, [[0], [1], [2], [3], [4]]),
    "two vectors": ([A, A, B, B, B], [[0, 1], [2, 3, 4]]),
    "one alone between": ([A, A, GATED, A, A], [[0, 1], [2], [3, 4]]),
    "one that is not chosen between": ([A, A, A, GATED, A], [[0, 1, 2], [3], [4]]),
    "one that says nothing first": ([None, A, A, B, A], [[0], [1, 2], [3], [4]]),
}


@pytest.mark.parametrize("name", WAYS)
def test_rounded_as_the_target_lays_them_out(sums: tuple[Tensor, Tensor, Tensor], name: str) -> None:
    ways, vectors = WAYS[name]
    found = summed(sums, ways, GATED)
    assert difference(found, by_hand(sums, vectors)) <= FORMS_FLOAT64
    for other, (_, elsewhere) in WAYS.items():
        if other != name:
            assert difference(found, by_hand(sums, elsewhere)) >= PLANTED_FAULT, other


def test_a_gate_before_the_rounding_of_one_expert_changes_no_code(sums: tuple[Tensor, Tensor, Tensor]) -> None:
    gates, x, weights = sums
    seen = int8_row_asym(x)
    expected = sum(gates[:, e, None] * (seen[:, e] @ weights[e].T) for e in range(EXPERTS))
    found = summed(sums, [None] * EXPERTS, OWN)
    assert difference(found, torch.as_tensor(expected)) <= FORMS_FLOAT64
    assert 0 < difference(found, summed(sums, [GATED] * EXPERTS, OWN)) <= FORMS_FLOAT32


def test_nothing_is_rounded_without_a_model_of_the_activations(sums: tuple[Tensor, Tensor, Tensor]) -> None:
    gates, x, weights = sums
    rows = torch.arange(ROWS)
    parts = [ExpertPart(e, rows, gates[:, e, None], x[:, e], weights[e], NAMES[e]) for e in range(EXPERTS)]
    expected = torch.einsum("te,tek,enk->tn", gates, x, weights)
    for way in (OWN, GATED, A):
        found = Forward(expert_input=lambda name, way=way: way).sum_experts(parts, count=ROWS, names=NAMES, default=OWN)
        assert difference(found, expected) <= FORMS_FLOAT64


_RECIPE = """version: 1
name: by-expert
targets: [torch]
weights:
  - {match: "*.experts.0.w2.weight", keep: fp32, why: "a test"}
  - {match: "*.experts.1.w2.weight", format: int8}
  - {match: "*.experts.2.w2.weight", format: int4_g128}
  - {role: "*norm*", keep: fp32, why: "few bytes"}
  - {role: "*.router", keep: fp32, why: "few bytes"}
  - {role: "*", format: int4_g32}
activations:
  - {role: "*", format: int8_row_asym}
state:
  - {role: "*", format: fp32}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Planned:
    (tmp_path / "recipe.yaml").write_text(_RECIPE)
    config = replace(SMALL, mlp_intermediate_size=70)
    dtypes = {spec.name: torch.float32 for spec in tensor_specs(config)}
    return Planned(config, make_plan(config, dtypes, load_recipe(tmp_path / "recipe.yaml")))


def test_what_a_plan_rounds_together(plan: Planned) -> None:
    at, way = "backbone.layers.0.mlp.experts", expert_input_model(plan)
    assert way(f"{at}.0.w2.weight") is None
    assert way(f"{at}.1.w2.weight") == GATED
    assert way(f"{at}.2.w2.weight") == ExpertInput(gated=True, joined="int4_g128")
    assert way(f"{at}.3.w2.weight") == ExpertInput(gated=True, joined="int4_g32")


@pytest.mark.parametrize("name", ["int8_block", "fp32"])
def test_formats_whose_targets_join_nothing(plan: Planned, name: str) -> None:
    way = expert_input_model(plan, name)
    assert all(way(f"backbone.layers.0.mlp.experts.{e}.w2.weight") is None for e in range(4))


def test_an_unknown_format(plan: Planned) -> None:
    for model in (activation_model, expert_input_model):
        with pytest.raises(InputError, match="unknown activation format 'int7'"):
            model(plan, "int7")
