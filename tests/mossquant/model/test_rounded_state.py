# SPDX-License-Identifier: Apache-2.0
"""A pass whose states are rounded after every token: the roundings are where they belong, and pieces change nothing."""

from dataclasses import replace

import pytest
import torch
from bounds import FORMS_FLOAT64
from small import CONFIGS, difference, random_model, random_tokens
from torch import Tensor

from mossquant.formats.states import STATE_FORMATS
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, state_specs
from mossquant.model.scan import RoundState, ScanForm, conv_rounded, conv_step, scan_sequential


def _scan_inputs(time: int, *, E: int = 11, N: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequences = [normal(2, time, E), 3 * normal(2, time, E) - 2], [normal(2, time, N), normal(2, time, N)]
    return [*sequences[0], -torch.exp(normal(E, N)), *sequences[1], normal(E), normal(2, E, N)]


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_one_scan_equals_many_bit_for_bit(name: str) -> None:
    x, dt, A, Bm, Cm, D, h = _scan_inputs(40)
    rounding = STATE_FORMATS[name].apply
    whole, end = scan_sequential(x, dt, A, Bm, Cm, D, h, rounding=rounding, position=100)
    parts, start = [], 0
    for stop in (1, 2, 17, 18, 40):
        piece = [values[:, start:stop] for values in (x, dt, Bm, Cm)]
        arguments = piece[0], piece[1], A, piece[2], piece[3], D, h
        y, h = scan_sequential(*arguments, rounding=rounding, position=100 + start)
        parts.append(y)
        start = stop
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(h, end)
    other, _ = scan_sequential(x, dt, A, Bm, Cm, D, _scan_inputs(40)[-1], rounding=rounding, position=101)
    assert not torch.equal(other, whole), "the position does not matter"


def test_the_output_is_computed_before_the_state_is_rounded() -> None:
    arguments = _scan_inputs(1)
    exact, h = scan_sequential(*arguments)
    y, rounded = scan_sequential(*arguments, rounding=STATE_FORMATS["int8"].apply, position=3)
    assert torch.equal(y, exact)
    assert torch.equal(rounded, STATE_FORMATS["int8"].apply(h, 3))


def test_a_window_is_rounded_after_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 6, generator=generator), torch.randn(6, 4, generator=generator)
    bias, window = torch.randn(6, generator=generator), torch.zeros(2, 6, 3)
    rounding = STATE_FORMATS["int8"].apply
    found, end = conv_rounded(x, weight, bias, window, rounding=rounding, position=5)
    for t in range(9):
        row, window = conv_step(x[:, t : t + 1], weight, bias, window)
        assert torch.equal(found[:, t : t + 1], row)
        window = rounding(window, 5 + t)
    assert torch.equal(end, window)


def _rounded(model: MossNet, name: str, role: str = "*") -> Forward:
    rounds: dict[str, RoundState] = {
        spec.name: STATE_FORMATS[name].apply for spec in state_specs(model.config) if role in ("*", spec.role)
    }
    return Forward(state=rounds.get)


@pytest.mark.parametrize("name", ["experts", "mamba", "untied"])
@pytest.mark.parametrize("scan", ["sequential", "chunked", "kernel"])
def test_pieces_and_forms_change_nothing(name: str, scan: ScanForm) -> None:
    """In float64, where other orders of sums are too small to move a code."""
    model = random_model(CONFIGS[name])
    tokens, run = random_tokens(CONFIGS[name], 2, 23), replace(_rounded(model, "int8"), scan=scan)
    whole, end = model(tokens, run=run)
    state, parts = model.initial_state(2), []
    for start, stop in ((0, 1), (1, 2), (2, 13), (13, 23)):
        piece = replace(run.step() if stop - start == 1 else run, position=start)
        logits, state = model(tokens[:, start:stop], state, run=piece)
        parts.append(logits)
    assert difference(torch.cat(parts, 1), whole) < FORMS_FLOAT64
    assert all(difference(state[key], end[key]) < FORMS_FLOAT64 for key in end)
    exact, _ = model(tokens, run=Forward(scan=scan))
    assert difference(exact, whole) > FORMS_FLOAT64


def test_only_the_states_that_are_named_are_rounded() -> None:
    model = random_model(CONFIGS["experts"])
    tokens = random_tokens(CONFIGS["experts"], 1, 12)
    _, state = model(tokens, run=_rounded(model, "fp16", "ssm.ssm_state"))
    in_half = {name: torch.equal(value.half().to(value.dtype), value) for name, value in state.items()}
    assert in_half == {spec.name: spec.role == "ssm.ssm_state" for spec in state_specs(model.config)}
    assert all(torch.equal(a, b) for a, b in zip(model(tokens)[0], model(tokens, run=Forward())[0], strict=True))
