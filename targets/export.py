# SPDX-License-Identifier: Apache-2.0
"""`export`: lower a checkpoint, quantized or not, to an artifact of one target or of several."""

from collections.abc import Sequence
from pathlib import Path

from mossquant.capabilities import Activations
from mossquant.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.locate import locate
from mossquant.outputs import check_free, new_folder
from mossquant.quantized import QuantizedCheckpoint
from mossquant.release import release
from mossquant.targets.artifact import TOKENIZER, Artifact, write_artifact_manifest
from mossquant.targets.registry import Progress, get_exporters

__all__ = ["export"]


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
            for a full-precision checkpoint, an output that cannot be written: before any work.
    """
    names = [target] if isinstance(target, str) else list(target)
    found, destination = get_exporters(names), Path(output)
    located = locate(model)
    folder = located.require("checkpoint", "quantized checkpoint", verb="export")
    check_free(destination, force=force, inputs=[folder])
    if located.kind == "checkpoint" and activations == "int8":
        raise InputError(
            f"{located.given} is not quantized, and int8 activations meet quantized weights only; "
            "leave --activations out, or run `mossquant quantize` first"
        )
    source = Checkpoint.open(folder) if located.kind == "checkpoint" else QuantizedCheckpoint.open(folder)
    writers = [lower(source, destination, activations=activations, progress=progress) for lower in found]
    with new_folder(destination, force=force) as partial:
        exported = {name: write(partial) for name, write in zip(names, writers, strict=True)}
        if source.tokenizer_path is not None:
            (partial / TOKENIZER).write_bytes(source.tokenizer_path.read_bytes())
        programs = {name: one.program for name, one in exported.items()}
        manifest = write_artifact_manifest(partial, release=release(), programs=programs)
    return Artifact(destination, manifest, tuple(note for one in exported.values() for note in one.notes))
