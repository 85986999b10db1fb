# SPDX-License-Identifier: Apache-2.0
"""From PyTorch tensors to the arrays that the kernels take, and the checks that the kernels cannot make themselves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["array", "maybe_array", "prepare", "thread_count"]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def prepare(op: str, inputs: Mapping[str, Tensor | None]) -> list[Tensor | None]:
    """The inputs of operation `op` in the dtype it is computed in, contiguous; None stays None.

    That dtype is float64 where all inputs are float64, and float32 where each is float32, bfloat16 or float16.

    Raises:
        ValueError: any other dtypes, or a tensor that is not on the CPU.
    """
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    elsewhere = [f"{name} on {tensor.device}" for name, tensor in given.items() if tensor.device.type != "cpu"]
    if elsewhere:
        raise ValueError(f"{op}: runs on the CPU only; found {', '.join(elsewhere)}")
    if all(tensor.dtype == torch.float64 for tensor in given.values()):
        dtype = torch.float64
    elif all(tensor.dtype in _NARROW for tensor in given.values()):
        dtype = torch.float32
    else:
        found = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in given.items())
        raise ValueError(f"{op}: inputs must all be float64, or each float32, bfloat16 or float16; found {found}")
    return [None if tensor is None else tensor.to(dtype).contiguous() for tensor in inputs.values()]


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor as a NumPy array."""
    return tensor.detach().numpy()


def maybe_array(tensor: Tensor | None) -> np.ndarray[Any, Any] | None:
    return None if tensor is None else array(tensor)


def thread_count(threads: int | None) -> int:
    """How many threads to use; None: as many as PyTorch does.

    Raises:
        ValueError: fewer than one.
    """
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise ValueError(f"threads: must be at least 1, is {threads}")
    return threads
