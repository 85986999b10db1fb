# SPDX-License-Identifier: Apache-2.0
"""Weights as initializers, and the nodes that read them.

    linear     MatMulNBits on packed codes; FusedMatMul where the matrix was kept in a float type
    table      GatherBlockQuantized (an embedding; a tied head shares its codes)
    decoded    small tensors: codes · scales as plain nodes

Scales and kept tensors are stored in their own type: a bf16 initializer behind Cast, a row's scale [N, 1] behind
Expand. onnxruntime folds these and the decoded tensors when it loads the file, so that a step runs none of them.

onnxruntime packs codes that are constant for int8 activations, and reads zeros for scales where these are not constant
(microsoft/onnxruntime#22284). So a matmul's codes lie behind a Reshape that changes nothing: a session that folds the
scales folds them too, and one that doesn't has neither, packs nothing and computes with fp32 activations. Or both are
initializers (`Scales`): the scales as fp32, one a block.

An initializer is called after its tensor, in a layer without `backbone.` and `.weight`; its scales end in `.scale`.
Experts that are stacked in one matmul are `experts.FIRST-LAST`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.weights import Weights
from mossquant.formats import NumberFormat
from mossquant.progress import Progress
from mossquant.targets.onnx.graph import MICROSOFT, Graph, Value
from mossquant.targets.onnx.packing import DTYPES, blocks_of, packed_matrix, to_numpy
from mossquant.targets.taken import activation_of

Stack = Literal["outputs", "inputs"]
Scales = Literal["folded", "initializers"]
"""Scales of matmuls: in their own type, folded to fp32 at load; or stored as fp32."""
SESSION: dict[Scales, list[str]] = {"folded": ["constant folding", "prepacking"], "initializers": ["prepacking"]}
"""What a session must have on for the activations of the plan, and for speed."""
SCALE = ".scale"


def initializer_name(names: Sequence[str]) -> str:
    """The initializer that holds these tensors (several: one per expert, consecutive)."""
    first, last = (_short(name) for name in (names[0], names[-1]))
    if len(names) == 1:
        return first
    before, _, rest = first.partition(".experts.")
    number, _, after = rest.partition(".")
    end = last.partition(".experts.")[2].partition(".")[0]
    return f"{before}.experts.{number}-{end}.{after}"


class Initializers:
    """Puts the weights of a source into graphs.

    Attributes:
        weights: where they come from.
        scales: how those of matmuls are stored.
        stored_bytes: bytes of all initializers made so far.
    """

    def __init__(self, weights: Weights, progress: Progress | None = None, scales: Scales = "folded") -> None:
        self.weights, self.scales = weights, scales
        self.stored_bytes = 0
        self._progress, self._written = progress, 0
        self._matrices: dict[str, tuple[Value, Value]] = {}

    def runs(self, names: Sequence[str]) -> list[list[str]]:
        """Cut a list of tensors into runs that can share one node: same format or type, same activations."""

        def storage(name: str) -> tuple[str, bool]:
            number_format = self.weights.format(name)
            if number_format is None:
                return str(self.weights.kept(name).dtype), False
            return number_format.name, activation_of(self.weights, name) == "int8_block"

        return [list(run) for _, run in groupby(names, key=storage)]

    def padded_inputs(self, name: str) -> int:
        """Inputs of a linear with padding to whole blocks."""
        columns = self.weights.specs[name].matrix_shape[1]
        number_format = self.weights.format(name)
        return columns if number_format is None else blocks_of(number_format, columns) * number_format.activation_block

    def linear(
        self, graph: Graph, x: Value, names: Sequence[str], *, stack: Stack = "outputs", bias: Value | None = None
    ) -> Value:
        """x [..., K] · Wᵀ + bias → [..., N].

        Args:
            graph: where the weights and the node go.
            x: the input.
            names: one tensor, or a run of experts' tensors.
            stack: experts lie one after the other along the outputs, or along the inputs, each padded to whole blocks.
            bias: [N].
        """
        number_format, name = self.weights.format(names[0]), initializer_name(names)
        rows, columns = self.weights.specs[names[0]].matrix_shape
        if stack == "outputs":
            rows *= len(names)
        elif len(names) > 1:
            columns = len(names) * self.padded_inputs(names[0])
        if number_format is None:
            weight = self._float(graph, names, (rows, columns), stack)
            y = graph.op("FusedMatMul", [x, weight], {"transB": 1}, domain=MICROSOFT, name=name)
            return y if bias is None else graph.op("Add", [y, bias])
        codes, scales = self._matrix(graph, names, number_format, stack)
        if self.scales == "folded":
            codes = graph.reshape(codes, 0, 0, 0)
        attributes = {"K": columns, "N": rows, "bits": number_format.bits, "block_size": number_format.activation_block}
        if activation_of(self.weights, names[0]) == "int8_block":
            attributes["accuracy_level"] = 4
        inputs = [x, codes, scales] + ([None, None, bias] if bias is not None else [])
        return graph.op("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)

    def table(self, graph: Graph, tokens: Value, name: str) -> Value:
        """Rows of an embedding [V, D] for tokens [B, T] → [B · T, D]."""
        count, width = self.weights.specs[name].matrix_shape
        number_format = self.weights.format(name)
        if number_format is None:
            table = self._float(graph, [name], (count, width), "outputs")
            return graph.reshape(graph.op("Gather", [table, tokens], {"axis": 0}), -1, width)
        codes, scales = self._matrix(graph, [name], number_format, "outputs")
        block, blocks = number_format.activation_block, blocks_of(number_format, width)
        attributes = {"gather_axis": 0, "quantize_axis": 2, "block_size": block, "bits": number_format.bits}
        cube = graph.reshape(scales, count, blocks, 1)
        padded = graph.op("GatherBlockQuantized", [codes, tokens, cube], attributes, domain=MICROSOFT)
        rows = graph.reshape(padded, -1, blocks * block)
        return rows if blocks * block == width else graph.slice(rows, 0, width, 1)

    def decoded(self, graph: Graph, names: Sequence[str]) -> Value:
        """The fp32 matrix view [rows, columns] of small tensors, stacked along the rows."""
        height, columns = self.weights.specs[names[0]].matrix_shape
        rows, number_format, name = height * len(names), self.weights.format(names[0]), initializer_name(names)
        if number_format is None:
            return self._float(graph, names, (rows, columns), "outputs")
        groups, padded = number_format.groups(columns), number_format.padded_columns(columns)

        def read() -> NDArray[np.generic]:
            parts = [self.weights.quantized(member).codes for member in names]
            return to_numpy(torch.cat(parts).view(rows, groups, -1))

        codes = self._store(graph, name, ir.DataType.INT8, (rows, groups, padded // groups), read)
        scale = self._scales(graph, names, number_format, "outputs", (rows, groups, 1))
        value = graph.op("Mul", [graph.op("Cast", [codes], {"to": ir.DataType.FLOAT}), scale])
        value = graph.reshape(value, rows, padded)
        return value if padded == columns else graph.slice(value, 0, columns, 1)

    def vector(self, graph: Graph, name: str) -> Value:
        """A small tensor as fp32 [n]."""
        return graph.reshape(self.decoded(graph, [name]), -1)

    def _matrix(
        self, graph: Graph, names: Sequence[str], number_format: NumberFormat, stack: Stack
    ) -> tuple[Value, Value]:
        """Codes [N, blocks, bytes] and fp32 scales [N, blocks] of a run. A tied table is stored once."""
        name = initializer_name(names)
        if name in self._matrices:
            return self._matrices[name]
        rows, columns = self.weights.specs[names[0]].matrix_shape
        blocks, experts = blocks_of(number_format, columns), len(names)
        axis: Literal[0, 1] = 0 if stack == "outputs" else 1
        N, beside = (rows * experts, 1) if stack == "outputs" else (rows, experts)
        shape = N, beside * blocks, number_format.activation_block * number_format.bits // 8

        def read() -> NDArray[np.generic]:
            return packed_matrix((self.weights.quantized(member) for member in names), shape, axis=axis)

        codes = self._store(graph, name, ir.DataType.UINT8, shape, read)
        if number_format.group_size is not None or self.scales == "initializers":
            scales = self._scales(graph, names, number_format, stack, (N, beside * blocks), matmul=True)
        else:
            row_scales = self._scales(graph, names, number_format, stack, (N, beside, 1))
            spread = graph.op("Expand", [row_scales, graph.ints(N, beside, blocks)])
            scales = graph.reshape(spread, N, beside * blocks)
        self._matrices[name] = (codes, scales)
        return codes, scales

    def _scales(
        self,
        graph: Graph,
        names: Sequence[str],
        number_format: NumberFormat,
        stack: Stack,
        shape: tuple[int, ...],
        *,
        matmul: bool = False,
    ) -> Value:
        """Scales of a run as fp32, in this shape."""
        dtype = torch.float32 if matmul and self.scales == "initializers" else number_format.scale_dtype

        def read() -> NDArray[np.generic]:
            parts = [self.weights.quantized(member).scales.to(dtype) for member in names]
            scales = torch.cat(parts, 0 if stack == "outputs" else 1)
            return to_numpy(scales.repeat_interleave(math.prod(shape) // scales.numel(), 1)).reshape(shape)

        kind = DTYPES[dtype]
        return _as_float(graph, self._store(graph, initializer_name(names) + SCALE, kind, shape, read))

    def _float(self, graph: Graph, names: Sequence[str], shape: tuple[int, int], stack: Stack) -> Value:
        """Kept tensors as an fp32 matrix, stored in their own type. A tied table is stored once."""
        name = initializer_name(names)
        if name in self._matrices:
            return self._matrices[name][0]

        def read() -> NDArray[np.generic]:
            parts = [self.weights.specs[member].to_matrix(self.weights.kept(member)) for member in names]
            # One alone stays where it is, in the mapped file.
            return to_numpy(torch.cat(parts, 0 if stack == "outputs" else 1) if len(parts) > 1 else parts[0])

        kind = DTYPES[self.weights.kept(names[0]).dtype]
        value = _as_float(graph, self._store(graph, name, kind, shape, read))
        self._matrices[name] = (value, value)
        return value

    def _store(
        self,
        graph: Graph,
        name: str,
        kind: ir.DataType,
        shape: tuple[int, ...],
        read: Callable[[], NDArray[np.generic]],
    ) -> Value:
        size = math.prod(shape) * kind.bitwidth // 8
        self.stored_bytes += size

        def reported() -> NDArray[np.generic]:
            array = read()
            self._written += size
            if self._progress is not None:
                self._progress(name, self._written, self.stored_bytes)
            return array

        return graph.weight(name, kind, shape, reported)


def _short(name: str) -> str:
    return name.removeprefix("backbone.").removesuffix(".weight") if ".layers." in name else name


def _as_float(graph: Graph, value: Value) -> Value:
    if value.dtype == ir.DataType.FLOAT:
        return value
    return graph.op("Cast", [value], {"to": ir.DataType.FLOAT})
