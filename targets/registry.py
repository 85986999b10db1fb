# SPDX-License-Identifier: Apache-2.0
"""The targets that a model can be lowered to, by name: a dict, and a decorator that fills it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from mossquant.capabilities import Activations
from mossquant.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.quantized import QuantizedCheckpoint
from mossquant.targets.artifact import ProgramRecord

__all__ = ["Exported", "Exporter", "Progress", "Writer", "exporter", "exporters", "get_exporters"]

Progress = Callable[[str, int, int], None]
"""(what was just done, amount done, amount in all): bytes, or stages."""

_TARGETS = ("mossquant.targets.onnx.export", "mossquant.targets.executorch.export")
"""Modules that register an exporter; a target is deleted together with its line here."""

_EXPORTERS: dict[str, "Exporter"] = {}


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote: its entry of the manifest, and notes for the user, one line each."""

    program: ProgramRecord
    notes: tuple[str, ...] = ()


class Writer(Protocol):
    """Writes a program into a folder that is written aside; everything was checked before."""

    def __call__(self, folder: Path) -> Exported:
        """Write the program and what lies beside it, but the tokenizer and the manifest."""
        ...


class Exporter(Protocol):
    """Checks all that can be checked before any work, and gives what will do the work."""

    def __call__(
        self,
        source: Checkpoint | QuantizedCheckpoint,
        destination: Path,
        *,
        activations: Activations | None,
        progress: Progress | None,
    ) -> Writer:
        """Check what will be written beside `destination` and renamed to it.

        Raises:
            InputError: the checkpoint holds something that the target cannot, a package is missing, there is too little
                disk or memory.
        """
        ...


def exporter(name: str) -> Callable[[Exporter], Exporter]:
    """Register a function as the exporter of a target."""

    def register(function: Exporter) -> Exporter:
        assert name not in _EXPORTERS, name
        _EXPORTERS[name] = function
        return function

    return register


def exporters() -> dict[str, Exporter]:
    """Every target's exporter, by name."""
    for module in _TARGETS:
        import_module(module)
    return dict(_EXPORTERS)


def get_exporters(names: Sequence[str]) -> list[Exporter]:
    """The exporters of some targets.

    Raises:
        InputError: no target, one named twice, or unknown ones; the known ones are listed.
    """
    known = exporters()
    if not names:
        raise InputError(f"no target was given; known targets: {', '.join(known)}")
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise InputError(f"target {twice[0][:40]!r} is named twice; name each once")
    unknown = [repr(name[:40]) for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown target {', '.join(unknown)}; known targets: {', '.join(known)}")
    return [known[name] for name in names]
