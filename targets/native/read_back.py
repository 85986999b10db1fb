# SPDX-License-Identifier: Apache-2.0
"""Whether a .moss holds the weights of its checkpoint: code for code, scale for scale, kept tensors bit for bit.

Every tensor is unpacked and compared in blocks of rows. Unpacking passes over what fills a strip or a line up, which is
compared too: what was unpacked is packed again, and must be the bytes of the file. So are the formats of states.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.space import row_blocks
from mossquant.formats import QuantizedTensor
from mossquant.formats.dtypes import FLOAT_DTYPES, dtype_name
from mossquant.model.mossnet import state_specs
from mossquant.model.tensors import TensorSpec
from mossquant.targets.native.metadata import Layout
from mossquant.targets.native.open import Opened, open_program
from mossquant.targets.native.stored import blocks, kept_bytes, layout_of, pack, unpack
from mossquant.targets.weights_report import WeightsReport, first_difference

_PADDING = "has padding that is not what it was written with"


def read_back(weights: Weights, located: Located) -> WeightsReport:
    """Compare every weight in a .moss with the weights that it was lowered from.

    Raises:
        InputError: the program cannot be read, contradicts the manifest beside it, or is of a model of another shape.
    """
    opened = open_program(located.path)
    if weights.config != opened.config:
        raise InputError(
            f"{located.given} is a model of another shape than {weights.origin.path}; give what it was lowered from"
        )
    differences = []
    for spec in weights.specs.values():
        line = _compare(opened, weights, spec)
        if line is not None:
            differences.append(f"{spec.name}: {line}")
    for state in state_specs(weights.config):
        held, own = opened.states.get(state.name, "fp32"), weights.state(state.name)
        if held != own:
            differences.append(f"{state.name}: is carried in {held}, the checkpoint says {own}")
    return WeightsReport.of(located.given, weights, opened.metadata.source_files, differences)


def _compare(opened: Opened, weights: Weights, spec: TensorSpec) -> str | None:
    number_format, held = weights.format(spec.name), opened.formats[spec.name]
    own = dtype_name(weights.kept(spec.name).dtype) if number_format is None else number_format.name
    if held != own:
        return f"is stored in {held}, the checkpoint has {own}"
    stored = opened.stored(spec.name)
    if number_format is None:
        return _compare_kept(stored, kept_bytes(weights.kept(spec.name)), spec, held)
    return compare_codes(stored, weights.quantized(spec.name), spec, opened.metadata.layout)


def _compare_kept(stored: NDArray[np.uint8], expected: NDArray[np.uint8], spec: TensorSpec, dtype: str) -> str | None:
    size = expected.size
    if all(np.array_equal(stored[part], expected[part]) for part in row_blocks(size, 1)):
        return _PADDING if stored[size:].any() else None
    # Values that differ in a bit differ in one as fp32 too, whatever their type.
    held, wanted = (
        spec.to_matrix(torch.from_numpy(values.copy()).view(FLOAT_DTYPES[dtype]).float().view(spec.shape)).numpy()
        for values in (stored[:size], expected)
    )
    return first_difference(held, wanted, "value")


def compare_codes(
    stored: NDArray[np.uint8], expected: QuantizedTensor, spec: TensorSpec, file_layout: Layout
) -> str | None:
    """The first place where a packed tensor differs from codes and scales, in words; padding is compared too."""
    number_format, layout = expected.format, layout_of(spec, file_layout)
    wanted = expected.codes.numpy()[:, : expected.columns]
    codes, scales, end = np.empty_like(wanted, order="C"), torch.empty_like(expected.scales), 0
    for rows, place in blocks(spec, number_format, file_layout):
        height, end = rows.stop - rows.start, place.stop
        codes[rows], scales[rows] = unpack(number_format, stored[place], height, expected.columns, layout)
    difference = first_difference(codes, wanted, "code")
    difference = difference or first_difference(scales.float().numpy(), expected.scales.float().numpy(), "scale")
    if difference is not None:
        return difference
    for rows, place in blocks(spec, number_format, file_layout):
        if not np.array_equal(stored[place], pack(number_format, codes[rows], scales[rows], layout)):
            return _PADDING
    return _PADDING if stored[end:].any() else None
