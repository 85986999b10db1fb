# SPDX-License-Identifier: Apache-2.0
"""What each expert is worth, told from text without looking at the model's output.

    frequency   share of the choices of its layer that fell on it
    reap        mean over the tokens that chose it of g · ‖what it gives‖                        (Lasby et al. 2025)
                an MLP expert gives its output, an SSM expert its δ, B and C
    change      mean over all tokens of ‖x'/‖x'‖ − x/‖x‖‖²
                x the residual stream behind its block, x' the same where it is gone: its tokens go to those that are
                left by the router's own rule, and what it put into δ, B and C is missing from every later state. A
                later block reads x through a norm, so that the direction of x is all that it sees

The first two are sums over one pass. The third runs each block again without each of its experts, the state's dynamics
included, on what entered it in the full-precision model: as many passes through the block as it has experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mossquant.calibration.meter import pass_windows, reroute_without
from mossquant.checkpoint.weights import Weights, value
from mossquant.files.space import trim_heap
from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of
from mossquant.model.forward import Forward
from mossquant.model.routing import Routing
from mossquant.model.scan import ScanForm
from mossquant.model.tensors import Experts, Use, outside_blocks
from mossquant.progress import Progress


@dataclass(frozen=True, order=True)
class Expert:
    """One expert of a model: its layer, the kind of its block, its number."""

    layer: int
    kind: str
    number: int

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind} {self.number}"


@dataclass(frozen=True)
class Saliencies:
    """What is known of one expert. Formulas above.

    Attributes:
        expert: which.
        routing: its router's name in a pass.
        tokens: that chose it.
        frequency: share of the choices of its layer.
        reap: gate times the norm of what it gives.
        change: of the direction of the residual stream.
    """

    expert: Expert
    routing: str
    tokens: int
    frequency: float
    reap: float
    change: float


def saliencies(
    weights: Weights, windows: Tensor, *, device: str = "cpu", progress: Progress | None = None
) -> list[Saliencies]:
    """What every expert behind a router is worth, block by block.

    Args:
        weights: the full-precision model; one block of it is loaded at a time.
        windows: token ids [W, T]; each window begins with the state at zero.
        device: "cpu" or "cuda".
        progress: called after each block with experts done and in all.
    """
    table = outside_blocks(weights.specs.values())[Use.TABLE].name
    rows = value(weights, table)
    passes = [rows[some].to(device) for some in torch.split(windows, pass_windows(weights, windows))]
    scan: ScanForm = "kernel" if device == "cpu" else "chunked"
    found: list[Saliencies] = []
    every = [kind.experts(weights.config, layer) for layer, kind in blocks_of(weights.config)]
    total = sum(experts.count for experts in every if experts is not None and experts.routing is not None)
    with torch.inference_mode():
        for layer, kind in blocks_of(weights.config):
            block = kind(weights.config, layer)
            block.load(lambda name: value(weights, name))
            block.requires_grad_(False).to(device)
            experts = kind.experts(weights.config, layer)
            if experts is None or experts.routing is None:
                passes = [_behind(block, x, Forward(scan=scan)) for x in passes]
            else:
                passes = _measured(block, experts, passes, scan, found.append)
                if progress is not None:
                    progress(f"layer {layer}, {kind.kind}", len(found), total)
            trim_heap()
    return found


def _measured(
    block: Block, experts: Experts, passes: Sequence[Tensor], scan: ScanForm, add: Callable[[Saliencies], None]
) -> list[Tensor]:
    """What leaves a block, pass by pass; each of its experts is handed to `add`."""
    tally = _Tally(experts)
    watched = Forward(scan=scan, observe=tally.observe, reroute=tally.reroute)
    leaving = [_behind(block, x, watched) for x in passes]
    assert experts.routing is not None
    tokens = sum(x.shape[0] * x.shape[1] for x in passes)
    for number in range(experts.count):
        apart = 0.0
        if tally.tokens[number]:
            gone = Forward(scan=scan, reroute=reroute_without({experts.routing: [number]}))
            for entering, left in zip(passes, leaving, strict=True):
                other = _behind(block, entering, gone)
                apart += float((_direction(other) - _direction(left)).square().sum(dtype=torch.float64))
        counted = int(tally.tokens[number])
        add(
            Saliencies(
                expert=Expert(experts.layer, experts.kind, number),
                routing=experts.routing,
                tokens=counted,
                frequency=counted / int(tally.tokens.sum()),
                reap=float(tally.given[number]) / max(1, counted),
                change=apart / tokens,
            )
        )
    return leaving


class _Tally:
    """How often experts are chosen, and how much they give."""

    def __init__(self, experts: Experts) -> None:
        self._numbers = {name: number for number, name in enumerate(experts.giving)}
        self.tokens = torch.zeros(experts.count, dtype=torch.int64)
        self.given = torch.zeros(experts.count, dtype=torch.float64)

    def reroute(self, name: str, routing: Routing) -> Routing:
        """Counts, and changes nothing."""
        self.tokens += torch.bincount(routing.chosen.flatten().cpu(), minlength=routing.experts)
        return routing

    def observe(
        self, names: Sequence[str], x: Tensor, rows: Tensor | None, gates: Tensor | None, out: Tensor | None
    ) -> None:
        """Sums g · ‖what is given‖."""
        number = self._numbers.get(names[0])
        if number is not None and gates is not None and out is not None:
            self.given[number] += float((gates.flatten() * out.norm(dim=-1)).sum(dtype=torch.float64))


def _behind(block: Block, x: Tensor, run: Forward) -> Tensor:
    """The residual stream [W, T, D] behind a block, every state zero before it."""
    states = block.states(block.config, block.layer)
    return block.added(x, {spec.name: spec.zeros(len(x), device=x.device) for spec in states}, run)[0]


def _direction(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis; zero where x is."""
    return torch.nn.functional.normalize(x, dim=-1)
