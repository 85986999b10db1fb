# SPDX-License-Identifier: Apache-2.0
"""Whether an .onnx holds the weights of its checkpoint: code for code, scale for scale, kept tensors bit for bit.

The checkpoint says what must be there; `FileGraph` says what the file's nodes see. Nothing may be missing and nothing
may be left over.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.formats import QuantizedTensor
from mossquant.model.tensors import Stored, TensorSpec, Use
from mossquant.targets.onnx.file_graph import FileGraph, Matrix, holders
from mossquant.targets.onnx.initializers import SCALE, initializer_name
from mossquant.targets.onnx.open import open_program
from mossquant.targets.onnx.packing import to_numpy
from mossquant.targets.weights_report import WeightsReport, first_difference

_EXP_TOLERANCE = 1e-6
"""Relative: −exp(A_log) is computed when the file is loaded, to within a rounding or two of any other exp."""
_MISSING = "is not in the file"


def read_back(weights: Weights, located: Located) -> WeightsReport:
    """Compare every weight in an .onnx with the weights that it was lowered from.

    Raises:
        InputError: the program cannot be read, contradicts the manifest beside it, or is of a model of another shape.
    """
    opened = open_program(located.path)
    if weights.config != opened.config:
        raise InputError(
            f"{located.given} is a model of another shape than {weights.origin.path}; give what it was lowered from"
        )
    graph = FileGraph(opened)
    names = {initializer_name([spec.name]): spec for spec in weights.specs.values()}
    nodes, stored = holders(graph.named, names), holders(graph.stored, names)
    differences: list[str] = []
    for name, spec in names.items():
        quantized = weights.format(spec.name) is not None
        expected = weights.quantized(spec.name) if quantized else to_numpy(spec.to_matrix(weights.kept(spec.name)))
        if spec.is_matrix:
            matrices = _matrices(graph, nodes.get(name, []), spec)
            lines = [_compare(matrix, expected) for matrix in matrices] or [_MISSING]
        else:
            lines = [_compare_small(graph, stored.get(name, []), spec, expected)]
        differences += [f"{spec.name}: {line}" for line in lines if line is not None]
        graph.forget()
    differences += [f"{name[:100]} is in the file and belongs to no tensor" for name in _left_over(graph)]
    return WeightsReport.of(located.given, weights, opened.metadata.source_files, differences)


def _left_over(graph: FileGraph) -> list[str]:
    """Weights that no tensor accounts for. Constants, without a dot in their name, are too small to be one: else the
    program was not opened."""
    return sorted(name for name in graph.stored.keys() - graph.read if "." in name)


def _matrices(graph: FileGraph, places: Sequence[tuple[str, int, int]], spec: TensorSpec) -> Iterator[Matrix]:
    """What every node that reads this matrix sees of it: its own rows or blocks where experts are stacked."""
    nodes = [(graph.named[name], index, count) for name, index, count in places]
    if Use.TABLE in spec.use:
        nodes += [(node, 0, 1) for node in graph.lookups]
    for node, index, count in nodes:
        matrix = graph.matrix(node)
        if matrix is not None:
            yield matrix if count == 1 else _part(matrix, index, count, rows=Use.SUMMED not in spec.use)


def _part(matrix: Matrix, index: int, count: int, *, rows: bool) -> Matrix:
    """One expert of a stacked matrix: its rows, or its columns."""
    if rows:
        height = len(matrix.codes) // count
        own = slice(index * height, (index + 1) * height)
        return Matrix(matrix.bits, matrix.block, matrix.codes[own], matrix.scales[own])
    codes = np.array_split(matrix.codes, count, axis=1)[index]
    scales = matrix.scales if matrix.bits is None else np.array_split(matrix.scales, count, axis=1)[index]
    return Matrix(matrix.bits, matrix.block, codes, scales)


def _compare(matrix: Matrix, expected: QuantizedTensor | NDArray[np.generic]) -> str | None:
    if not isinstance(expected, QuantizedTensor):
        if matrix.bits is not None:
            return f"has {matrix.bits}-bit codes, the checkpoint keeps it in a float type"
        return first_difference(matrix.codes, expected, "value")
    number_format = expected.format
    if (matrix.bits, matrix.block) != (number_format.bits, number_format.activation_block):
        held = "float values" if matrix.bits is None else f"{matrix.bits}-bit codes in blocks of {matrix.block}"
        return f"has {held}, the checkpoint has {number_format.name}"
    codes, scales = expected.codes.numpy(), expected.scales.float().numpy()
    padding = matrix.codes.shape[1] - codes.shape[1]
    if padding < 0 or len(matrix.codes) != len(codes):
        return f"has {list(matrix.codes.shape)} codes, the checkpoint has {list(codes.shape)}"
    difference = first_difference(matrix.codes, np.pad(codes, ((0, 0), (0, padding))), "code")
    return difference or first_difference(matrix.scales, np.broadcast_to(scales, matrix.scales.shape), "scale")


def _compare_small(
    graph: FileGraph,
    places: Sequence[tuple[str, int, int]],
    spec: TensorSpec,
    expected: QuantizedTensor | NDArray[np.generic],
) -> str | None:
    """Codes and scales as stored, then the values that the nodes of the graph make of them."""
    stored, index, count = places[0] if places else ("", 0, 1)
    data = graph.value(stored)
    if data is None:
        return _MISSING
    height = spec.matrix_shape[0]

    def own(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(height * count, -1)[index * height : (index + 1) * height]

    if isinstance(expected, QuantizedTensor):
        scales, values = graph.value(stored + SCALE), expected.dequantize().numpy()
        if scales is None:
            return "has no scales in the file"
        difference = first_difference(own(data), expected.codes.numpy(), "code") or first_difference(
            own(scales.astype(np.float32)), expected.scales.float().numpy(), "scale"
        )
    else:
        difference, values = first_difference(own(data.astype(np.float32)), expected, "value"), expected
    return difference or _compare_used(graph.used(stored), spec, values)


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
