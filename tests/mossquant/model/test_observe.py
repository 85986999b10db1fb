# SPDX-License-Identifier: Apache-2.0
"""What a pass shows and takes by name: inputs of linears and weights; gradients through rounded activations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, SMALL, Planned, difference, random_model, random_tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mossquant.checkpoint.inputs import activation_model, expert_input_model
from mossquant.formats.activations import get_activation_format
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, tensor_specs
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import load_recipe

FORMS = {"chosen": Forward(scan="chunked"), "dense": Forward(scan="chunked", dense_ssm=True)}


class Watched(TorchFunctionMode):
    """XᵀX of every F.linear, by the address of its weight: sees nothing of what the model shows."""

    def __init__(self) -> None:
        super().__init__()
        self.grams: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, at = args[0].reshape(-1, args[0].shape[-1]), args[1].data_ptr()
            self.grams[at] = self.grams.get(at, 0) + x.T @ x
        return func(*args, **(kwargs or {}))


class Grams:
    """XᵀX by tensor, of the rows that reach it."""

    def __init__(self, model: MossNet) -> None:
        self.columns = {spec.name: spec.matrix_shape[1] for spec in tensor_specs(model.config)}
        self.found: dict[str, Tensor] = {}

    def __call__(self, names: Sequence[str], x: Tensor, rows: Tensor | None, gates: Tensor | None, out: Tensor) -> None:
        assert rows is None or (len(names) == 1 and len(rows) == len(x))
        assert gates is None or gates.shape == (len(x), len(names))
        for i, name in enumerate(names):
            own = x if x.shape[1] == self.columns[name] else x[:, i * self.columns[name] : (i + 1) * self.columns[name]]
            own = own if gates is None else own[gates[:, i] > 0]
            self.found[name] = self.found.get(name, torch.zeros(())) + own.T @ own


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_shown_is_what_is_multiplied(kind: str) -> None:
    model, tokens = random_model(CONFIGS[kind]), random_tokens(CONFIGS[kind], 2, 40)
    grams, watched = Grams(model), Watched()
    with watched:
        expected, _ = model(tokens, run=FORMS["chosen"])
    shown, _ = model(tokens, run=replace(FORMS["chosen"], observe=grams))
    assert torch.equal(shown, expected)
    specs = [spec for spec in tensor_specs(model.config) if spec.site is not None]
    assert grams.found.keys() == {spec.name for spec in specs}
    for spec in specs:
        gram = grams.found[spec.name]
        assert difference(gram, watched.grams[model.parameter_of(spec).data_ptr()]) == 0, spec.name
        assert float(gram.abs().max()) > bounds.PLANTED_FAULT
    stacked = Grams(model)
    model(tokens, run=replace(FORMS["dense"], observe=stacked))
    assert stacked.found.keys() == grams.found.keys()
    for name, gram in stacked.found.items():
        assert difference(gram, grams.found[name]) <= bounds.FORMS_FLOAT64 * max(1.0, float(gram.abs().max())), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_is_replaced_by_its_name(form: str, kind: str) -> None:
    model, tokens = random_model(CONFIGS[kind]).requires_grad_(True), random_tokens(CONFIGS[kind], 1, 20)
    specs = {spec.name: spec for spec in tensor_specs(model.config)}
    factors = {name: 1 + (number + 1) / 1000 for number, name in enumerate(specs)}
    seen: set[str] = set()

    def weight(name: str, value: Tensor) -> Tensor:
        assert value.shape == specs[name].shape
        seen.add(name)
        return value * factors[name]

    logits, _ = model(tokens, run=replace(FORMS[form], weight=weight))
    assert seen == specs.keys()
    logits.square().sum().backward()  # type: ignore[no-untyped-call]
    other = random_model(CONFIGS[kind])
    for name, spec in specs.items():
        other.parameter_of(spec).mul_(factors[name])
    other.requires_grad_(True)
    expected, _ = other(tokens, run=FORMS[form])
    expected.square().sum().backward()
    assert difference(logits, expected) <= bounds.FORMS_FLOAT64
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            factor = one.detach() / two.detach()
            scale = max(1.0, float(two.grad.abs().max()))
            assert difference(one.grad * factor, two.grad) <= bounds.FORMS_FLOAT64 * scale * 10, name


_RECIPE = """version: 1
name: by-expert
targets: [torch]
weights:
  - {match: "*.experts.1.x_proj.weight", keep: fp32, why: "a test"}
  - {match: "*.experts.2.dt_proj.weight", format: int8}
  - {match: "*.experts.0.w2.weight", keep: fp32, why: "a test"}
  - {role: "*norm*", keep: fp32, why: "few bytes"}
  - {role: "*.router", keep: fp32, why: "few bytes"}
  - {role: "*", format: int4_g32}
activations:
  - {role: "*", format: FORMAT}
state:
  - {role: "*", format: fp32}
"""
CONFIG = replace(SMALL, time_step_rank=24)


def planned(tmp_path: Path, name: str) -> Planned:
    (tmp_path / "recipe.yaml").write_text(_RECIPE.replace("FORMAT", name))
    dtypes = {spec.name: torch.float32 for spec in tensor_specs(CONFIG)}
    return Planned(CONFIG, make_plan(CONFIG, dtypes, load_recipe(tmp_path / "recipe.yaml")))


@pytest.mark.parametrize("name", ["int8_row_asym", "int8_block"])
def test_planned_activations_can_be_trained_through(name: str, tmp_path: Path) -> None:
    plan, tokens = planned(tmp_path, name), random_tokens(CONFIG, 2, 30)
    rounding = {"activation": activation_model(plan), "expert_input": expert_input_model(plan)}
    exact, _ = random_model(CONFIG)(tokens, run=FORMS["chosen"])
    logits, gradients = {}, {}
    for form, run in FORMS.items():
        model = random_model(CONFIG)
        without, _ = model(tokens, run=replace(run, **rounding))
        model.requires_grad_(True)
        logits[form], _ = model(tokens, run=replace(run, **rounding))
        assert torch.equal(logits[form], without), "a gradient moves no value"
        logits[form].square().sum().backward()
        gradients[form] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert difference(logits["dense"], logits["chosen"]) <= bounds.FORMS_FLOAT32
    assert difference(logits["dense"], exact) >= bounds.PLANTED_FAULT
    for parameter, dense in gradients["dense"].items():
        chosen = gradients["chosen"][parameter]
        assert dense is not None
        assert chosen is not None
        scale = float(chosen.abs().max())
        assert scale > 0, f"{parameter} gets no gradient"
        assert difference(dense, chosen) <= bounds.FORMS_FLOAT32 * scale, parameter


@pytest.mark.parametrize("name", ["fp32", "int8_block", "int8_row_asym"])
def test_a_gradient_passes_straight_through(name: str) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = get_activation_format(name).apply(x, 32)
    assert torch.equal(rounded, get_activation_format(name).apply(x.detach(), 32))
    weight = torch.arange(120.0).view(3, 40)
    (rounded * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weight)
