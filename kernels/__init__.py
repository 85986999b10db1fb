# SPDX-License-Identifier: Apache-2.0
"""C++ kernels: stateless, without a framework, chosen at run time by what the CPU can do.

Each operation is a folder: header with formula and shapes, list of kernels, and registration with PyTorch where models
train with it. Names follow `NAMES.md`.
"""

from collections.abc import Iterable

from mossquant.kernels import _native

__all__ = ["available", "cpu_flags", "selected"]


def cpu_flags() -> tuple[str, ...]:
    """What this machine can do, as far as the kernels ask: some of avx2, avx512, avx512vnni, dotprod, i8mm."""
    return tuple(_native.cpu_flags())


def available(op: str, *, numbers: str = "f32", flags: Iterable[str] | None = None) -> tuple[str, ...]:
    """The kernels of operation `op` that a machine with `flags` (default: this one) can run, best first, scalar last.

    Args:
        op: the operation.
        numbers: what it computes on, the middle part of its kernels' names: "f32", or "f32_int8_block_int4_g32".
        flags: some of those that `cpu_flags` can return.

    Raises:
        ValueError: an unknown operation, numbers that it has no kernels for, or an unknown flag.
    """
    return tuple(_native.kernel_names(op, numbers, list(cpu_flags() if flags is None else flags)))


def selected(op: str, *, numbers: str = "f32", flags: Iterable[str] | None = None) -> str:
    """The first of `available`: the kernel of operation `op` that is used on a machine with `flags`.

    Raises:
        ValueError: an unknown operation, numbers that it has no kernels for, or an unknown flag.
    """
    return _native.selected(op, numbers, list(cpu_flags() if flags is None else flags))
