# SPDX-License-Identifier: Apache-2.0
"""The reference with other rounding: what fp32 leaves open when values are quantized at run time.

A value may lie so near the border between two codes that fp32 rounding decides, and one code that falls the other way
moves everything after it by as much as quantizing did. Two faithful implementations therefore differ now and then; most
often in the first block, where the rows of a quantized embedding hold values exactly half-way between two codes. How
often and how much is found by running the reference with noise of a few roundings on the inputs before their codes.
"""

import torch
from torch import Tensor

from mossquant.targets.torch.runner import TorchRunner

NOISE = 2e-7
"""Size of the noise, relative to a value and to the root mean square of its vector: three fp32 roundings."""
_SEED = 0


def with_noise(reference: TorchRunner) -> TorchRunner | None:
    """The same model with noise before the codes, other noise in every row; None where nothing is quantized."""
    activation = reference.activation
    if activation is None:
        return None
    generator = torch.Generator().manual_seed(_SEED)

    def seen(name: str, x: Tensor) -> Tensor:
        size = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
        return activation(name, x + NOISE * size * torch.randn(x.shape, generator=generator, dtype=x.dtype))

    return reference.with_activation(seen, name="with noise")
