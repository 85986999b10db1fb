# SPDX-License-Identifier: Apache-2.0
"""Opens what a PATH argument points at as `Weights`."""

from pathlib import Path

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.locate import Located, locate
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import Weights


def open_weights(source: str | Path | Located | Weights, *, verb: str, check_codes: bool = False) -> Weights:
    """The weights at a PATH argument; what is `Weights` already is given back.

    Args:
        source: a checkpoint folder, quantized or not, or the name "tiny"; or weights.
        verb: what they are needed for, for the error.
        check_codes: also look at every code of a quantized checkpoint, for whoever takes them elsewhere.

    Raises:
        InputError: no checkpoint is there, or a damaged one.
    """
    if isinstance(source, str | Path):
        source = locate(source)
    if not isinstance(source, Located):
        return source
    folder = source.require("checkpoint", "quantized checkpoint", verb=verb)
    if source.kind == "checkpoint":
        return Checkpoint.open(folder, path=source.given)
    quantized = QuantizedCheckpoint.open(folder, path=source.given)
    if check_codes:
        quantized.check_codes()
    return quantized
