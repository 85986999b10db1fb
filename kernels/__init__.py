# SPDX-License-Identifier: Apache-2.0
"""C++ kernels: stateless, without a framework, chosen at run time by what the CPU can do.

Each operation is a folder: header with formula and shapes, list of kernels, registration with PyTorch. Names
follow `NAMES.md`.
"""

from collections.abc import Iterable

from mossquant.kernels import _native

__all__ = ["available", "cpu_flags", "selected"]


def cpu_flags() -> tuple[str, ...]:
    """What this machine can do, as far as the kernels ask: some of "avx2", "avx512"."""
    return tuple(_native.cpu_flags())


def available(op: str, *, dtype: str = "float32", flags: Iterable[str] | None = None) -> tuple[str, ...]:
    """The kernels of operation `op` that a machine with `flags` (default: this one) can run, best first, scalar last.

    Raises:
        ValueError: an unknown operation, dtype or flag.
    """
    return tuple(_native.kernel_names(op, dtype, list(cpu_flags() if flags is None else flags)))


def selected(op: str, *, dtype: str = "float32", flags: Iterable[str] | None = None) -> str:
    """The kernel of operation `op` that is used on a machine with `flags` (default: this one).

    Raises:
        ValueError: an unknown operation, dtype or flag.
    """
    return _native.selected(op, dtype, list(cpu_flags() if flags is None else flags))
