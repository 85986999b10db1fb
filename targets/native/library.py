# SPDX-License-Identifier: Apache-2.0
"""libmoss through ctypes: functions of `runtime/moss.h` and `runtime/moss_blocks.h`, their arguments, who frees what.

ctypes and not a module of our own, so that the library which is tested and measured here is the very file that an app
links, called through the header that it includes.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from mossquant.errors import InputError

ABI_VERSION = 1
"""`MOSS_ABI_VERSION` of the header that this file was written for."""
LAST, ALL = 0, 1
"""`MOSS_LAST` and `MOSS_ALL`."""

_AGAIN = "install mossquant again"


class Options(ctypes.Structure):
    """`moss_options`."""

    _fields_ = (("threads", ctypes.c_int32), ("isa", ctypes.c_char_p))


_Handle, _Int32, _Int64, _Text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
_Floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
_Written = np.ctypeslib.ndpointer(np.float32, flags=("C_CONTIGUOUS", "WRITEABLE"))
_Tokens = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "moss_last_error": (_Text, []),
    "moss_open": (_Handle, [_Text, ctypes.POINTER(Options)]),
    "moss_close": (None, [_Handle]),
    "moss_layout": (_Text, [_Handle]),
    "moss_linear_kernel": (_Text, [_Handle]),
    "moss_repacked": (_Int32, [_Handle]),
    "moss_mapped_bytes": (_Int64, [_Handle]),
    "moss_private_bytes": (_Int64, [_Handle]),
    "moss_state_create": (_Handle, [_Handle, _Int64]),
    "moss_state_copy": (_Handle, [_Handle]),
    "moss_state_free": (None, [_Handle]),
    "moss_state_arrays": (_Int64, [_Handle]),
    "moss_state_size": (_Int64, [_Handle, _Int64]),
    "moss_state_read": (_Int32, [_Handle, _Int64, _Written]),
    "moss_state_write": (_Int32, [_Handle, _Int64, _Floats]),
    "moss_state_set_position": (_Int32, [_Handle, _Int64]),
    "moss_profile": (_Int32, [_Handle, _Int32]),
    "moss_profile_parts": (_Int64, []),
    "moss_profile_name": (_Text, [_Int64]),
    "moss_profile_seconds": (ctypes.c_double, [_Handle, _Int64]),
    "moss_forward": (_Int32, [_Handle, _Handle, _Tokens, _Int64, _Int32, _Written]),
    "moss_worker_create": (_Handle, [ctypes.POINTER(Options), _Handle]),
    "moss_worker_free": (None, [_Handle]),
    "moss_embedding": (_Int32, [_Handle, _Handle, _Int64, _Int64, _Handle, _Int64, _Handle]),
    "moss_ssm_block": (_Int32, [_Handle, _Handle, _Handle, _Int64, _Int64, _Handle, _Handle, _Handle]),
    "moss_mlp_block": (_Int32, [_Handle, _Handle, _Handle, _Int64, _Handle]),
    "moss_head": (_Int32, [_Handle, _Handle, _Int64, _Int64, _Handle, ctypes.c_float, _Int64, _Handle, _Handle]),
}
"""Name → result, arguments."""


def native_path() -> Path:
    """The folder with what an app links: `include/moss.h`, libmoss and its CMake config in `lib/`, `bin/moss-costs`.

    Raises:
        InputError: it was not installed.
    """
    if not library_path().is_file():
        raise InputError(f"{library_path()} is missing; {_AGAIN}")
    return library_path().parents[1]


def library_path() -> Path:
    """Where the wheel installs libmoss."""
    return Path(__file__).with_name("lib") / ("libmoss.dylib" if sys.platform == "darwin" else "libmoss.so")


@cache
def load_library() -> ctypes.CDLL:
    """libmoss, its functions declared.

    Raises:
        InputError: it is missing, cannot be loaded, or belongs to another release.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be loaded ({' '.join(str(error).split())[:200]}); {_AGAIN}") from None
    library.moss_abi_version.restype = _Int32
    version = library.moss_abi_version()
    if version != ABI_VERSION:
        raise InputError(f"{path} has interface {version}, and this release needs {ABI_VERSION}; {_AGAIN}")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class MossError(RuntimeError):
    """What `moss_last_error` says of a call that failed."""


class Model:
    """A `moss_model`, closed when nothing refers to it or to a state of it.

    Args:
        path: a .moss.
        threads: the calling one included; 0: as many as there are cores.
        isa: the most that kernels may use, as `moss_options` says; None: whatever the machine can.

    Raises:
        MossError: it cannot be opened.
    """

    def __init__(self, path: Path, *, threads: int = 0, isa: str | None = None) -> None:
        self.library = load_library()
        options = Options(threads, None if isa is None else isa.encode())
        self.handle: int = checked(self.library.moss_open(str(path).encode(), ctypes.byref(options)))
        finalize(self, self.library.moss_close, self.handle)

    @property
    def layout(self) -> str:
        """The layout of the file's matrices."""
        return _text(self.library.moss_layout(self.handle))

    @property
    def linear_kernel(self) -> str:
        """The kernel of the format that most bytes are in; empty where nothing is quantized."""
        return _text(self.library.moss_linear_kernel(self.handle))

    @property
    def repacked(self) -> bool:
        """Whether weights were packed anew for this machine."""
        return bool(self.library.moss_repacked(self.handle))

    @property
    def private_bytes(self) -> int:
        """Memory beside the mapped file, without states."""
        return int(self.library.moss_private_bytes(self.handle))

    @property
    def state_sizes(self) -> list[int]:
        """Values of each array of a state, of one sequence."""
        count = self.library.moss_state_arrays(self.handle)
        return [self.library.moss_state_size(self.handle, array) for array in range(count)]

    def profiled(self, work: Callable[[], None]) -> dict[str, float]:
        """Seconds of each part of the model in what work() runs."""
        library = self.library
        checked(library.moss_profile(self.handle, 1) == 0)
        work()
        checked(library.moss_profile(self.handle, 0) == 0)
        parts = range(library.moss_profile_parts())
        return {_text(library.moss_profile_name(i)): library.moss_profile_seconds(self.handle, i) for i in parts}

    def state(self, batch: int) -> "ModelState":
        """The state of some sequences before their first token. Raises `MossError`: too many, or too little memory."""
        return ModelState(self, self.library.moss_state_create(self.handle, batch))


class ModelState:
    """A `moss_state`, freed when nothing refers to it; its model lives at least as long.

    Args:
        model: what it belongs to.
        handle: what `moss_state_create` or `moss_state_copy` gave.

    Raises:
        MossError: that was nothing.
    """

    def __init__(self, model: Model, handle: int | None) -> None:
        self._model, self._library = model, model.library
        self._handle: int = checked(handle)
        # The finalizer refers to the model: where both are let go at once, the state is freed first.
        finalize(self, _free, model, self._handle)

    def copy(self) -> "ModelState":
        """Another one with the same values."""
        return ModelState(self._model, self._library.moss_state_copy(self._handle))

    def read(self, array: int, values: NDArray[np.float32]) -> None:
        """Copy an array of it to `values` [B, …]."""
        checked(self._library.moss_state_read(self._handle, array, values) == 0)

    def write(self, array: int, values: NDArray[np.float32]) -> None:
        """Copy `values` [B, …] to an array of it."""
        checked(self._library.moss_state_write(self._handle, array, values) == 0)

    def set_position(self, position: int) -> None:
        """Say how many tokens were read since it began, which matters to arrays that were written."""
        checked(self._library.moss_state_set_position(self._handle, position) == 0)

    def forward(self, tokens: NDArray[np.int64], which: int, logits: NDArray[np.float32]) -> None:
        """Read tokens [B, T] and advance; logits [B, T, V] (`ALL`) or [B, 1, V] (`LAST`) are filled in."""
        model = self._model.handle
        checked(self._library.moss_forward(model, self._handle, tokens, tokens.shape[1], which, logits) == 0)


def _free(model: Model, handle: int) -> None:
    model.library.moss_state_free(handle)


def checked(result: Any) -> Any:
    """The result of a call of libmoss. Raises `MossError`: it is nothing."""
    if not result:
        raise MossError(_text(load_library().moss_last_error()))
    return result


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
