# SPDX-License-Identifier: Apache-2.0
"""Formats in which a recurrent state is carried, modelled: h [B, E, N] after a token → the values that are carried on.

    fp32   h
    fp16   q = the spacing of fp16 at |h|, 2⁻²⁴ at least;   value = ⌊h / q + u⌋ · q, at most ±65504
    int8   per channel, over its N values:  s = max|h| / 127;   value = ⌊h · (127 / max|h|) + u⌋ · s

Once a token, after that token's output was computed. u in [0, 1) is a hash of (token, channel, index), the same on
every machine: stochastic rounding, whose mean over u is h itself. Rounded to nearest, a state with decay 0.999 stalls:
a token moves it by a thousandth of the way that it still has to go, which is less than half a step for the last 500.

The token is its index since the state began, the channel its row of the state of one stream, the same for all streams
and arrays. Tokens come in pairs: the first draws u from a hash of (pair, channel, index), the second takes 1 − 2⁻ᵇ − u,
b the bits of u, as evenly distributed (antithetic variates, Hammersley & Morton 1956): what the first rounded up the
second rounds down, and a slow state, which adds up the errors of many tokens, keeps half as much of them. The hash is
Wellons' `hash-prospector` mixer of 32 bits; its upper bits are u, as many as fp32 has below the steps of the format, so
that a value that is a code stays that code. Gradients pass straight through.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from mossquant.errors import InputError
from mossquant.formats.activations import straight_through

_WORD = (1 << 32) - 1
_FP16_MAX = 65504.0
_FP16_DIGITS, _FP16_LEAST = 11, -24
"""Significant bits of fp16, and the exponent of its smallest step."""
_LEAST_DIVISOR = 2.0**-119
"""127 / this is finite in fp32; a channel that is smaller has few codes, and one of zeros has none."""
_FP16_DRAWN, _INT8_DRAWN = 24 - _FP16_DIGITS, 24 - 7
"""Bits of u: what fp32 has beside those of a code."""

_Number = TypeVar("_Number", int, Tensor)


def _mixed(value: _Number) -> _Number:
    """32 bits → 32 bits; both multipliers lie below 2³¹, so that no product of int64 overflows."""
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _WORD
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _WORD
    return value ^ (value >> 15)


@lru_cache(maxsize=16)
def _places(channels: int, width: int, device: torch.device) -> Tensor:
    """A hash of (channel, index), int64 [channels, width]."""
    rows = _mixed(torch.arange(channels, device=device) + 1)
    return _mixed(rows[:, None] ^ torch.arange(width, device=device))


@lru_cache(maxsize=4)  # both tokens of a pair take it
def _first_drawn(pair: int, channels: int, width: int, bits: int, device: torch.device) -> Tensor:
    """u of the first token of a pair, fp32 [channels, width]."""
    at = _mixed(_mixed(pair >> 32) ^ (pair & _WORD))
    mixed = _mixed(_places(channels, width, device) ^ at)
    values: Tensor = (mixed >> (32 - bits)).float() * 2.0**-bits
    return values


def drawn(token: int, channels: int, width: int, *, bits: int, device: torch.device | None = None) -> Tensor:
    """u of every value at one token: fp32 [channels, width], multiples of 2^−bits in [0, 1)."""
    pair, second = divmod(token, 2)
    first = _first_drawn(pair, channels, width, bits, device or torch.device("cpu"))
    return (1 - 2.0**-bits) - first if second else first


def _drawn_for(value: Tensor, token: int, bits: int) -> Tensor:
    """u in the shape of value [B, …, N] without its batch axis."""
    shape = value.shape[1:]
    return drawn(token, math.prod(shape[:-1]), shape[-1], bits=bits, device=value.device).view(shape)


def fp16_step(value: Tensor) -> Tensor:
    """The spacing of fp16 at each value, fp32."""
    exact = value.float()
    exponent = torch.frexp(exact).exponent - _FP16_DIGITS
    return torch.ldexp(torch.ones_like(exact), exponent.clamp(min=_FP16_LEAST))


def fp16(value: Tensor, token: int) -> Tensor:
    """value [B, …, N] as fp16 carries it; same shape and type."""
    exact, step = value.float(), fp16_step(value)
    rounded: Tensor = torch.floor(exact / step + _drawn_for(value, token, _FP16_DRAWN)) * step
    return rounded.clamp(-_FP16_MAX, _FP16_MAX).to(value.dtype)


def int8_step(value: Tensor) -> Tensor:
    """The scale of each value's channel, fp32 [B, …, N]."""
    largest: Tensor = torch.linalg.vector_norm(value.float(), torch.inf, -1, keepdim=True)
    return (largest / 127).expand(value.shape)


def int8(value: Tensor, token: int) -> Tensor:
    """value [B, …, N] as int8 codes with one scale a channel carry it; same shape and type."""
    exact = value.float()
    largest: Tensor = torch.linalg.vector_norm(exact, torch.inf, -1, keepdim=True)
    reciprocal = 127 / largest.clamp(min=_LEAST_DIVISOR)
    codes: Tensor = torch.floor(exact * reciprocal + _drawn_for(value, token, _INT8_DRAWN)).clamp(-127, 127)
    return (codes * (largest / 127)).to(value.dtype)


@dataclass(frozen=True)
class StateFormat:
    """A format of recurrent state arrays.

    Attributes:
        name: the name used in recipes, plans and reports.
        bits: of a value.
        scaled: whether a channel has a scale in fp32.
        rounding: (value [B, …, N], token) → the values that are carried; None where they are carried as they are.
        step: value [B, …, N] → how far apart the values are between which each is rounded; None like `rounding`.
    """

    name: str
    bits: int
    scaled: bool
    rounding: Callable[[Tensor, int], Tensor] | None
    step: Callable[[Tensor], Tensor] | None = None

    def apply(self, value: Tensor, token: int) -> Tensor:
        """value [B, …, N] after the token of that index, as it is carried; gradients straight through."""
        rounding = self.rounding
        if rounding is None or value.numel() == 0:
            return value
        return straight_through(value, lambda exact: rounding(exact, token))

    def bytes(self, shape: Sequence[int]) -> int:
        """Of an array of one stream."""
        return math.prod(shape) * self.bits // 8 + (4 * math.prod(shape[:-1]) if self.scaled else 0)


STATE_FORMATS: dict[str, StateFormat] = {
    known.name: known
    for known in (
        StateFormat("fp32", 32, False, None),
        StateFormat("fp16", 16, False, fp16, fp16_step),
        StateFormat("int8", 8, True, int8, int8_step),
    )
}
"""Every state format, by the name that recipes use."""


def get_state_format(name: str) -> StateFormat:
    """The state format of that name.

    Raises:
        InputError: no such format; the known names are listed.
    """
    if name not in STATE_FORMATS:
        raise InputError.unknown("state format", name, STATE_FORMATS)
    return STATE_FORMATS[name]
