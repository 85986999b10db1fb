# SPDX-License-Identifier: Apache-2.0
"""What stands in a program for the tensors of a checkpoint: matrices packed as in a .moss, and small tensors as kernels
read them, in fp32: the values that their codes mean, exactly.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.weights import Weights, value
from mossquant.formats import FORMATS
from mossquant.model.tensors import Stored
from mossquant.targets.native.blocks.calls import Matrix, Small
from mossquant.targets.native.metadata import Layout
from mossquant.targets.native.stored import packed_blocks, packed_size

LANES = 16
"""Channels of a strip: `kMaxLanes` of the kernels."""


def strip_count(channels: int) -> int:
    """Strips of so many channels."""
    return -(-channels // LANES)


def in_strips(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[..., E, N] → [..., strips, N, 16], the last strip filled up with zeros."""
    *before, channels, states = values.shape
    padded = np.zeros((*before, strip_count(channels) * LANES, states), np.float32)
    padded[..., :channels, :] = values
    return np.ascontiguousarray(padded.reshape(*before, -1, LANES, states).swapaxes(-1, -2))


def out_of_strips(strips: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """The inverse of `in_strips`."""
    *before, count, states, lanes = strips.shape
    rows = strips.swapaxes(-1, -2).reshape(*before, count * lanes, states)
    return np.ascontiguousarray(rows[..., :channels, :])


def held(weights: Weights, constant: Matrix | Small, layout: Layout) -> Tensor:
    """What stands in a program for a constant.

    Matrices: uint8 [bytes], or fp32 [N, K] where they are kept. Small tensors, fp32: norms, biases and D [n]; routers
    [X, D]; the convolution [W, E]; biases of experts one below the other [X, E]; A log2(e) in strips [strips, N, 16],
    computed in fp64 and rounded once.
    """
    if isinstance(constant, Matrix):
        spec = constant.spec
        if weights.format(spec.name) is None:
            return spec.to_matrix(weights.kept(spec.name)).float().contiguous()
        return torch.from_numpy(np.concatenate(list(packed_blocks(weights.quantized(spec.name), spec, layout))))
    spec = constant.specs[0]
    if spec.stored is Stored.LOG_OF_DECAY:
        decay = spec.stored.values(value(weights, spec.name).double()) * math.log2(math.e)
        return torch.from_numpy(in_strips(decay.float().numpy()))
    if spec.role in _AS_ROWS:
        return torch.cat([own.to_matrix(value(weights, own.name)) for own in constant.specs]).contiguous()
    return value(weights, spec.name).contiguous()


def form(constant: Matrix | Small, storage: str, layout: Layout) -> tuple[type[np.generic], tuple[int, ...]]:
    """Type and shape of what `held` gives, of a matrix by the format that it is stored in or "float32"."""
    if isinstance(constant, Matrix):
        if storage == "float32":
            return np.float32, constant.spec.matrix_shape
        return np.uint8, (packed_size(constant.spec, FORMATS[storage], layout),)
    spec = constant.specs[0]
    if spec.stored is Stored.LOG_OF_DECAY:
        channels, states = spec.shape
        return np.float32, (strip_count(channels), states, LANES)
    if spec.role in _AS_ROWS:
        rows, columns = spec.matrix_shape
        return np.float32, (len(constant.specs) * rows, columns)
    return np.float32, spec.shape


_AS_ROWS = {"ssm.conv", "ssm.expert.dt_bias"}
"""Those that stand there as matrices."""
