# SPDX-License-Identifier: Apache-2.0
"""Where a model is run."""

import torch

from mossquant.errors import InputError


def check_device(device: str) -> None:
    """Raise `InputError`: neither the CPU nor a CUDA device that PyTorch finds."""
    if device not in ("cpu", "cuda"):
        raise InputError.unknown("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was asked for and PyTorch finds no CUDA device; use --device cpu")
