# SPDX-License-Identifier: Apache-2.0
"""The selective scan as a differentiable PyTorch function on the CPU.

    delta_t = softplus(dt_t)
    h_t     = exp(delta_t A) * h_{t-1} + (delta_t x_t) Bm_t^T
    y_t     = h_t Cm_t + D * x_t

B batch, T time, E channels (d_inner), N states (d_state). No arithmetic here: the kernels are in C++ (`scan.h`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossquant.kernels import _native
from mossquant.kernels.tensors import array, maybe_array, prepare, thread_count

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    *,
    threads: int | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan over all of time; differentiable once, with respect to every input.

    The result does not depend on the number of threads, to the bit. Inputs are all float64, or any mix of float32,
    bfloat16 and float16, which is computed in float32.

    Args:
        x: [B, T, E], the input of the recurrence.
        dt: [B, T, E], the time step before softplus, bias included.
        A: [E, N], not positive (-exp(A_log)).
        Bm: [B, T, N].
        Cm: [B, T, N].
        D: [E].
        h0: [B, E, N], the state before the first step; None: zeros.
        threads: at most so many; None: as many as PyTorch uses.
        kernel: the kernel's name, one of `mossquant.kernels.available("scan")`; None: the best this machine can run.

    Returns:
        y [B, T, E] in the dtype of x, and hT [B, E, N], the state after the last step, in float32 or float64.

    Raises:
        ValueError: a wrong shape, dtype or device, no thread, or a kernel this machine cannot run.
    """
    inputs = {"x": x, "dt": dt, "A": A, "Bm": Bm, "Cm": Cm, "D": D, "h0": h0}
    # Casts and copies stay outside the Function, so that autograd takes their gradients back to the caller's tensors.
    ready = prepare("selective_scan", inputs)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in ready)
    y, hT = _SelectiveScan.apply(*ready, thread_count(threads), kernel, keep)  # type: ignore[no-untyped-call]
    return y.to(x.dtype), hT


class _SelectiveScan(torch.autograd.Function):
    """The kernels on contiguous tensors of one dtype. Keeps the inputs and h before every chunk of steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        Bm: Tensor,
        Cm: Tensor,
        D: Tensor,
        h0: Tensor | None,
        threads: int,
        kernel: str | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        # Wrong numbers of dimensions are reported by the kernel; here they only must not get in the way.
        batch, time = (*x.shape, 0, 0)[:2]
        channels, states = (*A.shape, 0, 0)[:2]
        y = torch.empty_like(x)
        hT = x.new_empty(batch, channels, states)
        checkpoints = x.new_empty(batch, -(-time // _native.CHUNK), states, channels) if keep else None
        _native.scan_forward(
            array(x),
            array(dt),
            array(A),
            array(Bm),
            array(Cm),
            array(D),
            maybe_array(h0),
            y=array(y),
            hT=array(hT),
            checkpoints=maybe_array(checkpoints),
            threads=threads,
            kernel=kernel,
        )
        if keep:
            ctx.save_for_backward(x, dt, A, Bm, Cm, D, checkpoints)
            ctx.threads, ctx.kernel, ctx.has_h0 = threads, kernel, h0 is not None
            ctx.set_materialize_grads(False)
        return y, hT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dhT: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, Bm, Cm, D, checkpoints = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        dhT = None if dhT is None else dhT.contiguous()
        dx, ddt, dA, dBm, dCm, dD = (torch.empty_like(tensor) for tensor in (x, dt, A, Bm, Cm, D))
        dh0 = x.new_empty(x.shape[0], *A.shape)
        _native.scan_backward(
            array(x),
            array(dt),
            array(A),
            array(Bm),
            array(Cm),
            array(D),
            array(checkpoints),
            array(dy),
            maybe_array(dhT),
            dx=array(dx),
            ddt=array(ddt),
            dA=array(dA),
            dBm=array(dBm),
            dCm=array(dCm),
            dD=array(dD),
            dh0=array(dh0),
            threads=ctx.threads,
            kernel=ctx.kernel,
        )
        return dx, ddt, dA, dBm, dCm, dD, dh0 if ctx.has_h0 else None, None, None, None
