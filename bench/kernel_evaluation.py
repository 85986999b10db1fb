# SPDX-License-Identifier: Apache-2.0
"""What evaluating a quantized checkpoint with int8 inputs by our kernels saves and changes.

    python bench/kernel_evaluation.py QUANTIZED BASE [--tokens 8192] [--positions 256] [--turns 5]

QUANTIZED is run on the values that its codes mean, in PyTorch, and by our kernels; and on the values again with the
columns of every product in two other orders and with its sums in float64, which says what rounding alone does. Prints a
Markdown table: tokens a second of the process's CPU time (one thread, one run of `perplexity`'s loop, the best of the
turns), KL to BASE, and KL to the run on the values. Then how many int8 codes of inputs come out otherwise in single
steps from the same states, where only the order of the columns is another.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mossquant.checkpoint.open import open_weights
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.scores import score
from mossquant.runner import Tokens
from mossquant.targets.torch.runner import TorchRunner

Multiply = Callable[[Tensor, Tensor], Tensor]


def in_order(seed: int) -> Multiply:
    """x · Wᵀ with the columns of both in another order."""
    orders: dict[int, Tensor] = {}

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        columns = x.shape[-1]
        if columns not in orders:
            orders[columns] = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        order = orders[columns]
        return F.linear(x[..., order].contiguous(), weight[:, order].contiguous())

    return multiply


def in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """x · Wᵀ rounded once."""
    return F.linear(x.double(), weight.double()).float()


def on_values(path: str, multiply: Multiply | None = None) -> TorchRunner:
    runner = TorchRunner.open(path, activations="planned", kernels=False)
    runner._forward = replace(runner._forward, multiply=multiply)
    return runner


def cpu_seconds(runner: TorchRunner, tokens: Tokens) -> Callable[[], float]:
    """The least that a run took so far, one more at each call."""
    taken: list[float] = []

    def turn() -> float:
        begun = time.process_time()
        score([runner], tokens)
        taken.append(time.process_time() - begun)
        return min(taken)

    return turn


def watched(path: str, multiply: Multiply | None) -> tuple[TorchRunner, dict[str, list[Tensor]]]:
    """A Runner, and the codes of the inputs that it rounds, by weight."""
    runner, weights, seen = on_values(path, multiply), open_weights(path, verb="this script"), dict[str, list[Tensor]]()
    rounding = runner.activation
    assert rounding is not None

    def activation(name: str, x: Tensor) -> Tensor:
        values, known = rounding(name, x), weights.format(name)
        if known is not None:
            block, columns = known.activation_block, x.shape[-1]
            rows = F.pad(values, (0, -columns % block)).unflatten(-1, (-1, block))
            largest = rows.abs().amax(-1, keepdim=True)  # whose code is 127
            seen.setdefault(name, []).append(torch.round(rows * torch.where(largest > 0, 127 / largest, 0.0)))
        return values

    runner._forward = replace(runner._forward, activation=activation)
    return runner, seen


def flipped(path: str, tokens: Tokens, positions: int) -> tuple[int, int, int]:
    """Codes that differ, codes, and positions at which some differ or other experts see them."""
    (first, of_first), (second, of_second) = watched(path, None), watched(path, in_order(1))
    state, off, every, hit = first.initial_state(1), 0, 0, 0
    for t in range(positions):
        before = first.read(state)
        _, state = first(tokens[:, t : t + 1], state)
        second(tokens[:, t : t + 1], second.write(before))
        own = 0
        for name in of_first.keys() & of_second.keys():
            for a, b in zip(of_first[name], of_second[name], strict=True):
                own, every = own + int((a != b).sum()), every + a.numel()
        off, hit = off + own, hit + (own > 0 or of_first.keys() != of_second.keys())
        of_first.clear(), of_second.clear()
    return off, every, hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("base")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(given.quantized, activations="planned", threads=1)
    tokens = held_out_passage([opened], tokens=given.tokens).tokens
    runners = {
        "values, PyTorch": on_values(given.quantized),
        "kernels": TorchRunner.open(given.quantized, activations="planned"),
        "values, columns in another order": on_values(given.quantized, in_order(1)),
        "values, in a third order": on_values(given.quantized, in_order(2)),
        "values, sums in float64": on_values(given.quantized, in_float64),
    }
    timed = list(runners)[:2]
    turns = {name: cpu_seconds(runners[name], tokens) for name in timed}
    for _ in range(given.turns):
        least = {name: turn() for name, turn in turns.items()}
    of_base = score([TorchRunner.open(given.base), *runners.values()], tokens)[1:]
    of_values = score(list(runners.values()), tokens)
    print("| | tokens/s | KL to the original | KL to the first row |\n| --- | ---: | ---: | ---: |")
    for name, original, values in zip(runners, of_base, of_values, strict=True):
        speed = f"{tokens.size / least[name]:,.0f}" if name in least else "—"
        print(f"| {name} | {speed} | {original.kl.mean():.4e} | {values.kl.mean():.1e} |")
    off, every, hit = flipped(given.quantized, tokens, given.positions)
    share = f"{off / every:.1e} of all"
    print(f"\n{off:,} of {every:,} codes ({share}) came out otherwise, at {hit} of {given.positions} positions.")


if __name__ == "__main__":
    main()
