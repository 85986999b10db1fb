# SPDX-License-Identifier: Apache-2.0
"""A case: a seed, what it damages, and how. Everything follows from the seed, so that its number reproduces it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Damage:
    """What became of a file, and what was done to it in a few words."""

    data: bytes
    what: str


Mutator = Callable[[Random, bytes], Damage]
"""Damages the content of one file."""


def one_of(*choices: tuple[int, Mutator]) -> Mutator:
    """A mutator that is one of these, drawn by weight."""

    def mutate(random: Random, data: bytes) -> Damage:
        weights, mutators = zip(*choices, strict=True)
        chosen: Mutator = random.choices(mutators, weights)[0]
        return chosen(random, data)

    return mutate
