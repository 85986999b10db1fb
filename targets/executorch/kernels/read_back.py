# SPDX-License-Identifier: Apache-2.0
"""Whether a program with kernels of ours holds the weights of its checkpoint: every matrix unpacked and compared, code
for code, scale for scale, with what fills it up; every value bit for bit. The methods share their constants, each of
which is compared once.
"""

from collections.abc import Iterator

import numpy as np

from mossquant.checkpoint.weights import Weights
from mossquant.model.tensors import Stored
from mossquant.targets.executorch.kernels.chain import Held, constants
from mossquant.targets.executorch.open import Opened
from mossquant.targets.native.blocks.calls import Small
from mossquant.targets.native.blocks.constants import held
from mossquant.targets.native.metadata import Layout
from mossquant.targets.native.read_back import compare_codes
from mossquant.targets.program import METHODS
from mossquant.targets.weights_report import first_difference

_EXP_TOLERANCE = 1e-6
"""Relative: exp(A_log) was computed where the program was made, to within a rounding or two of any other exp."""


def compare(opened: Opened, weights: Weights) -> Iterator[str]:
    """A line for every tensor that differs."""
    layout = opened.metadata.layout
    assert layout is not None
    seen: set[tuple[object, ...]] = set()
    for method in METHODS:
        for one in constants(opened.file, method, opened.config):
            place = one.array.__array_interface__["data"][0], one.constant
            if place not in seen:
                seen.add(place)
                line = _compare(one, weights, layout)
                if line is not None:
                    yield f"{method}: {line}"


def _compare(one: Held, weights: Weights, layout: Layout) -> str | None:
    if isinstance(one.constant, Small):
        values = held(weights, one.constant, layout).numpy()
        rounded = one.constant.specs[0].stored is Stored.LOG_OF_DECAY
        if rounded and np.allclose(one.array, values, _EXP_TOLERANCE, 0):
            return None
        difference = first_difference(one.array, values, "value")
        return None if difference is None else f"{one.constant.name}: {difference}"
    spec = one.constant.spec
    number_format = weights.format(spec.name)
    storage = "float32" if number_format is None else number_format.name
    if one.storage != storage:
        return f"{spec.name} is stored in {one.storage}, the checkpoint has {storage}"
    if number_format is None:
        difference = first_difference(one.array, held(weights, one.constant, layout).numpy(), "value")
    else:
        difference = compare_codes(one.array, weights.quantized(spec.name), spec, layout)
    return None if difference is None else f"{spec.name}: {difference}"
