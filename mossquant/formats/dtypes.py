# SPDX-License-Identifier: Apache-2.0
"""Float types by name: those in which checkpoints are stored and tensors are kept."""

import torch

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Every type in which a tensor may be stored or kept, by the name that files use."""

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""What reports call them."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name of any type of PyTorch, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
