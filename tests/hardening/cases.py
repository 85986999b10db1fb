# SPDX-License-Identifier: Apache-2.0
"""Turns a seed into a damaged folder, does something with it, and judges what happened."""

import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hardening.actions import ACTIONS, Action, Place
from hardening.case import Damage
from hardening.guard import EXTRA_MB, measured
from hardening.kinds import KINDS, Kind
from hardening.seals import reseal

from mossquant.errors import InputError

_ORDER = tuple(kind for kind in KINDS for _ in range(kind.weight))
_TRIED = 2


@dataclass(frozen=True)
class Case:
    """A seed, understood.

    Attributes:
        seed: everything else follows from it.
        kind: which file is damaged.
        mended: whether every hash and length is made right again after the damage.
        alone: whether `manifest.json` is taken away from an artifact: nothing vouches for the program then.
        damage: the new content.
        actions: what is done with the folder.
    """

    seed: int
    kind: Kind
    mended: bool
    alone: bool
    damage: Damage
    actions: tuple[Action, ...]

    @property
    def name(self) -> str:
        seals = "hashes made right again" if self.mended else "as damaged"
        verbs = ", ".join(action.__name__ for action in self.actions)
        return f"seed {self.seed}: {self.kind.name} ({seals}): {self.damage.what[:300]}; then {verbs}"

    def write(self, samples: Path, folder: Path) -> Path:
        """The sample with the damage, in `folder`."""
        damaged = folder / self.kind.folder
        shutil.copytree(samples / self.kind.folder, damaged)
        (damaged / self.kind.file).write_bytes(self.damage.data)
        if self.mended and self.kind.file != "manifest.json":  # its hashes are right, and would be written anew
            reseal(damaged)
        if self.alone:
            (damaged / "manifest.json").unlink(missing_ok=True)
        return damaged


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "refused" or "accepted", what was wrong with that (None: nothing), and what it took."""

    verdict: str
    problem: str | None
    seconds: float
    extra_mb: float


def make_case(seed: int, samples: Path) -> Case:
    """The case of a seed."""
    random = Random(seed)
    kind = _ORDER[seed % len(_ORDER)]
    mended = seed // len(_ORDER) % 2 == 0
    damage = kind.mutate(random, (samples / kind.folder / kind.file).read_bytes())
    known = ACTIONS[kind.actions]
    alone = kind.actions in ("program", "stream") and kind.file != "manifest.json" and random.random() < 0.25
    return Case(seed, kind, mended, alone, damage, tuple(random.sample(known, min(_TRIED, len(known)))))


def run_case(case: Case, samples: Path, folder: Path) -> Outcome:
    """Do all of a case in `folder`, which is empty, and leave it empty."""
    outputs = folder / "outputs"
    outputs.mkdir()
    place = Place(case.write(samples, folder), samples, outputs)
    verdicts, problem = set(), None
    with measured() as cost:
        for action in case.actions:
            verdict, found = _attempt(lambda action=action: action(place))  # type: ignore[misc]
            verdicts.add(verdict)
            if found is None and list(outputs.iterdir()):
                found = f"{action.__name__} left {sorted(path.name for path in outputs.iterdir())} behind"
            problem = problem or found
    if problem is None and cost.extra_mb > EXTRA_MB:
        problem = f"took {cost.extra_mb:.0f} MB above the process's own"
    for path in list(folder.iterdir()):
        shutil.rmtree(path)
    return Outcome("accepted" if "accepted" in verdicts else "refused", problem, cost.seconds, cost.extra_mb)


def _attempt(action: Callable[[], None]) -> tuple[str, str | None]:
    try:
        action()
    except InputError as error:
        text = str(error)
        bad = not text.isprintable() or not 20 <= len(text) <= 3000
        return "refused", f"a message that is no clear line: {text[:200]!r}" if bad else None
    except BaseException as error:  # panics of native libraries are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "failed", "".join(traceback.format_exception(error))[-3000:]
    return "accepted", None
