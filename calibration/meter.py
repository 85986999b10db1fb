# SPDX-License-Identifier: Apache-2.0
"""KL at the model's output when some weights are replaced: what sensitivities, choices and recovery are judged by."""

from collections.abc import Mapping
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.weights import Weights, value
from mossquant.errors import InputError
from mossquant.model.forward import Forward
from mossquant.model.tensors import TensorSpec

WINDOW = 256
"""Tokens of a window on which a model is measured; each begins afresh."""
_LOGITS = 1 << 22
"""Logits of each of the two models that exist at once, unless one token has more."""
_COMPARED = 1 << 18
"""Of these so many are compared at once: they stay near the core."""
_ENTERING_BYTES = 1 << 28
"""What enters blocks and is kept, at most: where all of it is more, that of every so manieth block."""
_Z = 1.959964


class Meter:
    """Measures KL(full precision ‖ changed) at the output of a model, on windows of text.

    Args:
        weights: the full-precision model.
        windows: token ids [W, T].
        device: "cpu" or "cuda".
        from_start: every change is of all blocks, so that nothing that enters one need be kept.

    Attributes:
        model: the model in fp32; every change is taken back.
        seconds: what one pass took.
    """

    def __init__(self, weights: Weights, windows: Tensor, *, device: str = "cpu", from_start: bool = False) -> None:
        self._weights = weights
        self.model = load_model(weights).to(device)
        self.windows = windows.to(device)
        self._run = Forward(scan="kernel" if device == "cpu" else "chunked")
        self._blocks = list(self.model.blocks)
        # What enters every `_apart`th block, W · T · D values each.
        every = 4 * windows.numel() * weights.config.hidden_size * len(self._blocks)
        self._apart = len(self._blocks) if from_start else -(-every // _ENTERING_BYTES)
        self._entering: list[Tensor] = []
        start = perf_counter()
        with torch.inference_mode():
            self._hidden = self._from(0, self._table(), keep=True)
        self.seconds = perf_counter() - start
        if not bool(torch.isfinite(self._hidden).all()):
            raise InputError(f"{weights.origin.path} overflows fp32 on this text; give another model or text")

    def kl(self, changed: Mapping[TensorSpec, Tensor]) -> NDArray[np.float64]:
        """Mean KL of each window [W], in nats a token, with some tensors replaced.

        Args:
            changed: tensor → its values, in the checkpoint's shape.

        Raises:
            InputError: it is not finite.
        """
        model = self.model
        head = model.embeddings if model.lm_head is None else model.lm_head
        outside = any(spec.layer is None for spec in changed)
        first = 0
        if not outside:
            first = next(i for i, block in enumerate(self._blocks) if any(block.holds(spec) for spec in changed))
        with torch.inference_mode():
            own_head = head.clone() if outside else head
            try:
                for spec, values in changed.items():
                    model.parameter_of(spec).copy_(values)
                at = first // self._apart
                hidden = self._from(at * self._apart, self._table() if outside else self._entering[at])
                rows = max(1, _LOGITS // len(head))
                pieces = zip(torch.split(self._hidden, rows), torch.split(hidden, rows), strict=True)
                losses = [
                    divergence(original, candidate)
                    for known, seen in pieces
                    for original, candidate in zip(
                        torch.split(F.linear(known, own_head), max(1, _COMPARED // len(head))),
                        torch.split(F.linear(seen, head), max(1, _COMPARED // len(head))),
                        strict=True,
                    )
                ]
            finally:
                for spec in changed:
                    model.parameter_of(spec).copy_(value(self._weights, spec.name).view(spec.shape))
        if not all(bool(torch.isfinite(of).all()) for of in losses):
            raise InputError("KL is not finite: the model overflows fp32 on this text, or what was made of it does")
        means: NDArray[np.float64] = torch.cat(losses).view(len(self.windows), -1).double().mean(1).cpu().numpy()
        return means

    def _table(self) -> Tensor:
        return self.model.embeddings[self.windows]

    def _from(self, first: int, x: Tensor, *, keep: bool = False) -> Tensor:
        """What the head reads [W · T, D], from what enters a block on."""
        state = self.model.initial_state(len(self.windows))
        for at, block in enumerate(self._blocks[first:], first):
            if keep and at % self._apart == 0:
                self._entering.append(x)
            x, _ = block.added(x, state, self._run)
        return self.model.final_norm(x, self._run).flatten(0, 1)


def divergence(original: Tensor, candidate: Tensor) -> Tensor:
    """KL(original ‖ candidate) of logits [n, V] → [n], accurate in fp32 also where it is tiny.

    With d the difference of the logits and d̄ its mean under p:   KL = log1p(Σ_v p_v (e^(d−d̄) − 1 − (d − d̄)))
    """
    p = torch.softmax(original, -1)
    d = candidate - original
    d = d - (p * d).sum(-1, keepdim=True)
    return torch.log1p((p * (torch.expm1(d) - d)).sum(-1))


def interval(losses: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the mean of independent windows [W]; None for one window."""
    if len(losses) < 2:
        return None
    mean, error = float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(len(losses)))
    return mean - _Z * error, mean + _Z * error
