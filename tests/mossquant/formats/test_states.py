# SPDX-License-Identifier: Apache-2.0
"""Rounded states against scalar arithmetic, what rounding does in the mean, and where a state comes to rest."""

import math
from collections.abc import Callable

import bounds
import numpy as np
import pytest
import torch
from torch import Tensor

from mossquant.errors import InputError
from mossquant.formats.states import STATE_FORMATS, drawn, get_state_format

ROUNDED = ("fp16", "int8")
FINER = {"fp16": 13, "int8": 17}
"""Bits of what is drawn for a rounding."""
DRAWN = [[36697, 63502], [64456, 5951], [27549, 51281]]


def _mix(value: int) -> int:
    value = (value ^ value >> 16) * 0x21F0AAAD % 2**32
    value = (value ^ value >> 15) * 0x735A2D97 % 2**32
    return value ^ value >> 15


def _u(token: int, channel: int, index: int, bits: int) -> float:
    place, pair = _mix(_mix(channel + 1) ^ index), token // 2
    u = (_mix(place ^ _mix(_mix(pair >> 32) ^ pair % 2**32)) >> (32 - bits)) / 2**bits
    return 1 - 2**-bits - u if token % 2 else u


def _scalar(name: str, row: list[float], token: int, channel: int) -> list[float]:
    """One channel, one number at a time, in numpy's float32."""
    largest = np.float32(max(abs(value) for value in row))
    found = []
    for index, number in enumerate(row):
        u, value = np.float32(_u(token, channel, index, FINER[name])), np.float32(number)
        if name == "int8":
            code = math.floor(value * (np.float32(127) / largest) + u)
            found.append(float(np.float32(min(code, 127)) * (largest / np.float32(127))))
        else:
            step = np.float32(2.0 ** max(math.frexp(number)[1] - 11, -24))
            found.append(float(np.float32(math.floor(value / step + u)) * step))
    return found


def _states(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(*shape[:-1], 1, generator=generator))


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("token", [0, 1, 32_767, 5 * 2**32 + 3])
def test_every_value_is_what_scalar_arithmetic_gives(name: str, token: int) -> None:
    state = _states(2, 7, 5)
    found = STATE_FORMATS[name].apply(state, token)
    for stream in range(2):
        for channel in range(7):
            row = _scalar(name, state[stream, channel].tolist(), token, channel)
            assert found[stream, channel].tolist() == row
    twice = STATE_FORMATS[name].apply(state.double(), token)
    assert twice.dtype == torch.float64
    assert twice.tolist() == found.double().tolist()


def test_what_is_drawn_is_the_same_everywhere() -> None:
    """Written down once: another machine, or another release, must draw the same."""
    assert (drawn(12345, 3, 2, bits=16) * 2**16).int().tolist() == DRAWN
    assert torch.equal(drawn(12344, 3, 2, bits=16) + drawn(12345, 3, 2, bits=16), torch.full((3, 2), 1 - 2.0**-16))
    whole = torch.stack([drawn(token, 32, 16, bits=16) for token in range(0, 4000, 2)])
    sigma = 1 / math.sqrt(12 * whole.numel())
    assert abs(float(whole.mean()) - 0.5) < bounds.DRAWN_SIGMAS * sigma
    centred = (whole - 0.5) * math.sqrt(12)
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[..., 1:] * centred[..., :-1]):
        assert abs(float(shifted.mean())) < bounds.DRAWN_SIGMAS / math.sqrt(shifted.numel())


@pytest.mark.parametrize("name", ROUNDED)
def test_the_mean_over_tokens_is_the_value(name: str) -> None:
    state, tokens = _states(1, 16, 8), 1000
    off = torch.stack([STATE_FORMATS[name].apply(state, token) - state for token in range(tokens)]).double()
    largest = state.abs().amax(-1, keepdim=True)
    step = largest / 127 if name == "int8" else state.abs() * 2.0**-10 + 2.0**-24
    assert bool((off.abs() <= step * (1 + bounds.CODE_ROUNDING)).all())
    assert bool((off.mean(0).abs() <= bounds.DRAWN_SIGMAS * step / math.sqrt(4 * tokens)).all())


@pytest.mark.parametrize("name", ROUNDED)
def test_what_a_format_holds_stays(name: str) -> None:
    state = _states(1, 16, 8)
    held = STATE_FORMATS[name].apply(state, 3)
    if name == "int8":  # scales that are powers of two, so that no quotient is rounded below its code
        largest = held.abs().amax(-1, keepdim=True)
        assert (held.abs().amax(-1) / state.abs().amax(-1) - 1).abs().max() < bounds.SUM_ROUNDING
        held = torch.round(held / largest * 127) * torch.exp2(torch.round(torch.log2(largest)))
    for token in range(50):
        assert torch.equal(STATE_FORMATS[name].apply(held, token), held)


@pytest.mark.parametrize("name", ROUNDED)
def test_nothing_zero_small_large_and_lost(name: str) -> None:
    rounded = STATE_FORMATS[name]
    assert not rounded.apply(torch.zeros(2, 3, 4), 7).any()
    assert rounded.apply(torch.zeros(2, 3, 0), 7).shape == (2, 3, 0)
    extreme = torch.tensor([[[1e30, -3e38, 1e-40, 2e-8], [1e-42, -1e-45, 0, 0]]])
    assert bool(torch.isfinite(rounded.apply(extreme, 1)).all())
    assert bool(rounded.apply(torch.tensor([[[1.0, float("nan")]]]), 1).isnan().any())
    if name == "fp16":
        assert rounded.apply(extreme, 1)[0, 0, :2].tolist() == [65504, -65504]
        values = _states(1, 50, 20, seed=4)
        assert torch.equal(rounded.apply(values, 9).half().float(), rounded.apply(values, 9))


def test_gradients_pass_straight_through() -> None:
    state = _states(1, 3, 4).requires_grad_()
    STATE_FORMATS["int8"].apply(state, 2).square().sum().backward()
    assert state.grad is not None
    assert torch.equal(state.grad, 2 * STATE_FORMATS["int8"].apply(state.detach(), 2))


def test_bytes_and_names() -> None:
    assert [known.bytes((20, 16)) for known in STATE_FORMATS.values()] == [1280, 640, 320 + 80]
    assert get_state_format("fp32").apply(state := _states(1, 2, 3), 0) is state
    with pytest.raises(InputError, match="unknown state format 'int9'"):
        get_state_format("int9")


def _steady(rounding: Callable[[Tensor, int], Tensor], ends: Tensor, begin: Tensor) -> float:
    """How far a state [1, E, N] lies off `ends` after 8,000 tokens of a constant input with decay 0.999."""
    state = begin
    for token in range(8_000):
        state = rounding(0.999 * state + 0.001 * ends, token)
    return float((state - ends).abs().max())


def _ends() -> Tensor:
    """Where states tend: one of each channel's to 1, the others to parts of it."""
    return torch.tensor([1, 0.45, 0.2, 0.1, 0.04, 0.013, 0.003, 0.0007]).expand(1, 6, 8)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("held", [True, False], ids=["beside a large value", "from zero"])
def test_a_small_constant_input_gets_where_it_goes(name: str, held: bool) -> None:
    begin = torch.zeros(1, 6, 8)
    begin[..., 0] = float(held)
    assert _steady(STATE_FORMATS[name].apply, _ends(), begin) < bounds.STATE_STEADY


def test_rounding_to_nearest_would_not() -> None:
    def nearest(state: Tensor, token: int) -> Tensor:
        scale = state.abs().amax(-1, keepdim=True) / 127
        return torch.round(state / scale) * scale

    begin = torch.zeros(1, 6, 8)
    begin[..., 0] = 1
    assert _steady(nearest, _ends(), begin) > bounds.STATE_STALLS
    assert _steady(lambda state, token: state.half().float(), _ends(), torch.zeros(1, 6, 8)) > bounds.STATE_STALLS
