# SPDX-License-Identifier: Apache-2.0
"""Opens an .onnx of ours: what it says about itself, then its graph, before anything looks into it or runs it."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mossquant.errors import InputError
from mossquant.model.mossnet import state_specs
from mossquant.targets.onnx.metadata import Opened, graphs, initializers, read_metadata
from mossquant.targets.onnx.structure import check_structure, check_values
from mossquant.targets.trial import EXTRA_BYTES, try_apart

__all__ = ["open_program", "open_to_run"]

_RUN = "mossquant.targets.onnx.session:run"


def open_program(path: Path) -> Opened:
    """Read and check an .onnx of ours, its graph too.

    Raises:
        InputError: as `read_metadata`; a graph that cannot be parsed, that reads weights from another file, or that
            does not hold what its config says.
    """
    metadata = read_metadata(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        readable = _names_are_text(proto.graph)
    except DecodeError:
        readable = False
    if not readable:
        raise InputError(
            f"{path} is not a readable ONNX file (damaged); copy the artifact's folder again, or export again"
        )
    known = metadata.data.name if metadata.data else None
    tensors = initializers(proto.graph)
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    foreign = [place[:80] for place in sorted(places) if place != known]
    if foreign:
        advice = "Copy the artifact's folder again, or export again."
        raise InputError.listing(f"{path} reads weights from other files than its own", foreign, advice)
    opened = Opened(path, proto, metadata)
    check_structure(opened)
    return opened


def open_to_run(path: Path, hashes: Mapping[str, str] | None = None) -> Opened:
    """Read and check an .onnx of ours, its values too, and run it once in the child process; then it may be loaded.

    Args:
        path: the file.
        hashes: of the program and its external weights, where they are known.

    Raises:
        InputError: as `open_program`; values that are no numbers; it cannot be loaded or run, or brought the child
            process down.
    """
    opened = open_program(path)
    check_values(opened)
    states = {spec.name: spec.shape for spec in state_specs(opened.config)}
    try_apart(
        path,
        " ".join((hashes or opened.hashes()).values()),
        _RUN,
        arguments={"vocabulary": opened.config.vocab_size, "states": states},
        extra_bytes=EXTRA_BYTES + 4 * opened.bytes,
    )
    return opened


def _names_are_text(graph: onnx.GraphProto) -> bool:
    """Whether every name is UTF-8: the library gives bytes where one is not."""
    names = [value.name for inner in graphs(graph) for value in (*inner.input, *inner.output)]
    for tensor in initializers(graph):
        names += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for node in (node for inner in graphs(graph) for node in inner.node):
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    return all(isinstance(name, str) for name in names)
