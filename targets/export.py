# SPDX-License-Identifier: Apache-2.0
"""`export`: lower a checkpoint, quantized or not, to an artifact of one target or of several; and what that needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import Located, locate
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.files.outputs import check_free, new_folder
from mossquant.files.space import check_space
from mossquant.plan.capabilities import Activations, check
from mossquant.release import release
from mossquant.targets.artifact import MANIFEST, TOKENIZER, Artifact, read_artifact_manifest, write_artifact_manifest
from mossquant.targets.registry import Exporter, Prepared, Progress, get_exporters
from mossquant.targets.source import open_checkpoint
from mossquant.text.tokenizer_checks import check_tokenizer_size

__all__ = ["Needs", "export", "export_needs"]

_MANIFEST_BYTES = 1 << 17
"""Of a manifest: it names files, operators, inputs and outputs."""


@dataclass(frozen=True)
class Needs:
    """What an export takes.

    Attributes:
        targets: target → (bytes of disk, at most; bytes of memory beside the interpreter's own, at most). Targets are
            lowered one after the other, so that their memory does not add up.
        beside_bytes: of disk, for tokenizer and manifest.
    """

    targets: dict[str, tuple[int, int]]
    beside_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Room that the artifact takes, at most."""
        return self.beside_bytes + sum(disk for disk, _ in self.targets.values())

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory that making it takes, at most, beside the interpreter's own with its imports."""
        return max(memory for _, memory in self.targets.values())


def export_needs(
    model: str | Path, *, target: str | Sequence[str] = "onnx", activations: Activations | None = None
) -> Needs:
    """What `export` would need; arguments and errors are those of `export`. Writes nothing."""
    found, located = _asked(model, target)
    source, prepared = _prepare(located, found, activations, None)
    return _needs(source, prepared)


def export(
    model: str | Path,
    output: str | Path,
    *,
    target: str | Sequence[str] = "onnx",
    activations: Activations | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Lower a model to an artifact: programs, tokenizer and manifest, in one folder.

    Lowering never changes a value: the codes and scales of a quantized checkpoint are those of the artifact. The same
    model, release and options give the same bytes.

    Args:
        model: a quantized checkpoint folder; or a full-precision one, or "tiny": its artifact is the full-precision
            program to compare with.
        output: folder to write; nothing may be there, unless `force`.
        target: what to lower to: "onnx", "executorch", or several of them.
        activations: format of the inputs of quantized linears: "int8", as the target rounds them at run time, or
            "fp32"; None takes what the plan of the quantized checkpoint says, or the target's own int8 where the plan
            says one that it does not have.
        force: replace what is at `output`.
        progress: called after each tensor, or stage.

    Returns:
        The artifact, with notes for the user.

    Raises:
        InputError: a bad model or an artifact, an unknown target, a plan that a target cannot hold, int8 activations
            for a full-precision checkpoint, an output that cannot be written, too little disk or memory: before any
            work.
    """
    found, located = _asked(model, target)
    destination = Path(output)
    check_free(destination, force=force, inputs=[located.path])
    source, prepared = _prepare(located, found, activations, progress)
    needs = _needs(source, prepared)
    dropped = _programs_there(destination) - set(found)
    check_space(destination, disk_bytes=needs.disk_bytes, memory_bytes=needs.memory_bytes)
    with new_folder(destination, force=force) as partial:
        exported = {name: each.write(partial) for name, each in prepared.items()}
        if source.tokenizer_path is not None:
            (partial / TOKENIZER).write_bytes(source.tokenizer_path.read_bytes())
        programs = {name: one.program for name, one in exported.items()}
        manifest = write_artifact_manifest(partial, release=release(), programs=programs)
    notes = [note for one in exported.values() for note in one.notes]
    if dropped:
        both = ",".join([*found, *sorted(dropped)])
        notes.append(f"the {' and '.join(sorted(dropped))} program that was there is gone; --target {both} makes both")
    return Artifact(destination, manifest, tuple(notes))


def _programs_there(folder: Path) -> set[str]:
    """Targets of the artifact that is replaced, if one is."""
    try:
        return set(read_artifact_manifest(folder / MANIFEST).programs)
    except InputError:
        return set()


def _asked(model: str | Path, target: str | Sequence[str]) -> tuple[dict[str, Exporter], Located]:
    """The exporters of known targets, and a model that can be lowered."""
    found = get_exporters([target] if isinstance(target, str) else target)
    located = locate(model)
    located.require("checkpoint", "quantized checkpoint", verb="export")
    return found, located


def _prepare(
    located: Located, found: dict[str, Exporter], activations: Activations | None, progress: Progress | None
) -> tuple[Checkpoint | QuantizedCheckpoint, dict[str, Prepared]]:
    """Check all that can be checked before any work."""
    if located.kind == "checkpoint" and activations == "int8":
        raise InputError(
            f"{located.given} is not quantized, and int8 activations meet quantized weights only; "
            "leave --activations out, or run `mossquant quantize` first"
        )
    source = open_checkpoint(located)
    source.seen_text()  # is taken along, and so must be readable
    if isinstance(source, QuantizedCheckpoint):
        # Formats that are overridden need not be any that the targets can take.
        check(source.plan if activations is None else replace(source.plan, activations=()), found)
    prepared = {name: each(source, activations=activations, progress=progress) for name, each in found.items()}
    return source, prepared


def _needs(source: Checkpoint | QuantizedCheckpoint, prepared: dict[str, Prepared]) -> Needs:
    tokenizer = source.tokenizer_path
    if tokenizer is not None:
        check_tokenizer_size(tokenizer)
    return Needs(
        {name: (each.disk_bytes, each.memory_bytes) for name, each in prepared.items()},
        _MANIFEST_BYTES + (tokenizer.stat().st_size if tokenizer is not None else 0),
    )
