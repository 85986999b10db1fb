# SPDX-License-Identifier: Apache-2.0
"""`export`: lower a checkpoint, quantized or not, to an artifact of some target."""

from pathlib import Path

from mossquant.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.locate import locate
from mossquant.outputs import check_free, new_folder
from mossquant.quantized import QuantizedCheckpoint
from mossquant.targets.artifact import Artifact
from mossquant.targets.registry import Activations, Progress, get_exporter

__all__ = ["export"]


def export(
    model: str | Path,
    output: str | Path,
    *,
    target: str = "onnx",
    activations: Activations | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Lower a model to an artifact: program, tokenizer and manifest, in one folder.

    Lowering never changes a value: the codes and scales of a quantized checkpoint are those of the artifact. The same
    model, release and options give the same bytes.

    Args:
        model: a quantized checkpoint folder; or a full-precision one, or "tiny": its artifact is the full-precision
            program to compare with.
        output: folder to write; nothing may be there, unless `force`.
        target: what to lower to ("onnx").
        activations: format of the inputs of quantized linears: "int8", rounded to blocks at run time, or "fp32"; None
            takes what the plan of the quantized checkpoint says.
        force: replace what is at `output`.
        progress: called after each tensor.

    Returns:
        The artifact, with notes for the user.

    Raises:
        InputError: a bad model or an artifact, an unknown target, a plan that the target cannot hold, int8 activations
            for a full-precision checkpoint, an output that cannot be written: before any work.
    """
    lower, destination = get_exporter(target), Path(output)
    located = locate(model)
    folder = located.require("checkpoint", "quantized checkpoint", verb="export")
    check_free(destination, force=force, inputs=[folder])
    if located.kind == "checkpoint" and activations == "int8":
        raise InputError(
            f"{located.given} is not quantized, and int8 activations meet quantized weights only; "
            "leave --activations out, or run `mossquant quantize` first"
        )
    source = Checkpoint.open(folder) if located.kind == "checkpoint" else QuantizedCheckpoint.open(folder)
    with new_folder(destination, force=force) as partial:
        exported = lower(source, partial, activations=activations, progress=progress)
    return Artifact(destination, exported.manifest, exported.notes)
