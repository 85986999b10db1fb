# SPDX-License-Identifier: Apache-2.0
"""What XNNPACK makes of the matrices (`mossquant.targets.program.Matrices`): linears with the checkpoint's own codes.

A quantized matrix becomes a linear whose weight is torchao's tensor of codes and scales and whose input is rounded at
run time (`int8_row_asym`): the pattern that the XNNPACK partitioner takes as one quantized matmul. Nothing is quantized
here; codes and scales are those of the checkpoint.

    stacked   the matrices of a run of experts one below the other
    summed    weights with groups: side by side along the inputs, each expert padded to whole groups, so that no group
              belongs to two experts; one matmul sums them. Weights with one scale a row: a linear an expert, and a sum
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.checkpoint.weights import Weights, value
from mossquant.formats import QuantizedTensor
from mossquant.formats.nibbles import pack_nibbles
from mossquant.targets.executorch.packages import intx_tensor

_CAT = 4
"""Tensors that XNNPACK puts side by side in one node."""
_TABLE_RANGE = {4: (-8, 7), 8: (-128, 127)}


class _Linear(nn.Module):
    """y = x · Wᵀ, x padded with zeros to the columns of W."""

    weight: Tensor

    def __init__(self, weight: Tensor, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.padding = weight.shape[1] - columns

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] → [T, N]."""
        return F.linear(F.pad(x, (0, self.padding)) if self.padding else x, self.weight)


class _Runs(nn.Module):
    """Runs of experts on the same input, outputs side by side."""

    def __init__(self, runs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = nn.ModuleList(runs)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] → [T, X · N]."""
        parts = [run(x) for run in self.runs]
        while len(parts) > 1:
            parts = [torch.cat(parts[i : i + _CAT], -1) for i in range(0, len(parts), _CAT)]
        found: Tensor = parts[0]
        return found


class _Sum(nn.Module):
    """Σ of runs of experts: each run one linear over its experts side by side, or one expert."""

    def __init__(self, runs: Sequence[nn.Module], counts: Sequence[int], padding: Sequence[int]) -> None:
        super().__init__()
        self.runs, self.counts, self.padding = nn.ModuleList(runs), tuple(counts), tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        """[T, X, K] → [T, N]."""
        total, first = None, 0
        for run, count, padding in zip(self.runs, self.counts, self.padding, strict=True):
            own = x[:, first : first + count]
            own = F.pad(own, (0, padding)) if padding else own
            part: Tensor = run(own.reshape(-1, count * own.shape[2]))
            total, first = part if total is None else total + part, first + count
        assert total is not None
        return total


class _Table(nn.Module):
    """Rows of a quantized table."""

    codes: Tensor
    scales: Tensor

    def __init__(self, table: QuantizedTensor) -> None:
        super().__init__()
        codes, self.bits, self.columns = table.codes, table.format.bits, table.columns
        if table.format.group_size is None:
            codes = codes[:, : table.columns]
        if self.bits == 4:
            codes = torch.from_numpy(pack_nibbles(codes.numpy(), first="high"))
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", table.scales.float())

    def forward(self, tokens: Tensor) -> Tensor:
        """[T] → [T, D]."""
        ops = torch.ops.quantized_decomposed
        look_up = ops.embedding_4bit.default if self.bits == 4 else ops.embedding_byte.default
        found: Tensor = look_up(self.codes, self.scales, None, *_TABLE_RANGE[self.bits], tokens)
        return found[:, : self.columns] if found.shape[1] > self.columns else found


class _FloatTable(nn.Module):
    """Rows of a table that is kept."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[T] → [T, D]."""
        return F.embedding(tokens, self.weight)


def runs_of(weights: Weights, names: Sequence[str], *, apart: bool = False) -> list[list[str]]:
    """Cut a list of experts into runs of one format; `apart`: those with one scale a row, each alone."""

    def storage(item: tuple[int, str]) -> tuple[str, int]:
        number_format = weights.format(item[1])
        if number_format is None:
            return "kept", -1
        return number_format.name, item[0] if apart and number_format.group_size is None else -1

    return [[name for _, name in run] for _, run in groupby(enumerate(names), key=storage)]


class XnnpackMatrices:
    """Linears and tables of a model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def stacked(self, names: Sequence[str]) -> nn.Module:
        """x [T, K] → [T, X · N]."""
        runs = []
        for run in runs_of(self._weights, names):
            weight = self._weight(run, 0)
            runs.append(_Linear(weight, self._weights.specs[run[0]].matrix_shape[1]))
        return runs[0] if len(runs) == 1 else _Runs(runs)

    def summed(self, names: Sequence[str]) -> nn.Module:
        """x [T, X, K] → [T, N]."""
        runs, counts, padding = [], [], []
        for run in runs_of(self._weights, names, apart=True):
            weight, columns = self._weight(run, 1), self._weights.specs[run[0]].matrix_shape[1]
            runs.append(_Linear(weight, weight.shape[1]))
            counts.append(len(run))
            padding.append(weight.shape[1] // len(run) - columns)
        return _Sum(runs, counts, padding)

    def table(self, name: str) -> nn.Module:
        """tokens [T] → [T, D]."""
        if self._weights.format(name) is None:
            return _FloatTable(self._weights.kept(name).float())
        return _Table(self._weights.quantized(name))

    def value(self, name: str) -> Tensor:
        """A small tensor as fp32, in its shape in the checkpoint."""
        return value(self._weights, name)

    def _weight(self, run: Sequence[str], axis: int) -> Tensor:
        """The matrices of a run, one after the other along an axis."""
        weights, number_format = self._weights, self._weights.format(run[0])
        if number_format is None:
            return torch.cat([weights.specs[name].to_matrix(weights.kept(name)).float() for name in run], axis)
        tensors = [weights.quantized(name) for name in run]
        # Whole groups, and not the whole words in which a checkpoint stores rows.
        columns = tensors[0].columns if number_format.group_size is None else tensors[0].padded_columns
        codes = torch.cat([tensor.codes[:, :columns] for tensor in tensors], axis)
        return intx_tensor(codes.contiguous(), torch.cat([tensor.scales for tensor in tensors], axis), number_format)
