# SPDX-License-Identifier: Apache-2.0
"""The process in which `bench/peers.py` runs one contestant: it answers orders (`mossquant.targets.child`).

    prepare   load the runtime, bring the file into memory, and check it where our Runners do: nothing of it is timed
    start     open the model and read one token; milliseconds of both, and private memory after a prompt
    turn      seconds of a prompt (logits of the last position), of single steps after it, and of the prompt again with
              logits of every position; for a .moss, what memory was read at before and after the steps
    logits    of every position of some tokens, into a file

llama.cpp and libmoss are called through ctypes and write logits where they like, or to memory that is kept; .onnx and
.pte run in our Runners. A process imports what its own runtime needs and nothing else.
"""

import ctypes
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mossquant.targets.child import serve

SEED = 0
PASSES = 4
"""Reads of a .moss's mapping, before the steps and after them."""
ABI_VERSION = 1
"""Of moss.h."""

Floats = NDArray[np.float32]
Order = Mapping[str, Any]


class Model(Protocol):
    """A model with its state."""

    vocabulary: int
    weight_bytes: int | None
    """What the runtime says of its weights, where it knows."""

    def reset(self) -> None:
        """Forget what was read."""
        ...

    def read(self, tokens: NDArray[np.int64], *, every: bool = False) -> None:
        """Read tokens [T]; logits of every one of them, or of the last."""
        ...

    def logits(self, rows: int) -> Floats:
        """Those of the last call [rows, V]."""
        ...


class LlamaCpp:
    """A GGUF in llama.cpp, through `peers.cc`."""

    weight_bytes: int | None = None

    def __init__(self, library: ctypes.CDLL, order: Order) -> None:
        self._library = library
        self._peer = ctypes.c_void_p(library.peer_open(order["path"].encode(), order["threads"], order["prompt"]))
        if not self._peer:
            raise RuntimeError(f"llama.cpp does not open {order['path']}")
        self.vocabulary = library.peer_vocabulary(self._peer)
        self._logits: int | None = None

    def reset(self) -> None:
        self._library.peer_reset(self._peer)

    def read(self, tokens: NDArray[np.int64], *, every: bool = False) -> None:
        own = tokens.astype(np.int32)
        self._logits = self._library.peer_read(self._peer, own.ctypes.data, len(own), int(every))
        if self._logits is None:
            raise RuntimeError("llama.cpp failed")

    def logits(self, rows: int) -> Floats:
        pointer = ctypes.cast(self._logits or 0, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self.vocabulary))


class _Options(ctypes.Structure):
    _fields_ = (("threads", ctypes.c_int32), ("isa", ctypes.c_char_p))


class Moss:
    """A .moss in libmoss, through moss.h."""

    def __init__(self, library: ctypes.CDLL, order: Order) -> None:
        self._library = library
        options = _Options(order["threads"], None)
        self._model = ctypes.c_void_p(library.moss_open(order["path"].encode(), ctypes.byref(options)))
        self._check(bool(self._model))
        self.vocabulary = library.moss_vocab_size(self._model)
        self.weight_bytes: int | None = library.moss_mapped_bytes(self._model)
        self._state = ctypes.c_void_p()
        self._logits: Floats = np.empty((order["prompt"], self.vocabulary), np.float32)
        self.reset()

    def reset(self) -> None:
        self._library.moss_state_free(self._state)
        self._state = ctypes.c_void_p(self._library.moss_state_create(self._model, 1))
        self._check(bool(self._state))

    def read(self, tokens: NDArray[np.int64], *, every: bool = False) -> None:
        result = self._library.moss_forward(
            self._model, self._state, tokens.ctypes.data, len(tokens), int(every), self._logits.ctypes.data
        )
        self._check(result == 0)

    def logits(self, rows: int) -> Floats:
        return self._logits[:rows]

    def _check(self, done: bool) -> None:
        if not done:
            raise RuntimeError(self._library.moss_last_error().decode())


class Program:
    """An .onnx or a .pte in our Runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.vocabulary: int = runner.info.vocab_size
        self.weight_bytes: int | None = runner.info.weight_bytes
        self.reset()

    def reset(self) -> None:
        self._state = self._runner.initial_state(1)

    def read(self, tokens: NDArray[np.int64], *, every: bool = False) -> None:
        self._logits, self._state = self._runner(tokens[None], self._state, logits="all" if every else "last")

    def logits(self, rows: int) -> Floats:
        return np.asarray(self._logits, np.float32)[0, -rows:]


def prepared(order: Order) -> Callable[[], Model]:
    """Everything that is done before a model is opened; what it gives opens it."""
    with Path(order["path"]).open("rb") as file:
        while file.read(1 << 20):
            pass
    if order["kind"] == "llama.cpp":
        llama = declared(order["library"])
        return lambda: LlamaCpp(llama, order)
    if order["kind"] == "native":
        moss = declared_moss(order["libmoss"])
        return lambda: Moss(moss, order)
    import torch

    from mossquant.checkpoint.locate import Located
    from mossquant.targets.trial import accept

    # At two threads, PyTorch's own would spin against XNNPACK's; it computes nothing here.
    torch.set_num_threads(1)
    accept(order["passed"])
    program = Located(order["path"], Path(order["path"]), order["kind"])
    module: Any = import_module(f"mossquant.targets.{program.kind}.runner")
    # Checks of a stranger's file are ours and not the runtime's: they are done now.
    opened = module.open_to_run(program.path)
    module.open_to_run = lambda path: opened
    return lambda: Program(module.open_runner(program, threads=order["threads"]))


def declared(path: str) -> ctypes.CDLL:
    """The library of `peers.cc`."""
    library = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.peer_system.restype = ctypes.c_char_p
    library.peer_open.restype, library.peer_open.argtypes = pointer, [ctypes.c_char_p, number, number]
    library.peer_vocabulary.argtypes = library.peer_reset.argtypes = [pointer]
    library.peer_read.restype, library.peer_read.argtypes = pointer, [pointer, pointer, number, number]
    return library


def declared_moss(path: str) -> ctypes.CDLL:
    """libmoss."""
    library = ctypes.CDLL(path)
    if library.moss_abi_version() != ABI_VERSION:
        raise RuntimeError(f"{path} has interface {library.moss_abi_version()}, and {ABI_VERSION} is needed")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.moss_last_error.restype = ctypes.c_char_p
    library.moss_open.restype, library.moss_open.argtypes = pointer, [ctypes.c_char_p, ctypes.POINTER(_Options)]
    for name in ("moss_vocab_size", "moss_mapped_bytes"):
        getattr(library, name).restype, getattr(library, name).argtypes = number, [pointer]
    library.moss_state_create.restype, library.moss_state_create.argtypes = pointer, [pointer, number]
    library.moss_state_free.argtypes = [pointer]
    library.moss_forward.argtypes = [pointer, pointer, pointer, number, ctypes.c_int32, pointer]
    return library


def _tokens(model: Model, count: int) -> NDArray[np.int64]:
    """The same for all."""
    return np.random.default_rng(SEED).integers(0, model.vocabulary, count, np.int64)


def private_bytes() -> int:
    """Anonymous memory of this process that is resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Contestant:
    """What answers the orders of one process."""

    def answer(self, order: Order) -> dict[str, Any]:
        """The answer to an order."""
        return getattr(self, order["do"])(order)  # type: ignore[no-any-return]

    def prepare(self, order: Order) -> dict[str, Any]:
        self._order, self._opener = order, prepared(order)
        self._bandwidth: Callable[[], float] | None = None
        return {}

    def system(self, order: Order) -> dict[str, Any]:
        return {"system": declared(order["library"]).peer_system().decode()}

    def quantize(self, order: Order) -> dict[str, Any]:
        words = (order["from"].encode(), order["to"].encode(), order["type"], order["table"])
        return {"done": declared(order["library"]).peer_quantize(*words) == 0}

    def start(self, order: Order) -> dict[str, Any]:
        before, began = private_bytes(), time.perf_counter()
        self._model = self._opener()
        self._model.read(np.array([1], np.int64))
        milliseconds = 1e3 * (time.perf_counter() - began)
        self._model.read(_tokens(self._model, self._order["prompt"]))
        return {
            "start_ms": milliseconds,
            "private_mb": (private_bytes() - before) / 1e6,
            "weight_bytes": self._model.weight_bytes,
        }

    def turn(self, order: Order) -> dict[str, Any]:
        model, prompt = self._model, self._order["prompt"]
        tokens = _tokens(model, prompt + order["decode"])
        found: dict[str, Any] = {}
        model.reset()
        began = time.perf_counter()
        model.read(tokens[:prompt])
        found["prefill_last"] = time.perf_counter() - began
        before = self._memory_speed()
        began = time.perf_counter()
        for i in range(prompt, len(tokens)):
            model.read(tokens[i : i + 1])
        found["decode"] = time.perf_counter() - began
        if before is not None:
            found["bandwidth"] = [before, self._memory_speed()]
        model.reset()
        began = time.perf_counter()
        model.read(tokens[:prompt], every=True)
        found["prefill"] = time.perf_counter() - began
        return found

    def logits(self, order: Order) -> dict[str, Any]:
        tokens = np.array(order["tokens"], np.int64)
        self._model.reset()
        self._model.read(tokens, every=True)
        np.save(order["to"], self._model.logits(len(tokens)))
        return {}

    def _memory_speed(self) -> float | None:
        """10⁹ bytes a second at which the threads of a .moss read its mapping; None for other files."""
        if self._order["kind"] != "native":
            return None
        if self._bandwidth is None:
            from mossquant.kernels import _native

            threads, mapped = self._order["threads"], np.memmap(self._order["path"], np.uint8, mode="r")
            self._bandwidth = lambda: _native.read_bandwidth(mapped, threads=threads, passes=PASSES)
            self._bandwidth()  # its pages are mapped now
        return self._bandwidth()


if __name__ == "__main__":
    serve(Contestant().answer)
