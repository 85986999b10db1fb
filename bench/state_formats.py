# SPDX-License-Identifier: Apache-2.0
"""What it costs to carry states in fewer bits: a model against itself with its states rounded after every token.

    python bench/state_formats.py [MODEL] [--text FILE] [--tokens 32768] [--bucket 4096] [--formats int8] [--windows]

Prints two Markdown tables. The first has a row for each format of the SSM states, with `--windows` also of these and
the convolutions' windows: bytes of a stream's state, KL to the model itself with its 95 % interval, and drift: with r
the candidate's perplexity over the model's in a bucket of positions of one stream, r(last bucket) / r(first), ± two
standard errors. The second is arithmetic alone: how far a state with decay 0.999 and a constant input lies off its
steady state after 20,000 tokens, in per cent of its channel's largest value, the worst of steady states from 0.0001 to
1 of that value; from zero, and beside a value that is at its steady state from the beginning. All of it on one thread.
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import View, Weights
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.report.tables import scientific
from mossquant.eval.scores import Scores, score
from mossquant.eval.windows import Windows
from mossquant.formats.states import STATE_FORMATS
from mossquant.model.mossnet import state_specs
from mossquant.targets.torch.runner import TorchRunner

DECAY, REST = 0.999, 20_000
ENDS = (1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
"""Steady states of a channel's values; the first is the largest."""


class Rounded(View):
    """The same weights with the states of some roles in another format."""

    def __init__(self, weights: Weights, state_format: str, roles: set[str]) -> None:
        super().__init__(weights)
        self._format = state_format
        self._names = {spec.name for spec in state_specs(weights.config) if spec.role in roles}

    def state(self, name: str) -> str:
        """The format of a state array."""
        return self._format if name in self._names else "fp32"

    @property
    def bytes(self) -> int:
        """Of one stream's state."""
        return sum(STATE_FORMATS[self.state(spec.name)].bytes(spec.shape) for spec in state_specs(self.config))


def nearest_fp16(value: Tensor, token: int) -> Tensor:
    """fp16 rounded to nearest, for comparison."""
    return value.half().float()


def nearest_int8(value: Tensor, token: int) -> Tensor:
    """int8 rounded to nearest, for comparison."""
    scale = value.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(value / scale) * scale, 0.0)


def off(rounding: Callable[[Tensor, int], Tensor], *, held: bool) -> float:
    """Largest |h − end| of 64 channels after `REST` tokens; the largest value of every channel tends to 1."""
    ends = torch.tensor(ENDS).expand(1, 64, len(ENDS))
    state = torch.zeros_like(ends).clone()
    state[..., 0] = float(held)
    for token in range(REST):
        state = rounding(DECAY * state + (1 - DECAY) * ends, token)
    return float((state - ends).abs().max())


def drift(own: Scores, original: Scores, bucket: int) -> str:
    """r(last bucket) / r(first), ± two standard errors."""
    rise: NDArray[np.float64] = own.nll - original.nll
    parts = rise[:, :bucket], rise[:, -bucket:]
    errors = [Windows(*part.shape).standard_error(part) or math.nan for part in parts]
    ratio = math.exp(parts[1].mean() - parts[0].mean())
    return f"{ratio:.5f} ± {2 * ratio * math.hypot(*errors):.5f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--bucket", type=int, default=4096)
    parser.add_argument("--formats", nargs="+", default=["fp16", "int8"], choices=["fp16", "int8"])
    parser.add_argument("--windows", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    opened, weights = open_model(asked.model, threads=1), open_weights(asked.model, verb="bench")
    # One token more: the first is read and not predicted.
    passage = held_out_passage([opened], text=asked.text, tokens=asked.tokens + 1)
    every = {spec.role for spec in state_specs(weights.config)}
    views = {
        f"{name}, {what}": Rounded(weights, name, roles)
        for name in asked.formats
        for what, roles in (("SSM states", {"ssm.ssm_state"}), ("all states", every))[: 1 + asked.windows]
    }
    begun = time.perf_counter()
    scores = score([opened.runner, *map(TorchRunner.open, views.values())], passage.tokens)
    windows = Windows(*scores[0].nll.shape)
    print(f"{passage.name}, {passage.predicted:,} tokens in one stream; buckets of {asked.bucket:,}\n")
    print("| states | bytes a stream | KL, nats a token | drift |", "| --- | ---: | ---: | ---: |", sep="\n")
    print(f"| fp32 | {Rounded(weights, 'fp32', every).bytes:,} | 0 | 1 |")
    for (name, view), own in zip(views.items(), scores[1:], strict=True):
        interval = windows.interval(own.kl)
        between = "" if interval is None else f" [{scientific(interval.low)}, {scientific(interval.high)}]"
        mean = f"{scientific(float(own.kl.mean()))}{between}"
        print(f"| {name} | {view.bytes:,} | {mean} | {drift(own, scores[0], asked.bucket)} |")
    print(f"\n{time.perf_counter() - begun:.0f} seconds\n")
    print("| rounding | off from zero, % | off beside a held value, % |", "| --- | ---: | ---: |", sep="\n")
    ways: dict[str, Callable[[Tensor, int], Tensor]] = {
        "fp16 as modelled": STATE_FORMATS["fp16"].apply,
        "fp16 to nearest": nearest_fp16,
        "int8 as modelled": STATE_FORMATS["int8"].apply,
        "int8 to nearest": nearest_int8,
    }
    for name, way in ways.items():
        print(f"| {name} | {100 * off(way, held=False):.2f} | {100 * off(way, held=True):.2f} |")


if __name__ == "__main__":
    main()
