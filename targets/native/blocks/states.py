# SPDX-License-Identifier: Apache-2.0
"""State arrays as the operators take them, in the form in which kernels read them: the window of the convolution
[W−1, E] and the state of the SSM [strips, N, 16].
"""

import numpy as np
from numpy.typing import NDArray

from mossquant.model.tensors import StateSpec
from mossquant.targets.native.blocks.constants import LANES, in_strips, out_of_strips, strip_count


def held_shape(spec: StateSpec) -> tuple[int, ...]:
    """The shape, without the batch axis."""
    channels, columns = spec.shape
    return (columns, channels) if _is_window(spec) else (strip_count(channels), columns, LANES)


def to_held(spec: StateSpec, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """From the shape that every Runner reads and writes, with the batch axis or without."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)) if _is_window(spec) else in_strips(array)


def from_held(spec: StateSpec, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `to_held`."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)) if _is_window(spec) else out_of_strips(array, spec.shape[0])


def _is_window(spec: StateSpec) -> bool:
    return spec.role == "ssm.conv_state"
