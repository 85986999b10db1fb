# SPDX-License-Identifier: Apache-2.0
"""The selective scan of Mamba (Gu & Dao 2023, Algorithm 2) and the causal convolution before it, in plain PyTorch.

    Δ = softplus(dt)
    h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) ⊗ B_t          (Euler discretisation of B, as in the Mamba code)
    y_t = h_t C_t + D ⊙ x_t

Every form has one signature: x, dt [B, T, E], A [E, N], Bm, Cm [B, T, N], D [E], h [B, E, N] → y [B, T, E] and the h
after the last token.
`mossquant.kernels` holds the fused form with its own backward.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.kernels.scan.autograd import selective_scan as scan_kernel

ScanForm = Literal["sequential", "chunked", "kernel", "step"]
RoundState = Callable[[Tensor, int], Tensor]
"""(a state array [B, …] after a token, that token's index since the state began) → what is carried on."""
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

CHUNK = 32
"""Tokens that the chunked form advances at once: log2(32) = 5 passes over [B, 32, E, N]."""


def softplus(dt: Tensor) -> Tensor:
    """log(1 + exp(dt)); above the threshold dt itself, where the difference, exp(−dt), is less than half a rounding."""
    return F.softplus(dt, threshold=40) if dt.dtype == torch.float64 else F.softplus(dt)


def scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor,
    h: Tensor,
    *,
    rounding: RoundState | None = None,
    position: int = 0,
) -> tuple[Tensor, Tensor]:
    """The reference: one token after the other, in any float type.

    With `rounding` h is rounded after each token, the first of which has the index `position`; y_t is computed before.
    A token's arithmetic is the same, to the bit, however many are given.
    """
    rows = []
    for t in range(x.shape[1]):
        delta = softplus(dt[:, t].contiguous())  # other strides would take another loop, with other roundings
        h = torch.exp(delta[..., None] * A) * h + (delta * x[:, t])[..., None] * Bm[:, t, None, :]
        rows.append((h * Cm[:, t, None, :]).sum(-1))
        if rounding is not None:
            h = rounding(h, position + t)
    y = torch.stack(rows, 1) if rows else torch.zeros_like(x)
    return y + D * x, h


def scan_chunked(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks of 32 tokens advanced in parallel by Hillis and Steele's prefix sum (1986), with autograd.

    Only decays are multiplied with one another, each at most 1, so that nothing overflows however long Δ A is.
    """
    delta = softplus(dt)
    out = []
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        decay = torch.exp(delta[:, part, :, None] * A)
        value = (delta[:, part] * x[:, part])[..., None] * Bm[:, part, None, :]
        value = torch.cat([value[:, :1] + decay[:, :1] * h[:, None], value[:, 1:]], 1)
        reach = 1
        while reach < value.shape[1]:
            value = torch.cat([value[:, :reach], value[:, reach:] + decay[:, reach:] * value[:, :-reach]], 1)
            decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
            reach *= 2
        out.append((value * Cm[:, part, None, :]).sum(-1))
        h = value[:, -1]
    y = torch.cat(out, 1) if out else torch.zeros_like(x)
    return y + D * x, h


def scan_step(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token (T = 1)."""
    delta = softplus(dt)
    h = torch.exp(delta.transpose(1, 2) * A) * h + (delta * x).transpose(1, 2) * Bm
    return torch.matmul(h, Cm.transpose(1, 2)).transpose(1, 2) + D * x, h


SCANS: dict[ScanForm, Scan] = {
    "sequential": scan_sequential,
    "chunked": scan_chunked,
    "kernel": scan_kernel,
    "step": scan_step,
}
"""The scan of each form."""


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU of the causal depthwise convolution.

    Args:
        x: [B, T, E].
        weight: [E, W]; weight[:, W−1] meets the current input.
        bias: [E].
        window: [B, E, W−1], the inputs before x, oldest first.

    Returns:
        [B, T, E], and the window after the last token.
    """
    padded = torch.cat([window.transpose(1, 2), x], 1)
    length = x.shape[1]
    total = bias + padded[:, :length] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        total = total + padded[:, tap : tap + length] * weight[:, tap]
    # A copy: a view would keep the whole text in memory for as long as the state lives.
    return F.silu(total), padded[:, length:].transpose(1, 2).clone(memory_format=torch.contiguous_format)


def conv_rounded(
    x: Tensor, weight: Tensor, bias: Tensor, window: Tensor, *, rounding: RoundState, position: int
) -> tuple[Tensor, Tensor]:
    """`causal_conv` one token after the other, the window rounded after each, the first of which is at `position`."""
    rows = []
    for t in range(x.shape[1]):
        row, window = conv_step(x[:, t : t + 1], weight, bias, window)
        window = rounding(window, position + t)
        rows.append(row)
    return torch.cat(rows, 1), window


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv` for one token (T = 1): a dot product with the window."""
    full = torch.cat([window, x.transpose(1, 2)], 2)
    return F.silu((full * weight).sum(-1) + bias).unsqueeze(1), full[:, :, 1:]
