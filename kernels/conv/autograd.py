# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution followed by SiLU, as a differentiable PyTorch function on the CPU.

    y_t[e] = silu(bias[e] + sum_w weight[e,w] x_{t-(W-1)+w}[e])

B batch, T time, E channels (d_inner), W conv width. No arithmetic here: the kernels are in C++ (`conv.h`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossquant.kernels import _native
from mossquant.kernels.tensors import array, maybe_array, prepare, thread_count

__all__ = ["causal_conv"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Tensor | None = None,
    *,
    threads: int | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve over time and apply SiLU; differentiable once, with respect to every input.

    The result does not depend on the number of threads, to the bit. Inputs are all float64, or any mix of float32,
    bfloat16 and float16, which is computed in float32.

    Args:
        x: [B, T, E].
        weight: [E, W]; the last column meets the newest input.
        bias: [E].
        window: [B, E, W-1], the inputs before the first step, oldest first; None: zeros.
        threads: at most so many; None: as many as PyTorch uses.
        kernel: the kernel's name, one of `mossquant.kernels.available("conv")`; None: the best this machine can run.

    Returns:
        y [B, T, E] in the dtype of x, and the new window [B, E, W-1], the last W-1 of the inputs so far, in float32 or
        float64.

    Raises:
        ValueError: a wrong shape, dtype or device, no thread, or a kernel this machine cannot run.
    """
    inputs = {"x": x, "weight": weight, "bias": bias, "window": window}
    # Casts and copies stay outside the Function, so that autograd takes their gradients back to the caller's tensors.
    ready = prepare("causal_conv", inputs)
    y, new_window = _CausalConv.apply(*ready, thread_count(threads), kernel)  # type: ignore[no-untyped-call]
    return y.to(x.dtype), new_window


class _CausalConv(torch.autograd.Function):
    """The kernels on contiguous tensors of one dtype. Keeps the inputs only; the backward convolves once more."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, window: Tensor | None, threads: int, kernel: str | None
    ) -> tuple[Tensor, Tensor]:
        # Wrong numbers of dimensions are reported by the kernel; here they only must not get in the way.
        channels, width = (*weight.shape, 0, 0)[:2]
        y = torch.empty_like(x)
        new_window = x.new_empty((*x.shape, 0)[0], channels, max(width - 1, 0))
        _native.conv_forward(
            array(x),
            array(weight),
            array(bias),
            maybe_array(window),
            y=array(y),
            new_window=array(new_window),
            threads=threads,
            kernel=kernel,
        )
        ctx.save_for_backward(x, weight, bias, window)
        ctx.threads, ctx.kernel = threads, kernel
        ctx.set_materialize_grads(False)
        return y, new_window

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dnew_window: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, window = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dnew_window = None if dnew_window is None else dnew_window.contiguous()
        dx, dweight, dbias = (torch.empty_like(tensor) for tensor in (x, weight, bias))
        dwindow = x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)
        _native.conv_backward(
            array(x),
            array(weight),
            array(bias),
            maybe_array(window),
            array(dy),
            maybe_array(dnew_window),
            dx=array(dx),
            dweight=array(dweight),
            dbias=array(dbias),
            dwindow=array(dwindow),
            threads=ctx.threads,
            kernel=ctx.kernel,
        )
        return dx, dweight, dbias, None if window is None else dwindow, None, None
