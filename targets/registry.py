# SPDX-License-Identifier: Apache-2.0
"""The targets that a model can be lowered to, by name: a dict, and a decorator that fills it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.plan.capabilities import CAPABILITIES, Activations
from mossquant.targets.artifact import ProgramRecord

__all__ = ["Exported", "Exporter", "Prepared", "Progress", "exporter", "exporters", "get_exporters"]

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


@dataclass(frozen=True)
class Prepared:
    """What an exporter will do.

    Attributes:
        write: writes the program and what lies beside it, but the tokenizer and the manifest, into a folder.
        disk_bytes: room that this takes.
        memory_bytes: anonymous memory that it takes, beside the interpreter's own with its imports.
    """

    write: Callable[[Path], Exported]
    disk_bytes: int
    memory_bytes: int


class Exporter(Protocol):
    """Checks all that can be checked before any work."""

    def __call__(
        self,
        source: Checkpoint | QuantizedCheckpoint,
        *,
        activations: Activations | None,
        progress: Progress | None,
    ) -> Prepared:
        """Prepare to lower a checkpoint that the target can hold (`mossquant.plan.capabilities`).

        Raises:
            InputError: a package is missing, or the target does not have these activations.
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
    # In the order of the capabilities, whichever module was imported first.
    return {name: _EXPORTERS[name] for name in CAPABILITIES if name in _EXPORTERS}


def get_exporters(names: Sequence[str]) -> dict[str, Exporter]:
    """The exporters of some targets, by name.

    Raises:
        InputError: no target, one named twice, or unknown ones; the known ones are listed.
    """
    known = exporters()
    if not all(names):
        raise InputError("a target's name is empty; give names with a comma between, e.g. onnx,executorch")
    if not names:
        raise InputError(f"no target was given; known targets: {', '.join(known)}")
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise InputError(f"target {twice[0][:40]!r} is named twice; name each once")
    unknown = [repr(name[:40]) for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown target {', '.join(unknown)}; known targets: {', '.join(known)}")
    return {name: known[name] for name in names}
