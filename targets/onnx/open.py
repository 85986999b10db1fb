# SPDX-License-Identifier: Apache-2.0
"""Opens an .onnx of ours: what it says about itself, then its graph, before anything looks into it or runs it."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mossquant.errors import InputError
from mossquant.targets.onnx.metadata import Opened, initializers, read_metadata
from mossquant.targets.onnx.structure import check_structure

__all__ = ["open_program"]


def open_program(path: Path) -> Opened:
    """Read and check an .onnx of ours, its graph too.

    Raises:
        InputError: as `read_metadata`; a graph that cannot be parsed, that reads weights from another file, or that is
            not the one that its config lowers to.
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


def _names_are_text(graph: onnx.GraphProto) -> bool:
    """Whether every name is UTF-8: the library gives bytes where one is not."""
    names = []
    for tensor in initializers(graph):
        names += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for node in graph.node:
        names += [node.name, node.op_type, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
        if not all(_names_are_text(attribute.g) for attribute in node.attribute if attribute.HasField("g")):
            return False
    return all(isinstance(name, str) for name in names)
