# SPDX-License-Identifier: Apache-2.0
"""A number format: what a matrix becomes when it is quantized, and back.

    value[n, k] = code[n, k] · scale[n, k // G]          symmetric: the zero point is 0

A matrix [rows, columns] is padded with zero codes to [rows, padded_columns]; each row is cut into groups of G columns
that share a scale (G = None: one scale a row). Scales are rounded to their stored type before codes are rounded, so
that what is stored is what was solved for. Formats know codes and scales only; packing lies with whoever stores them.

8-bit codes leave −128 out: the range is symmetric, and no kernel meets (−128)², of which two overflow an int16. 4-bit
codes have one more below zero than above; `absmax_scales` uses ±7 and leaves −8 to solvers that search.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mossquant.errors import InputError

_WORD_BITS = 32
_ROW_BLOCK = 32


@dataclass(frozen=True)
class NumberFormat:
    """Codes of some width with a scale per row or per group of columns.

    Attributes:
        name: the name used in recipes, ledgers and reports.
        bits: bits of a code, 4 or 8.
        group_size: G, columns that share a scale; None for one scale a row.
        scale_dtype: stored type of the scales, torch.float32 or torch.bfloat16.
        code_min: smallest code.
        code_max: largest code.
    """

    name: str
    bits: int
    group_size: int | None
    scale_dtype: torch.dtype
    code_min: int
    code_max: int

    @property
    def min_scale(self) -> float:
        """Smallest scale: the smallest normal number of the scale type, so that no scale underflows to zero."""
        return torch.finfo(self.scale_dtype).tiny

    @property
    def max_scale(self) -> float:
        """Largest scale: no code times this overflows fp32."""
        return torch.finfo(self.scale_dtype).max / 2.0 ** (self.bits - 1)

    @property
    def activation_block(self) -> int:
        """Values of an input that share a scale where inputs are quantized in blocks: the group, 32 for whole rows."""
        return self.group_size or _ROW_BLOCK

    def padded_columns(self, columns: int) -> int:
        """Columns stored for a row: whole groups; for one scale a row, whole 32-bit words of codes."""
        unit = self.group_size or _WORD_BITS // self.bits
        return -(-columns // unit) * unit

    def groups(self, columns: int) -> int:
        """Scales stored for a row."""
        return 1 if self.group_size is None else self.padded_columns(columns) // self.group_size

    def payload_bytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, padding and scales of a matrix [rows, columns]."""
        codes = self.padded_columns(columns) * self.bits // 8
        return rows * (codes + self.groups(columns) * self.scale_dtype.itemsize)

    def grouped(self, matrix: Tensor) -> Tensor:
        """[rows, columns] → [rows, groups, group], padded with zeros; the group is a whole row where there are none."""
        columns = matrix.shape[1]
        padded = self.padded_columns(columns)
        if padded > columns:
            matrix = torch.nn.functional.pad(matrix, (0, padded - columns))
        return matrix.reshape(matrix.shape[0], self.groups(columns), -1)

    def round_scales(self, scales: Tensor) -> Tensor:
        """Scales rounded to the stored type, within `min_scale` and `max_scale`; not positive ones become 1."""
        scales = torch.where(scales > 0, scales, 1.0).clamp(self.min_scale, self.max_scale)
        return scales.to(self.scale_dtype)

    def absmax_scales(self, matrix: Tensor) -> Tensor:
        """Scales [rows, groups] in the stored type with which code_max is the largest absolute value of the group.

        A bf16 scale is rounded by at most a factor 1 + 2⁻⁸, which moves the largest value from code_max ≤ 127 to at
        most 127.496: it still rounds to code_max, so nothing is clipped and every error is at most half a scale.
        A group of zeros gets scale 1.
        """
        return self.round_scales(self.grouped(matrix).abs().amax(-1) / self.code_max)

    def quantize(self, matrix: Tensor, scales: Tensor) -> "QuantizedTensor":
        """Round a matrix to codes, to nearest, ties to even.

        Args:
            matrix: fp32 [rows, columns], finite.
            scales: [rows, groups]; rounded to the stored type first.
        """
        rows, columns = matrix.shape
        stored = self.round_scales(scales)
        codes = (self.grouped(matrix) / stored.float().unsqueeze(-1)).round_().clamp_(self.code_min, self.code_max)
        return QuantizedTensor(self, codes.to(torch.int8).view(rows, -1), stored, rows, columns)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix.

    Attributes:
        format: its number format.
        codes: int8 [rows, padded_columns]; the codes of the padding are 0.
        scales: [rows, groups] in the format's scale type, positive and finite.
        rows: rows of the matrix.
        columns: columns of the matrix, without padding.
    """

    format: NumberFormat
    codes: Tensor
    scales: Tensor
    rows: int
    columns: int

    @property
    def padded_columns(self) -> int:
        """Columns with padding."""
        return self.format.padded_columns(self.columns)

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, padding and scales."""
        return self.format.payload_bytes(self.rows, self.columns)

    def dequantize(self) -> Tensor:
        """code · scale, fp32 [rows, columns] (exact for bf16 scales; rounded once for fp32 scales)."""
        groups = self.codes.view(self.rows, self.scales.shape[1], -1).float()
        values = groups * self.scales.float().unsqueeze(-1)
        return values.view(self.rows, -1)[:, : self.columns].contiguous()


FORMATS: dict[str, NumberFormat] = {
    known.name: known
    for known in (
        NumberFormat("int8", 8, None, torch.float32, -127, 127),
        NumberFormat("int8_g32", 8, 32, torch.bfloat16, -127, 127),
        NumberFormat("int4_g32", 4, 32, torch.bfloat16, -8, 7),
        NumberFormat("int4_g128", 4, 128, torch.bfloat16, -8, 7),
    )
}
"""Every number format, by the name that recipes use."""


def get_format(name: str) -> NumberFormat:
    """The number format of that name.

    Raises:
        InputError: no such format; the known names are listed.
    """
    if name not in FORMATS:
        raise InputError.unknown("number format", name, FORMATS)
    return FORMATS[name]
