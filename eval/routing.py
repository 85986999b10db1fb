# SPDX-License-Identifier: Apache-2.0
"""What compression does to routing, and how much of what is lost goes that way. PyTorch models only.

    overlap          mean over tokens of |S ∩ S'| / K            S the K experts that the original chose
    total variation  mean over tokens of ½ Σ_e |g_e − g'_e|      gates, 0 of experts that were not chosen
    load shift       ½ Σ_e |l_e − l'_e|                          l_e the share of all choices that fell on expert e
    explained        1 − KL_forced / KL                          mean KL(original ‖ candidate), nats a token

What has a prime is the candidate's. It is run three times beside the original, each with a state of its own: freely,
which the first three figures are about; with the original's chosen experts, whose gates are the softmax of the
candidate's own logits; and with the original's gates too. Choices are the original's at the same token.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.errors import InputError
from mossquant.eval.scores import divergences, not_finite, pieces, read_by
from mossquant.eval.windows import Interval, Windows
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Reroute
from mossquant.model.mossnet import experts_of
from mossquant.model.routing import Routing
from mossquant.progress import Progress
from mossquant.runner import State, Tokens
from mossquant.targets.torch.runner import TorchRunner

Values = NDArray[np.float64]

RUNS = ("free", "chosen", "gates")
"""What a candidate's run takes from the original: nothing, the chosen experts, or these and their gates."""


@dataclass(frozen=True)
class RouterShift:
    """One router of the candidate, run freely, against the original's.

    Attributes:
        name: e.g. "layers.3.mixer.router".
        kind: of its block, "ssm" or "mlp".
        overlap: mean share of the original's chosen experts that the candidate chose too.
        total_variation: mean of ½ Σ_e |g_e − g'_e|.
        load_shift: ½ Σ_e |l_e − l'_e|.
    """

    name: str
    kind: str
    overlap: float
    total_variation: float
    load_shift: float


@dataclass(frozen=True)
class ForcedLoss:
    """What is lost where some of the original's routing is forced.

    Attributes:
        kl_mean: mean KL(original ‖ candidate), nats a token.
        kl_ci95: its interval; None where the text is shorter than two windows (so with the other).
        explained: 1 − kl_mean / mean KL of the free run; None where that loses nothing.
        explained_ci95: its interval, both runs resampled together.
    """

    kl_mean: float
    kl_ci95: Interval | None
    explained: float | None
    explained_ci95: Interval | None


@dataclass(frozen=True)
class RoutingShift:
    """One candidate's routing against the original's.

    Attributes:
        path: of the candidate, as given.
        routers: block by block.
        kl_mean: of the free run, nats a token.
        kl_ci95: its interval.
        chosen: with the original's chosen experts.
        gates: with its gates too.
    """

    path: str
    routers: tuple[RouterShift, ...]
    kl_mean: float
    kl_ci95: Interval | None
    chosen: ForcedLoss
    gates: ForcedLoss

    def mean(self, kind: str) -> RouterShift | None:
        """The mean over the routers of one kind of block; None where there are none."""
        own = [router for router in self.routers if router.kind == kind]
        if not own:
            return None
        figures = np.mean([(router.overlap, router.total_variation, router.load_shift) for router in own], 0)
        return RouterShift(f"mean of {len(own)}", kind, *map(float, figures))


def routers_of(config: MossNetConfig) -> dict[str, tuple[str, int, int]]:
    """Router's name in a pass → (kind of block, experts, how many are chosen), block by block."""
    return {
        experts.routing: (experts.kind, experts.count, experts.chosen)
        for experts in experts_of(config)
        if experts.routing is not None
    }


def check_routers(original: TorchRunner, candidates: Sequence[TorchRunner]) -> None:
    """Check that routing can be compared.

    Raises:
        InputError: a model without routers, or candidates with others than the original has.
    """
    routers = routers_of(original.model.config)
    if not routers:
        raise InputError(f"{original.info.path} has no routers, so there is no routing to compare")
    others = [runner.info.path for runner in candidates if routers_of(runner.model.config) != routers]
    if others:
        what = f"other experts than those of {original.info.path}"
        raise InputError.listing(what, others, "Compare routing between models of one shape.")


def compare_routing(
    original: TorchRunner,
    candidates: Sequence[TorchRunner],
    tokens: Tokens,
    *,
    at_once: int = 1,
    progress: Progress | None = None,
) -> list[RoutingShift]:
    """Run the original once and every candidate three times over tokens [S, L], in lockstep.

    Args:
        original: whose choices are followed.
        candidates: models with the same routers.
        tokens: [S, L], L ≥ 2.
        at_once: runs at the same time, each in a thread of its own; changes no result.
        progress: told after every piece, in tokens.

    Raises:
        InputError: as `check_routers`, or logits that are not finite.
    """
    check_routers(original, candidates)
    shape = tokens.shape[0], tokens.shape[1] - 1
    runners = [original, *(runner for runner in candidates for _ in RUNS)]
    kl = np.zeros((len(candidates), len(RUNS), *shape))
    tallies = [_Tally(original.model.config) for _ in candidates]
    states: list[State] = []
    cut = pieces(shape, original.info.vocab_size, held=len(runners), max_batch=shape[0])
    with ThreadPoolExecutor(at_once) as pool:
        for part, span in cut:
            if span.start == 0:
                states = [runner.initial_state(part.stop - part.start) for runner in runners]
            read, followed, free = tokens[part, span], _Recorded(), [_Recorded() for _ in candidates]
            expected, states[0] = original.run_routed(read, states[0], followed.keep)
            if not np.isfinite(expected).all():
                raise InputError(not_finite(original, span.start))
            hooks = [
                hook for own in free for hook in (own.keep, followed.forced(gates=False), followed.forced(gates=True))
            ]
            calls = [
                pool.submit(runner.run_routed, read, state, hook)
                for runner, state, hook in zip(runners[1:], states[1:], hooks, strict=True)
            ]
            for index, call in enumerate(calls):
                logits, states[index + 1] = call.result()
                if not np.isfinite(logits).all():
                    raise InputError(not_finite(runners[index + 1], span.start))
                kl[*divmod(index, len(RUNS)), part, span] = divergences(expected, logits)
            for tally, own in zip(tallies, free, strict=True):
                tally.add(followed, own)
            if progress is not None:
                progress("tokens, routing", read_by(shape, part, span), shape[0] * shape[1])
    windows = Windows(*shape)
    return [
        _shift(runner.info.path, tally, own, windows)
        for runner, tally, own in zip(candidates, tallies, kl, strict=True)
    ]


def follow(own: Routing, original: Routing, *, gates: bool) -> Routing:
    """A routing to the original's experts: with its gates, or with the softmax of one's own logits at them."""
    assert own.logits is not None
    forced = original.gates if gates else torch.softmax(own.logits.gather(1, original.chosen), -1)
    return replace(own, chosen=original.chosen, gates=forced)


class _Recorded:
    """The decisions of every router in one call, in the order in which they were made."""

    def __init__(self) -> None:
        self.routings: dict[str, list[Routing]] = {}

    def keep(self, name: str, routing: Routing) -> Routing:
        if routing.logits is not None:
            self.routings.setdefault(name, []).append(routing)
        return routing

    def forced(self, *, gates: bool) -> Reroute:
        """A model that makes the same call takes these decisions, one after the other."""
        turns = {name: iter(routings) for name, routings in self.routings.items()}

        def reroute(name: str, own: Routing) -> Routing:
            return own if own.logits is None else follow(own, next(turns[name]), gates=gates)

        return reroute


class _Tally:
    """Sums over tokens for every router of one candidate."""

    def __init__(self, config: MossNetConfig) -> None:
        self._routers = routers_of(config)
        self._rows = dict.fromkeys(self._routers, 0)
        self._shared = dict.fromkeys(self._routers, 0.0)
        self._moved = dict.fromkeys(self._routers, 0.0)
        self._load = {name: torch.zeros(2, of[1], dtype=torch.int64) for name, of in self._routers.items()}

    def add(self, original: _Recorded, candidate: _Recorded) -> None:
        for name, routings in original.routings.items():
            for theirs, own in zip(routings, candidate.routings[name], strict=True):
                chosen = torch.stack([_chosen(theirs), _chosen(own)])
                gates = theirs.dense().double() - own.dense().double()
                self._rows[name] += chosen.shape[1]
                self._shared[name] += float(chosen.all(0).sum())
                self._moved[name] += float(gates.abs().sum()) / 2
                self._load[name] += chosen.sum(1).cpu()

    def shifts(self) -> tuple[RouterShift, ...]:
        found = []
        for name, (kind, _, chosen) in self._routers.items():
            rows, load = self._rows[name], self._load[name].double()
            moved = float((load[0] - load[1]).abs().sum()) / 2 / (rows * chosen)
            shared = self._shared[name] / (rows * chosen)
            found.append(RouterShift(name, kind, shared, self._moved[name] / rows, moved))
        return tuple(found)


def _chosen(routing: Routing) -> Tensor:
    """Whether each expert was chosen, [rows, X]."""
    none = torch.zeros((len(routing.chosen), routing.experts), dtype=torch.bool, device=routing.chosen.device)
    return none.scatter(1, routing.chosen, True)


def _shift(path: str, tally: _Tally, kl: Values, windows: Windows) -> RoutingShift:
    """kl [3, S, T] of the runs."""
    free, chosen, gates = kl
    forced = [_forced(values, free, windows) for values in (chosen, gates)]
    return RoutingShift(path, tally.shifts(), float(free.mean()), windows.interval(free), *forced)


def _forced(forced: Values, free: Values, windows: Windows) -> ForcedLoss:
    mean, lost = float(forced.mean()), float(free.mean())
    share = 1 - mean / lost if lost > 0 else None
    ratio = None if share is None else windows.ratio_interval(forced, free)
    between = None if ratio is None else Interval(1 - ratio.high, 1 - ratio.low)
    return ForcedLoss(mean, windows.interval(forced), share, between)
