# SPDX-License-Identifier: Apache-2.0
"""Opens an .onnx of ours: what it says about itself, the files beside it, its graph; then it is tried."""

from pathlib import Path

import onnxruntime as ort

from mossquant.errors import InputError
from mossquant.model.mossnet import state_specs
from mossquant.targets.artifact import check_beside
from mossquant.targets.onnx.metadata import Metadata, Opened, read_program
from mossquant.targets.onnx.structure import check_structure, check_values
from mossquant.targets.trial import EXTRA_BYTES, try_apart

_RUN = "mossquant.targets.onnx.session:run"


def open_program(path: Path) -> Opened:
    """Read and check an .onnx of ours, and the manifest, tokenizer and weights beside it.

    Raises:
        InputError: as `read_program`; it contradicts the manifest, or other weights or another tokenizer lie there; a
            graph that does not hold what its config says.
    """
    opened = read_program(path)
    _check_files(opened)
    check_structure(opened)
    return opened


def open_to_run(path: Path) -> Opened:
    """Read and check an .onnx of ours, its values too, and run it once in the child process; then it may be loaded.

    Raises:
        InputError: as `open_program`; values that are no numbers; onnxruntime is too old, or cannot load or run it, or
            brought the child process down.
    """
    opened = open_program(path)
    _check_runtime(path, opened.metadata)
    check_values(opened)
    states = state_specs(opened.config)
    try_apart(
        path,
        " ".join(opened.hashes.values()),
        _RUN,
        arguments={
            "vocabulary": opened.config.vocab_size,
            "states": {spec.name: spec.shape for spec in states},
            "growing": {spec.name: spec.grows for spec in states if spec.grows is not None},
        },
        extra_bytes=EXTRA_BYTES + 4 * opened.bytes,
    )
    return opened


def _check_files(opened: Opened) -> None:
    path, data = opened.path, opened.metadata.data
    if data is not None and opened.hashes[data.name] != data.sha256:
        raise InputError(
            f"{path.parent / data.name} is not the file that {path.name} was written with (another SHA-256); "
            "copy the artifact's folder again, or export again"
        )
    check_beside(path, opened.hashes, opened.metadata)


def _check_runtime(path: Path, metadata: Metadata) -> None:
    if _release(ort.__version__) < _release(metadata.runtime_minimum):
        raise InputError(
            f"{path} needs onnxruntime {metadata.runtime_minimum} or later and {ort.__version__} is installed; "
            "upgrade it"
        )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
