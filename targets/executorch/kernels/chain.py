# SPDX-License-Identifier: Apache-2.0
"""A method of a program, held against the calls that a model of its config consists of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossquant.model.config import MossNetConfig
from mossquant.targets.executorch.kernels.operators import NAMESPACE
from mossquant.targets.executorch.program_file import KernelCall, ProgramFile, Variable
from mossquant.targets.native.blocks.calls import FORMATS, LAYOUTS, Call, Constant, Matrix, Small, calls
from mossquant.targets.native.blocks.constants import form
from mossquant.targets.native.metadata import Layout


@dataclass(frozen=True)
class Held:
    """An array of a program, and what it is there for.

    Attributes:
        constant: the tensors that it stands for.
        storage: what a matrix is stored in, one of `FORMATS`; "float32" for small tensors.
        array: uint8 [bytes], or fp32 values.
    """

    constant: Matrix | Small
    storage: str
    array: NDArray[Any]


def constants(file: ProgramFile, method: str, config: MossNetConfig) -> list[Held]:
    """Every constant of a method in which `differences` finds nothing, in the order of its calls."""
    found = []
    for call, made in zip(calls(config, last=method != "score"), file.chain(method).calls, strict=True):
        storage = _storage(call, made)
        arguments = _arguments(call, made)
        for constant, argument in zip(call.constants, arguments, strict=False):
            for one, array in _pairs(constant, argument):
                found.append(Held(one, storage.get(one, "float32"), array))
    return found


def differences(file: ProgramFile, method: str, config: MossNetConfig, layout: Layout | None) -> list[str]:
    """What a method does that is not what a model of this config does; one line for the first call that differs."""
    chain, expected = file.chain(method), list(calls(config, last=method != "score"))
    if len(chain.calls) != len(expected):
        return [f"{method} makes {len(chain.calls)} calls and not {len(expected)}"]
    x, states, after = chain.inputs[0], iter(chain.inputs[1:]), []
    for number, (call, made) in enumerate(zip(expected, chain.calls, strict=True)):
        given = [x, *(next(states) for _ in range(call.states))]
        reason = _difference(call, made, given, layout)
        if reason is not None:
            return [f"{method}, call {number} ({made.operator[:80]}): {reason}"]
        x, *own = made.arguments[_count(call) :][: 1 + call.states]
        after += own
    return [] if [x, *after] == list(chain.outputs) else [f"{method} gives other arrays than those of its last calls"]


def _difference(call: Call, made: KernelCall, given: list[Variable], layout: Layout | None) -> str | None:
    # An argument may be an array wherever a damaged program says so; arrays compare value by value: types come first.
    if made.operator != f"{NAMESPACE}::{call.operator}.out":
        return f"{call.operator} is expected there"
    outputs = made.arguments[_count(call) :]
    if len(outputs) < 1 + call.states or not all(isinstance(out, Variable) for out in outputs[: 1 + call.states]):
        return "it has another number of arguments"
    taken = made.arguments[: len(given)]
    if not all(isinstance(one, Variable) for one in taken) or list(taken) != given:
        return "it does not take what the call before it gives, or another state"
    *settings, packed_for, formats = made.arguments[len(given) + len(call.constants) : _count(call)]
    if list(map(type, settings)) != list(map(type, call.settings)) or tuple(settings) != call.settings:
        return f"it has other settings than {list(call.settings)}"
    known = isinstance(formats, list) and all(isinstance(one, int) and 0 <= one < len(FORMATS) for one in formats)
    packed = isinstance(packed_for, int) and packed_for == LAYOUTS.index(layout or "")
    if not known or len(formats) != len(call.matrices) or not packed:
        return "its matrices are in other formats, or packed in another way"
    storage = _storage(call, made)
    for constant, argument in zip(call.constants, _arguments(call, made), strict=False):
        if not _fits(constant, argument):
            return "it takes another number of tensors"
        for one, array in _pairs(constant, argument):
            if (wrong := _misshapen(one, array, storage.get(one, "float32"), layout or "rows")) is not None:
                return wrong
    return None


def _misshapen(constant: Matrix | Small, array: NDArray[Any], storage: str, layout: Layout) -> str | None:
    kind, shape = form(constant, storage, layout)
    if array.shape == shape and array.dtype == kind:
        return None
    return f"{constant.name} is {array.dtype} {list(array.shape)}, expected {np.dtype(kind)} {list(shape)}"


def _count(call: Call) -> int:
    """Arguments before the outputs."""
    return 1 + call.states + len(call.constants) + len(call.settings) + 2


def _arguments(call: Call, made: KernelCall) -> tuple[Any, ...]:
    """Constants and what follows."""
    return made.arguments[1 + call.states :]


def _storage(call: Call, made: KernelCall) -> dict[Matrix | Small, str]:
    formats = made.arguments[_count(call) - 1]
    return {matrix: FORMATS[number] for matrix, number in zip(call.matrices, formats, strict=True)}


def _fits(constant: Constant, argument: Any) -> bool:
    if isinstance(constant, tuple):
        arrays = isinstance(argument, list) and all(isinstance(one, np.ndarray) for one in argument)
        return arrays and len(argument) == len(constant)
    return argument is None if constant is None else isinstance(argument, np.ndarray)


def _pairs(constant: Constant, argument: Any) -> Iterator[tuple[Matrix | Small, NDArray[Any]]]:
    if isinstance(constant, tuple):
        yield from zip(constant, argument, strict=True)
    elif constant is not None:
        yield constant, argument
