# SPDX-License-Identifier: Apache-2.0
"""KL at the model's output when some weights are replaced: what sensitivities, choices and recovery are judged by."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.weights import Weights, value
from mossquant.errors import InputError
from mossquant.files.space import trim_heap
from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of
from mossquant.model.forward import Forward, Reroute
from mossquant.model.mossnet import MossNet
from mossquant.model.tensors import TensorSpec

WINDOW = 256
"""Tokens of a window on which a model is measured; each begins afresh."""
_LOGITS = 1 << 22
"""Logits of each of the two models that exist at once, unless one token has more."""
_COMPARED = 1 << 18
"""Of these so many are compared at once: they stay near the core."""
_ENTERING_BYTES = 1 << 28
"""What enters blocks and is kept, at most: where all of it is more, that of every so manieth block."""
_PASS_VALUES = 1 << 21
"""Values of the widest input of a linear that go through a block at once, at most, unless one window has more."""
_PASS_ARRAYS, _KEPT_ARRAYS = 12, 20
"""fp32 arrays [tokens, widest input] that a pass through a block holds, at most, and that gradients keep of each layer:
counted in the models of 6M and 1M parameters, with experts and without."""
_COMPARED_ARRAYS = 5
"""fp32 arrays of the logits that are compared at once."""
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
        self._at_once = pass_windows(weights, windows)
        self._entering: list[list[Tensor]] = [[] for _ in self._blocks[:: self._apart]]
        start = perf_counter()
        with torch.inference_mode():
            self._hidden = self._from(0, self._table(), self._run, keep=True)
        self.seconds = perf_counter() - start
        trim_heap()
        if not bool(torch.isfinite(self._hidden).all()):
            raise InputError(f"{weights.origin.path} overflows fp32 on this text; give another model or text")

    def kl(
        self, changed: Mapping[TensorSpec, Tensor] | None = None, *, gone: Mapping[str, Collection[int]] | None = None
    ) -> NDArray[np.float64]:
        """Mean KL of each window [W], in nats a token, with some tensors replaced or some experts gone.

        Args:
            changed: tensor → its values, in the checkpoint's shape.
            gone: router's name in a pass → experts behind it that are no longer chosen.

        Raises:
            InputError: it is not finite.
        """
        model, changed, gone = self.model, changed or {}, gone or {}
        head = head_of(model)
        outside = any(spec.layer is None for spec in changed)
        touched = (
            at
            for at, block in enumerate(self._blocks)
            if _router(block) in gone or any(block.holds(spec) for spec in changed)
        )
        first = 0 if outside else next(touched, 0)
        with torch.inference_mode():
            own_head = head.clone() if outside else head
            try:
                for spec, values in changed.items():
                    model.parameter_of(spec).copy_(values)
                at = first // self._apart
                run = replace(self._run, reroute=reroute_without(gone))
                # Nothing here holds what the passes began with: it would be there while logits are compared.
                hidden = self._from(at * self._apart, self._table() if outside else self._entering[at], run)
                return self._apart_by(hidden, own_head, head)
            finally:
                for spec in changed:
                    model.parameter_of(spec).copy_(value(self._weights, spec.name).view(spec.shape))

    def kl_of(self, other: MossNet) -> NDArray[np.float64]:
        """Mean KL of each window [W], in nats a token, of another model with the same vocabulary, on the same device.

        Raises:
            InputError: it is not finite.
        """
        with torch.inference_mode():
            hidden = [
                other.hidden(some, other.initial_state(len(some)), self._run)[0].flatten(0, 1)
                for some in torch.split(self.windows, self._at_once)
            ]
            return self._apart_by(torch.cat(hidden), head_of(self.model), head_of(other))

    def _apart_by(self, hidden: Tensor, own_head: Tensor, head: Tensor) -> NDArray[np.float64]:
        """Mean KL of each window [W], of what the other head reads [W · T, D]."""
        rows, few = max(1, _LOGITS // len(head)), max(1, _COMPARED // len(head))
        # Filled: what is kept piece by piece would lie in the holes that logits left, which then fit none.
        losses = torch.empty(len(hidden), device=hidden.device)
        for known, seen, lost in zip(*(torch.split(of, rows) for of in (self._hidden, hidden, losses)), strict=True):
            _compare(F.linear(known, own_head), F.linear(seen, head), lost, few)
        if not bool(torch.isfinite(losses).all()):
            raise InputError("KL is not finite: the model overflows fp32 on this text, or what was made of it does")
        means: NDArray[np.float64] = losses.view(len(self.windows), -1).double().mean(1).cpu().numpy()
        return means

    def _table(self) -> list[Tensor]:
        return [self.model.embeddings[some] for some in torch.split(self.windows, self._at_once)]

    def _from(self, first: int, entering: Sequence[Tensor], run: Forward, *, keep: bool = False) -> Tensor:
        """What the head reads [W · T, D], from what enters a block on, pass by pass [≤ W, T, D]."""
        hidden = []
        for x in entering:
            state = self.model.initial_state(len(x))
            for at, block in enumerate(self._blocks[first:], first):
                if keep and at % self._apart == 0:
                    self._entering[at // self._apart].append(x)
                x, _ = block.added(x, state, run)
            hidden.append(self.model.final_norm(x, run).flatten(0, 1))
        return torch.cat(hidden)


def head_of(model: MossNet) -> Tensor:
    """The head's matrix [V, D]: its own, or the table."""
    return model.embeddings if model.lm_head is None else model.lm_head


def reroute_without(gone: Mapping[str, Collection[int]]) -> Reroute | None:
    """What routes a pass as if these experts, by the routers' names in it, were gone; None where none is."""
    if not any(gone.values()):
        return None
    return lambda name, routing: routing.without(gone[name]) if gone.get(name) else routing


def _router(block: Block) -> str | None:
    experts = block.experts(block.config, block.layer)
    return None if experts is None else experts.routing


def _compare(original: Tensor, candidate: Tensor, into: Tensor, few: int) -> None:
    """KL of logits [n, V] into [n], a few rows at a time. Both are gone when it returns, before the next are made."""
    for own, other, lost in zip(*(torch.split(of, few) for of in (original, candidate, into)), strict=True):
        lost.copy_(divergence(own, other))


def pass_windows(weights: Weights, windows: Tensor) -> int:
    """How many of these windows [W, T] go through a model at once."""
    return max(1, _PASS_VALUES // (windows.shape[1] * _widest(weights)))


def metering_bytes(weights: Weights, tokens: int, *, from_start: bool = False) -> int:
    """Anonymous memory of a `Meter` of so many tokens, beside its model and the changed values."""
    config, width = weights.config, _widest(weights)
    stream = 4 * tokens * config.hidden_size
    blocks = 1 if from_start else len(list(blocks_of(config)))
    entering = max(stream, min(blocks * stream, _ENTERING_BYTES))
    passed = _PASS_ARRAYS * 4 * width * min(tokens, max(WINDOW, _PASS_VALUES // width))
    compared = 4 * (2 * max(_LOGITS, config.vocab_size) + _COMPARED_ARRAYS * max(_COMPARED, config.vocab_size))
    own_head = 4 * config.vocab_size * config.hidden_size
    # What the head reads: of full precision, of the change, and of its passes before they are put together.
    return entering + 3 * stream + max(passed, compared) + own_head


def learning_bytes(weights: Weights, tokens: int) -> int:
    """Anonymous memory of what a pass over so many tokens keeps of every layer for gradients."""
    return _KEPT_ARRAYS * 4 * tokens * _widest(weights) * weights.config.num_hidden_layers


def _widest(weights: Weights) -> int:
    """The widest input of a linear in the blocks."""
    return max(
        spec.matrix_shape[1] for spec in weights.specs.values() if spec.site is not None and spec.layer is not None
    )


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
