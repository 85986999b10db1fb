# SPDX-License-Identifier: Apache-2.0
"""The student computes with exactly what is stored, starts as what was solved, passes gradients through."""

from dataclasses import replace
from pathlib import Path

import bounds
import pytest
import torch
from small import CONFIGS, difference, random_tokens
from solved import Solved, solved
from torch import Tensor

from mossquant.calibration.student import FakeQuantize, Planned, Stored, Student
from mossquant.checkpoint.weights import value
from mossquant.formats import FORMATS, QuantizedTensor
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.tensors import TensorSpec


def stored_model(case: Solved, tensors: dict[str, Stored]) -> MossNet:
    """The model of what is stored, in float64."""
    planned = Planned(case.weights, case.plan, tensors)
    return MossNet(case.weights.config, dtype=torch.float64).load(lambda name: value(planned, name))


def moved(student: Student) -> None:
    """Every parameter somewhere else."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for kind, size in (("codes", 2.0), ("small", 2.0), ("scales", 0.1), ("kept", 0.1)):
            for parameter in student.groups[kind]:
                live = parameter != 0 if kind in ("codes", "small") else torch.ones_like(parameter)
                parameter += size * live * torch.randn(parameter.shape, generator=generator)
    student.stay_in_range()


@pytest.mark.parametrize("recipe", ["int4-uniform", "int8-uniform"])
@pytest.mark.parametrize("config", CONFIGS)
def test_computes_with_what_is_stored(config: str, recipe: str, tmp_path: Path) -> None:
    case = solved(tmp_path / "model", CONFIGS[config], recipe=recipe)
    student = Student(case.weights, case.plan, case.tensors, codes=True)
    moved(student)
    student.refresh()
    seen: dict[str, Tensor] = {}

    def shown(names: list[str], parameter: Tensor) -> Tensor:
        made = student.parameter(names, parameter)
        seen.update({name: made if len(names) == 1 else made[index] for index, name in enumerate(names)})
        return made

    tokens = random_tokens(CONFIGS[config], 2, 9)
    shell = MossNet(case.weights.config).load(lambda name: value(case.weights, name))
    logits, _ = shell(tokens, run=Forward(dense_ssm=True, parameter=shown))  # type: ignore[arg-type]
    tensors = student.tensors()
    expected, _ = stored_model(case, tensors)(tokens)
    assert difference(logits.double(), expected) < bounds.FORMS_FLOAT32
    planned = Planned(case.weights, case.plan, tensors)
    assert set(seen) == set(tensors) == set(case.weights.specs)
    for name, made in seen.items():
        assert torch.equal(made.flatten(), value(planned, name).flatten())


@pytest.mark.parametrize("rounded", [0, 1])
def test_starts_as_what_was_solved(rounded: int, tmp_path: Path) -> None:
    case = solved(tmp_path / "model", CONFIGS["experts"], rounded=rounded)
    student = Student(case.weights, case.plan, case.tensors, codes=True)
    for name, stored in student.tensors().items():
        if isinstance(stored, QuantizedTensor):
            assert torch.equal(stored.codes, case.tensors[name].codes)
            assert torch.equal(stored.scales, case.tensors[name].scales)
            assert stored.scales.dtype == stored.format.scale_dtype
        else:
            assert torch.equal(stored, case.weights.kept(name).float())


def test_tensors_stored_alike_are_one_parameter(tmp_path: Path) -> None:
    """Experts of one role in two formats: each keeps its own."""
    case = solved(tmp_path / "model", CONFIGS["experts"])
    name = "backbone.layers.0.mlp.experts.2.w1.weight"
    entries = [replace(e, format=None, kept="float32") if e.name == name else e for e in case.plan.tensors]
    case = replace(case, plan=replace(case.plan, tensors=tuple(entries)))
    del case.tensors[name]
    student = Student(case.weights, case.plan, case.tensors, codes=True)
    tensors = student.tensors()
    assert torch.equal(tensors[name], case.weights.kept(name))  # type: ignore[arg-type]
    student.refresh()
    shell = MossNet(case.weights.config).load(lambda name: value(case.weights, name))
    tokens = random_tokens(CONFIGS["experts"], 1, 7)
    logits, _ = shell(tokens, run=Forward(parameter=student.parameter))
    assert difference(logits.double(), stored_model(case, tensors)(tokens)[0]) < bounds.FORMS_FLOAT32


@pytest.mark.parametrize("number_format", FORMATS.values(), ids=str)
def test_gradients_against_a_slow_form(number_format: object, tmp_path: Path) -> None:
    """Straight-through by PyTorch's own operations, a group at a time."""
    del tmp_path
    number_format = FORMATS[number_format.name]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    u = 3 * torch.randn(3, 2, 8, generator=generator)
    r = 0.1 * torch.randn(3, 2, generator=generator)
    scales = torch.rand(3, 2, generator=generator) + 0.5
    weight = torch.randn(3, 2, 8, generator=generator)
    u.requires_grad_()
    r.requires_grad_()
    made = FakeQuantize.apply(u, r, scales, number_format)  # type: ignore[no-untyped-call]
    (made.sin() * weight).sum().backward()
    slow_u, slow_r = u.detach().clone().requires_grad_(), r.detach().clone().requires_grad_()
    total = torch.zeros(())
    for n in range(3):
        for g in range(2):
            code = slow_u[n, g] + (slow_u[n, g].round() - slow_u[n, g]).detach()
            exact = scales[n, g] * slow_r[n, g].exp()
            scale = exact * (exact.to(number_format.scale_dtype).float() / exact).detach()
            total = total + ((code * scale).sin() * weight[n, g]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert u.grad is not None
    assert r.grad is not None
    assert slow_u.grad is not None
    assert slow_r.grad is not None
    assert difference(u.grad, slow_u.grad) < bounds.STRAIGHT_THROUGH
    assert difference(r.grad, slow_r.grad) < bounds.STRAIGHT_THROUGH


def test_padding_and_outermost_codes_stay(tmp_path: Path) -> None:
    case = solved(tmp_path / "model", CONFIGS["experts"])
    student = Student(case.weights, case.plan, case.tensors, codes=True)
    moved(student)
    for stored in student.tensors().values():
        if isinstance(stored, QuantizedTensor):
            assert int(stored.codes.min()) >= stored.format.code_min
            assert int(stored.codes.max()) <= stored.format.code_max
            assert not stored.codes[:, stored.columns :].any()


def test_planned_says_what_is_wrong(tmp_path: Path) -> None:
    case = solved(tmp_path / "model", CONFIGS["mamba"])
    planned = Planned(case.weights, case.plan, case.tensors)
    specs: dict[str, TensorSpec] = dict(planned.specs)
    for name in specs:
        with pytest.raises(ValueError, match="is not"):
            (planned.kept if planned.format(name) is not None else planned.quantized)(name)
