# SPDX-License-Identifier: Apache-2.0
"""The optional packages of this target, imported when first needed.

Both print to the standard error while they load (torchao about CUDA libraries that a CPU build does not have,
ExecuTorch's C++ about files that only phones have); the command line keeps that from the screen.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mossquant.errors import InputError
from mossquant.formats import NumberFormat

EXECUTORCH, TORCHAO = "1.4.1", "0.18.0"
"""Releases that this target was written for and tested with."""

_DYNAMIC = "int8_asym_per_token"
_CODE_TYPES = {4: getattr(torch, "int4"), 8: torch.int8}  # noqa: B009  the stubs do not know torch.int4


def check_packages() -> None:
    """Whether the packages are there, in the releases that this target needs.

    Raises:
        InputError: they are not.
    """
    advice = "run: pip install 'mossquant[executorch]'"
    for name, needed in (("executorch", EXECUTORCH), ("torchao", TORCHAO)):
        try:
            installed = version(name)
        except ModuleNotFoundError:
            raise InputError(f"{name} is not installed, and .pte programs need it; {advice}") from None
        if installed != needed:
            raise InputError(f"{name} {installed} is installed and {needed} is needed; {advice}")


def intx_tensor(codes: Tensor, scales: Tensor, number_format: NumberFormat) -> Tensor:
    """Codes int8 [N, K] and scales [N, groups] as torchao's tensor, with inputs rounded to int8, one range a row."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    columns = codes.shape[1]
    group = number_format.group_size or columns
    zero_points = torch.zeros_like(scales, dtype=torch.int8)
    code_type = _CODE_TYPES[number_format.bits]
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        codes, scales, zero_points, code_type, (1, group), torch.float32, _DYNAMIC
    )
    return tensor


def load_runtime() -> Any:
    """ExecuTorch's runtime, with the kernels of quantized tables registered.

    The binding itself is imported, not the module around it: that one loads the whole compiler, for a warning.
    """
    check_packages()
    try:
        from executorch.extension.pybindings import _portable_lib

        # The second depends on symbols of the first.
        import executorch.kernels.quantized  # noqa: F401  isort: skip
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"executorch {EXECUTORCH} is installed and cannot be loaded ({reason}); "
            "run: pip install --force-reinstall 'mossquant[executorch]'"
        ) from None
    return _portable_lib


def load_program(path: str | Path) -> Any:
    """A program, its file mapped. A method borrows from it: keep it as long as any of its methods.

    Raises:
        RuntimeError: the runtime refuses it.
    """
    library = load_runtime()
    return library._load_program(
        str(path),
        enable_etdump=False,
        debug_buffer_size=0,
        program_verification=library.Verification.InternalConsistency,
    )


def load_method(program: Any, name: str) -> Any:
    """A method of a program, called with a list of tensors for a list of tensors. XNNPACK packs its weights now."""
    return program.load_method(name)


def set_threads(count: int) -> bool:
    """Threads of XNNPACK, for the whole process.

    Returns:
        Whether the number changed: methods that were loaded before run on threads that ended, and must be loaded again.
    """
    library = load_runtime()
    if library._threadpool_get_thread_count() == count:
        return False
    library._unsafe_reset_threadpool(count)
    return True
