# SPDX-License-Identifier: Apache-2.0
"""Which experts go: one order over all layers, and what was measured for it.

    random, frequency, reap, change     a saliency of each expert alone (`mossquant.calibration.saliency`)
    leave-one-out                       KL at the model's output without the expert, alone: the yardstick of the others
    greedy                              one after the other the expert that adds least to the KL of those gone already

No layer is left with fewer experts than a token chooses. Greedily an expert is measured again only when its last figure
is the smallest: what it adds rarely falls when others go (Minoux 1978).
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mossquant.calibration.meter import Meter, interval
from mossquant.calibration.saliency import Expert, Saliencies
from mossquant.checkpoint.pruned import Keep
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.json import LARGEST, read_json, validated
from mossquant.files.outputs import json_bytes, new_file
from mossquant.model.mossnet import experts_of
from mossquant.progress import Progress

By = Literal["random", "frequency", "reap", "change", "leave-one-out", "greedy"]


def room_of(weights: Weights) -> dict[tuple[int, str], int]:
    """(layer, kind) → how many experts may go there: all but as many as a token chooses."""
    return {(of.layer, of.kind): of.count - of.chosen for of in experts_of(weights.config)}


def counts_of(
    candidates: Sequence[Expert], share: float, room: Mapping[tuple[int, str], int], path: str
) -> dict[str, int]:
    """How many of each kind are to go. Raises `InputError`: none, or more than may."""
    counts: dict[str, int] = {}
    for expert in candidates:
        counts[expert.kind] = counts.get(expert.kind, 0) + 1
    going = {kind: round(share * count) for kind, count in counts.items()}
    for kind, count in counts.items():
        most = sum(of for (_, own), of in room.items() if own == kind)
        if going[kind] == 0:
            raise InputError(f"{share:.1%} of {path}'s {count} {kind} experts is none; one is {1 / count:.1%}")
        if going[kind] > most:
            raise InputError(
                f"{going[kind]} of {count} {kind} experts cannot go: a layer keeps as many as a token chooses, so that "
                f"{most} may; ask for {100 * most / count:g}% or less"
            )
    return going


@dataclass(frozen=True)
class Trial:
    """KL without some experts, nats a token: mean over windows, and its 95 % interval."""

    kl: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class _Snapshot:
    """A run as it is stored: what it is of, and the trials by the names of the experts that were gone."""

    run: str
    trials: Mapping[str, Trial]


class Trials:
    """KL without some experts, and the file from which a run that was killed goes on.

    Args:
        path: the file.
        identity: what must be equal for a run to be gone on with.

    Raises:
        InputError: a file that is none of ours, or of another run.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._found: dict[str, Trial] = {}
        self._meter: Meter | None = None
        if path.exists():
            advice = "remove it to start again"
            values = read_json(path, largest=LARGEST, advice=advice)
            noun = "a run of prune"
            stored = validated(values, _Snapshot, where=str(path), noun=noun, advice=f"{advice.capitalize()}.")
            if stored.run != identity:
                raise InputError(f"{path} belongs to another model, text, release or options; {advice}")
            self._found = dict(stored.trials)

    def measure_with(self, meter: Meter | None) -> None:
        """What measures from now on."""
        self._meter = meter

    def without(self, gone: Collection[Expert], routing: Mapping[Expert, str]) -> Trial:
        """Without these experts; `routing`: their routers' names in a pass."""
        name = "; ".join(map(str, sorted(gone)))
        if name not in self._found:
            assert self._meter is not None
            behind: dict[str, list[int]] = {}
            for expert in sorted(gone):
                behind.setdefault(routing[expert], []).append(expert.number)
            kl = self._meter.kl(gone=behind)
            self._found[name] = Trial(float(kl.mean()), interval(kl))
            with new_file(self._path, force=True) as partial:
                partial.write_bytes(json_bytes(asdict(_Snapshot(self._identity, self._found))))
        return self._found[name]


def order_of(
    by: By,
    candidates: Sequence[Saliencies],
    counts: Mapping[str, int],
    room: Mapping[tuple[int, str], int],
    trials: Trials,
    seed: int,
    progress: Progress,
) -> list[Expert]:
    """The experts that go, in the order in which they are chosen, so many of each kind."""
    routing = {one.expert: one.routing for one in candidates}
    if by in ("leave-one-out", "greedy"):
        scores = {}
        for done, expert in enumerate(routing, 1):
            scores[expert] = trials.without([expert], routing).kl
            progress(f"without {expert}", done, len(routing))
    elif by == "random":
        places = np.random.default_rng(seed).permutation(len(candidates))
        scores = {one.expert: float(place) for one, place in zip(candidates, places, strict=True)}
    else:
        scores = {one.expert: float(getattr(one, by)) for one in candidates}
    gone: list[Expert] = []
    left, open_ = dict(counts), dict(room)
    queue = [(score, expert, 0) for expert, score in scores.items()]
    heapq.heapify(queue)
    lost = 0.0
    while any(left.values()):
        score, expert, at = heapq.heappop(queue)
        place = (expert.layer, expert.kind)
        if left[expert.kind] == 0 or open_[place] == 0:
            continue
        if by == "greedy" and at < len(gone):
            added = trials.without([*gone, expert], routing).kl - lost
            heapq.heappush(queue, (added, expert, len(gone)))
            continue
        gone.append(expert)
        lost += score
        left[expert.kind] -= 1
        open_[place] -= 1
        progress(f"{expert} goes", len(gone), sum(counts.values()))
    return gone


def all_but(weights: Weights, gone: Collection[Expert]) -> Keep:
    """The others."""
    layers: dict[str, list[tuple[int, ...]]] = {}
    for experts in experts_of(weights.config):
        own = layers.setdefault(experts.kind, [()] * weights.config.num_hidden_layers)
        numbers = (Expert(experts.layer, experts.kind, number) for number in range(experts.count))
        own[experts.layer] = tuple(expert.number for expert in numbers if expert not in gone)
    return Keep(**{kind: tuple(of) for kind, of in layers.items()})
