# SPDX-License-Identifier: Apache-2.0
"""The targets that a model can be lowered to, by name: a dict, and a decorator that fills it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

from mossquant.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.quantized import QuantizedCheckpoint
from mossquant.targets.artifact import ArtifactManifest

__all__ = ["Activations", "Exported", "Exporter", "Progress", "exporter", "exporters", "get_exporter"]

Activations = Literal["int8", "fp32"]
Progress = Callable[[str, int, int], None]
"""(what was just written, bytes done, bytes in all)."""

_TARGETS = ("mossquant.targets.onnx.export",)
"""Modules that register an exporter; a target is deleted together with its line here."""

_EXPORTERS: dict[str, "Exporter"] = {}


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote: the manifest, and notes for the user, one line each."""

    manifest: ArtifactManifest
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Lowers a model into an empty folder that is written aside; checks everything before it writes."""

    def __call__(
        self,
        source: Checkpoint | QuantizedCheckpoint,
        folder: Path,
        *,
        activations: Activations | None,
        progress: Progress | None,
    ) -> Exported:
        """Write program, tokenizer and manifest."""
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


def get_exporter(name: str) -> Exporter:
    """The exporter of a target.

    Raises:
        InputError: no such target; the known ones are listed.
    """
    known = exporters()
    if name not in known:
        raise InputError(f"unknown target {name[:40]!r}; known targets: {', '.join(known)}")
    return known[name]
