# SPDX-License-Identifier: Apache-2.0
"""Whether an .onnx holds the weights of its checkpoint: code for code, scale for scale, kept tensors bit for bit.

The checkpoint says what must be there; `readback` says what the file's nodes see. Nothing may be missing and nothing
may be left over.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.formats import QuantizedTensor
from mossquant.model.tensors import Stored, TensorSpec, Use
from mossquant.targets.onnx.file_graph import FileGraph, Matrix, expanded
from mossquant.targets.onnx.open import open_program
from mossquant.targets.onnx.packing import to_numpy
from mossquant.targets.weights_report import WeightsReport, first_difference

__all__ = ["read_back"]

_EXP_TOLERANCE = 1e-6
"""Relative: −exp(A_log) is computed when the file is loaded, to within a rounding or two of any other exp."""


def read_back(weights: Weights, located: Located) -> WeightsReport:
    """Compare every weight in an .onnx with the weights that it was lowered from.

    Raises:
        InputError: the program cannot be read, or is of a model of another shape.
    """
    opened = open_program(located.path)
    if weights.config != opened.config:
        raise InputError(
            f"{located.given} is a model of another shape than {weights.origin.path}; give what it was lowered from"
        )
    graph = FileGraph(opened)
    differences: list[str] = []
    for spec in weights.specs.values():
        differences += _differences(graph, weights, spec)
        graph.forget()
    differences += [f"{name[:100]} is in the file and belongs to no tensor" for name in _left_over(graph)]
    return WeightsReport.of(located.given, weights, opened.metadata.source_files, differences)


def _left_over(graph: FileGraph) -> list[str]:
    """Weights that no tensor accounts for. Constants, without a dot in their name, are too small to be one: else the
    program was not opened."""
    return sorted(name for name in graph.stored.keys() - graph.read if "." in name)


def _differences(graph: FileGraph, weights: Weights, spec: TensorSpec) -> Iterator[str]:
    """At most one line for each place where the file holds the tensor."""
    expected: QuantizedTensor | NDArray[np.generic]
    if weights.format(spec.name) is None:
        expected = _values(spec, weights.kept(spec.name))
    else:
        expected = weights.quantized(spec.name)
    name = spec.name.removeprefix("backbone.").removesuffix(".weight") if spec.layer is not None else spec.name
    if spec.is_matrix:
        places = _matrices(graph, name, spec)
        found = [_compare(spec, matrix, expected) for matrix in places]
    else:
        found = [_compare_small(graph, name, spec, expected)]
    if not found:
        found = ["is not in the file"]
    yield from (f"{spec.name}: {what}" for what in found if what is not None)


def _values(spec: TensorSpec, tensor: torch.Tensor) -> NDArray[np.generic]:
    """A kept tensor's matrix view in its own type; `_first` makes fp32 of it, which is exact."""
    return to_numpy(spec.to_matrix(tensor))


def _matrices(graph: FileGraph, name: str, spec: TensorSpec) -> Iterator[Matrix]:
    """What every node that reads this matrix sees of it: its own rows or blocks where experts are stacked."""
    nodes = [node for node_name, node in graph.named.items() if name in expanded(node_name)]
    if Use.TABLE in spec.use:
        nodes += graph.lookups
    for node in nodes:
        matrix = graph.matrix(node)
        if matrix is None:
            continue
        stacked = expanded(node.name)
        if len(stacked) > 1:
            matrix = _part(matrix, stacked.index(name), len(stacked), rows=Use.SUMMED not in spec.use)
        yield matrix


def _part(matrix: Matrix, index: int, count: int, *, rows: bool) -> Matrix:
    """One expert of a stacked matrix: its rows, or its columns."""
    if rows:
        each = len(matrix.codes) // count
        own = slice(index * each, (index + 1) * each)
        return Matrix(matrix.bits, matrix.block, matrix.codes[own], matrix.scales[own])
    codes = np.array_split(matrix.codes, count, axis=1)[index]
    scales = matrix.scales if matrix.bits is None else np.array_split(matrix.scales, count, axis=1)[index]
    return Matrix(matrix.bits, matrix.block, codes, scales)


def _compare(spec: TensorSpec, found: Matrix, expected: QuantizedTensor | NDArray[np.generic]) -> str | None:
    if not isinstance(expected, QuantizedTensor):
        if found.bits is not None:
            return f"has {found.bits}-bit codes, the checkpoint keeps it in a float type"
        return first_difference(found.codes, expected, "value")
    number_format = expected.format
    if (found.bits, found.block) != (number_format.bits, number_format.activation_block):
        held = "float values" if found.bits is None else f"{found.bits}-bit codes in blocks of {found.block}"
        return f"has {held}, the checkpoint has {number_format.name}"
    codes = expected.codes.numpy()
    padding = found.codes.shape[1] - codes.shape[1]
    if padding < 0 or len(found.codes) != len(codes):
        return f"has {list(found.codes.shape)} codes, the checkpoint has {list(codes.shape)}"
    difference = first_difference(found.codes, np.pad(codes, ((0, 0), (0, padding))), "code")
    if difference is not None:
        return difference
    scales = expected.scales.float().numpy()
    spread = scales if scales.shape == found.scales.shape else np.broadcast_to(scales, found.scales.shape)
    return first_difference(found.scales, spread, "scale")


def _compare_small(
    graph: FileGraph, name: str, spec: TensorSpec, expected: QuantizedTensor | NDArray[np.generic]
) -> str | None:
    """Codes and scales as stored, then the values that the nodes of the graph make of them."""
    stored = next((one for one in graph.stored if name in expanded(one)), None)
    data = None if stored is None else graph.value(stored)
    if stored is None or data is None:
        return "is not in the file"
    index, count = expanded(stored).index(name), len(expanded(stored))
    rows = spec.matrix_shape[0]
    own = slice(index * rows, (index + 1) * rows)
    if isinstance(expected, QuantizedTensor):
        scales = graph.value(f"{stored}.scale")
        if scales is None:
            return "has no scales in the file"
        difference = first_difference(data.reshape(rows * count, -1)[own], expected.codes.numpy(), "code")
        difference = difference or first_difference(
            scales.astype(np.float32).reshape(rows * count, -1)[own], expected.scales.float().numpy(), "scale"
        )
        values = expected.dequantize().numpy()
    else:
        difference, values = (
            first_difference(data.astype(np.float32).reshape(rows * count, -1)[own], expected, "value"),
            expected,
        )
    if difference is not None:
        return difference
    return _compare_used(graph.used(stored), spec, values)


def _compare_used(used: list[NDArray[Any]], spec: TensorSpec, values: NDArray[np.generic]) -> str | None:
    """What the nodes that run see of a small tensor: of an expert's, the rows of all experts, one after the other."""
    if spec.stored is Stored.LOG_OF_DECAY:
        decay = spec.stored.values(torch.from_numpy(values.astype(np.float64))).numpy().T
        close = len(used) == 1 and used[0].shape == decay.shape and np.allclose(used[0], decay, _EXP_TOLERANCE, 0)
        return None if close else "is not used as −exp(A_log) transposed"
    rows, columns = spec.matrix_shape
    seen = np.concatenate([part.reshape(-1) for part in used]) if used else np.empty(0, np.float32)
    first, fits = rows * (spec.expert or 0), seen.size == rows * columns
    if spec.expert is not None:
        fits = seen.size % columns == 0 and seen.size >= (first + rows) * columns
    if not fits:
        return f"is used as {seen.size} values, the checkpoint has {values.size}"
    seen = seen.reshape(-1, columns)[first : first + rows]
    if len(used) > 1 and sorted(map(bytes, seen)) == sorted(map(bytes, np.ascontiguousarray(values, seen.dtype))):
        return None  # taps, which may be taken in any order: nodes have none
    return first_difference(seen, values, "decoded value")
