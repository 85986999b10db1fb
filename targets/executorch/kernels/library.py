# SPDX-License-Identifier: Apache-2.0
"""The operators for ExecuTorch (`operators.cc`): compiled on first use, and loaded into the runtime of this process.

They are compiled against the headers of the installed executorch, which are not there when this package is built, into
the user's cache folder, where they are found again: a folder for each release of executorch, libmoss and source.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from mossquant.errors import InputError
from mossquant.targets.executorch.packages import EXECUTORCH, check_packages, load_runtime
from mossquant.targets.native.library import library_path, load_library, native_path

_SOURCE = Path(__file__).with_name("operators.cc")
_HEADERS = Path(__file__).with_name("wheel")
_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    "-DC10_USING_CUSTOM_GENERATED_MACROS",  # ExecuTorch's copy of c10 has no generated ones
)
_FOLDER_BYTES = 16
_ADVICE = "install one (Debian: apt-get install g++)"


@cache
def load_operators() -> None:
    """Register the operators with ExecuTorch's runtime in this process, compiled if they are not yet.

    Raises:
        InputError: there is no compiler, it fails, or nothing can be written to the cache folder.
    """
    operators = compiled()
    load_library()  # they refer to both by name alone, and find them loaded
    load_runtime()
    try:
        ctypes.CDLL(str(operators))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{operators} cannot be loaded ({reason}); remove its folder and run again") from None


def compiled() -> Path:
    """The library of operators, compiled if it is not yet. Raises `InputError` as `load_operators`."""
    check_packages()
    operators = _place()
    if operators.is_file():
        return operators
    compiler = _compiler()
    try:
        operators.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=operators.parent) as aside:
            made = Path(aside) / operators.name
            _compile(compiler, made)
            made.replace(operators)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{operators.parent} cannot be written ({reason}); set XDG_CACHE_HOME to a folder") from None
    return operators


def check_compiler() -> None:
    """Whether the operators are there or can be compiled. Raises `InputError`: there is no compiler."""
    if not _place().is_file():
        _compiler()


def _compiler() -> str:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise InputError(
            f"a .pte with kernels of ours takes a C++20 compiler, once, and none was found; {_ADVICE} and run again"
        )
    return compiler


def _place() -> Path:
    """Where the library lies, named after all that it is made of."""
    hashed = sha256(repr((_OPTIONS, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in (library_path(), *sorted((native_path() / "include").iterdir()), _SOURCE, *sorted(_HEADERS.iterdir())):
        hashed.update(path.read_bytes())
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = f"executorch-{EXECUTORCH}-{hashed.hexdigest()[:_FOLDER_BYTES]}"
    return cache_folder / "mossquant" / folder / "operators.so"


def _compile(compiler: str, made: Path) -> None:
    found = find_spec("executorch")
    assert found is not None
    assert found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    headers = package / "include"
    includes = (headers, headers / "executorch/runtime/core/portable_type/c10", _HEADERS, native_path() / "include")
    runtime = package / "extension/pybindings" / f"_portable_lib{sysconfig.get_config_var('EXT_SUFFIX')}"
    words = [compiler, *_OPTIONS, *(f"-I{folder}" for folder in includes), str(_SOURCE), "-o", str(made)]
    ran = subprocess.run([*words, str(library_path()), str(runtime)], capture_output=True, text=True)
    if ran.returncode != 0:
        errors = [line for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines()[-1:]
        reason = " ".join(" ".join(errors[:1]).split())[:300]
        raise InputError(
            f"{compiler} cannot compile the operators for executorch {EXECUTORCH} ({reason}); "
            "it takes a compiler of C++20, such as GCC 11 or later"
        )
