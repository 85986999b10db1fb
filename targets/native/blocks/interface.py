# SPDX-License-Identifier: Apache-2.0
"""The structures and functions of `runtime/moss_blocks.h` through ctypes: pointers to tensors, nothing is copied."""

import ctypes
import threading
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from mossquant.targets.native.library import Options, checked, load_library

_Pointer, _Int64 = ctypes.c_void_p, ctypes.c_int64


class MatrixData(ctypes.Structure):
    """`moss_matrix`."""

    _fields_ = (("data", _Pointer), ("bytes", _Int64), ("format", ctypes.c_int32), ("layout", ctypes.c_int32))


class Shape(ctypes.Structure):
    """`moss_shape`."""

    _fields_ = (
        *((name, _Int64) for name in ("hidden", "inner", "states", "width", "rank", "mlp_hidden")),
        ("eps", ctypes.c_float),
    )


class SsmData(ctypes.Structure):
    """`moss_ssm`."""

    _fields_ = (
        *((name, _Int64) for name in ("experts", "chosen")),
        *((name, _Pointer) for name in ("norm", "router")),
        ("in_proj", MatrixData),
        *((name, _Pointer) for name in ("conv", "conv_bias")),
        *((name, ctypes.POINTER(MatrixData)) for name in ("x_proj", "dt_proj")),
        *((name, _Pointer) for name in ("dt_bias", "rate", "D")),
        ("out_proj", MatrixData),
    )


class MlpData(ctypes.Structure):
    """`moss_mlp`."""

    _fields_ = (
        *((name, _Int64) for name in ("experts", "chosen")),
        *((name, _Pointer) for name in ("norm", "router")),
        *((name, ctypes.POINTER(MatrixData)) for name in ("w1", "w3", "w2")),
    )


class _Held:
    """A `moss_worker`, freed when nothing refers to it."""

    def __init__(self, threads: int) -> None:
        library = load_library()
        self.handle = checked(library.moss_worker_create(ctypes.byref(Options(threads, None)), None))
        finalize(self, library.moss_worker_free, self.handle)


class _Own(threading.local):
    """One for each thread that calls: a worker is not for two at once."""

    threads = 0
    held: _Held | None = None

    def worker(self) -> Any:
        """With as many threads as PyTorch has now."""
        if self.held is None or self.threads != torch.get_num_threads():
            self.threads = torch.get_num_threads()
            self.held = _Held(self.threads)
        return self.held.handle


_OWN = _Own()


def call(function: str, *arguments: Any) -> None:
    """Call a function with this thread's worker and what it takes behind it.

    Raises:
        MossError: libmoss refuses the arguments.
    """
    checked(getattr(load_library(), function)(_OWN.worker(), *arguments) == 0)


def pointer(tensor: Tensor) -> int:
    """The address of fp32 values, for as long as the tensor lives."""
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()
