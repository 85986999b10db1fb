# SPDX-License-Identifier: Apache-2.0
"""What rounding A_log does to the decays that a model really applies.

    error = max over Δ in [low, high] of |exp(Δ A) − exp(Δ A')|         A = −exp(A_log), A' as stored

low and high are the smallest and the largest time step Δ of the channel on a text. For rates a = −A and b = −A' the
difference has one summit, at Δ* = ln(a / b) / (a − b), so that the maximum lies there or at the nearer end.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mossquant.checkpoint.weights import Weights, value
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.scan import ScanForm
from mossquant.model.tensors import Stored
from mossquant.plan.entries import DecayError

Steps = dict[str, tuple[Tensor, Tensor]]
"""Name of the tensor of decays → least and largest Δ of each channel, [E] each."""


def steps_seen(model: MossNet, batches: Iterable[Tensor]) -> Steps:
    """The time steps on tokens [B, T], every batch from the initial state."""
    seen: Steps = {}

    def watch(name: str, delta: Tensor) -> None:
        low, high = delta.amin((0, 1)), delta.amax((0, 1))
        if name in seen:
            low, high = torch.minimum(seen[name][0], low), torch.maximum(seen[name][1], high)
        seen[name] = low, high

    with torch.inference_mode():
        for tokens in batches:
            scan: ScanForm = "kernel" if tokens.device.type == "cpu" else "chunked"
            model.hidden(tokens, model.initial_state(tokens.shape[0]), Forward(scan=scan, observe_steps=watch))
    return seen


def decay_error(decay: Tensor, other: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Largest |exp(Δ A) − exp(Δ A')| over Δ in [low, high], float64 [E, N].

    Args:
        decay: A, negative [E, N].
        other: A', negative [E, N].
        low: least Δ of a channel, positive [E].
        high: its largest Δ, [E].
    """
    a, b, least, most = -decay.double(), -other.double(), low.double()[:, None], high.double()[:, None]
    summit = torch.where(a == b, 1 / a, torch.log(a / b) / (a - b))
    delta = torch.minimum(torch.maximum(summit, least), most)
    return (torch.exp(-delta * a) - torch.exp(-delta * b)).abs()


def decay_errors(original: Weights, quantized: Weights, steps: Steps) -> dict[str, DecayError]:
    """What became of every tensor of decays, by its name."""
    errors = {}
    for name, (low, high) in steps.items():
        assert original.specs[name].stored is Stored.LOG_OF_DECAY
        decay, other = (Stored.LOG_OF_DECAY.values(value(weights, name).double()) for weights in (original, quantized))
        error = decay_error(decay, other, low.cpu(), high.cpu())
        largest = float(error.max())
        errors[name] = DecayError(largest, min(largest, float(error.mean())))  # a mean may be rounded up
    return errors
