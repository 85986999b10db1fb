# SPDX-License-Identifier: Apache-2.0
"""Whether a .pte holds the weights of its checkpoint: in every method, code for code, scale for scale, value for value.

A .pte has no names for its weights. What every method must hold follows from the checkpoint alone: linears with the
codes of one tensor, or of a run of experts, and constants with the values of small tensors. Among arrays of one shape a
program keeps the model's order, so that each is compared with the one in its place, and an exchange of two is found.
Two exceptions, in models smaller than any that is used: the order of arrays of up to 16 values is not checked, and
where a router has the shape of a kept matrix of its block, the order differs and good files are refused.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.tensors import TensorSpec
from mossquant.targets.executorch.delegate import Linear
from mossquant.targets.executorch.expected import Expected, Held, expected_constants, expected_linears
from mossquant.targets.executorch.kernels.read_back import compare as compare_own
from mossquant.targets.executorch.open import open_program
from mossquant.targets.executorch.program_file import PlanMethod, ProgramFile
from mossquant.targets.program import METHODS
from mossquant.targets.weights_report import WeightsReport, first_difference

_Array = TypeVar("_Array", bound=Held)
_SCALARS = 16
"""Constants of so few values belong to shapes and formulas, not to tensors."""


def read_back(weights: Weights, located: Located) -> WeightsReport:
    """Compare every weight in a .pte with the weights that it was lowered from.

    Raises:
        InputError: the program cannot be read, contradicts the manifest beside it, or is of a model of another shape.
    """
    program = open_program(located.path)
    file, metadata, origin = program.file, program.metadata, weights.origin
    if weights.config.to_json(torch_dtype=origin.torch_dtype) != metadata.config:
        raise InputError(
            f"{located.given} is a model of another shape than {origin.path}; give what it was lowered from"
        )
    if program.own_kernels:
        return WeightsReport.of(located.given, weights, metadata.source_files, list(compare_own(program, weights)))
    specs = list(weights.specs.values())
    linears, constants = expected_linears(weights, specs), expected_constants(weights, specs)
    differences = [f"method {name} is missing" for name in METHODS if name not in file.methods]
    for method in file.methods.values():
        differences += [f"{method.name}: {what}" for what in _compare(method, linears, constants)]
    return WeightsReport.of(located.given, weights, metadata.source_files, differences)


def check_linears(file: ProgramFile, weights: Weights, specs: Sequence[TensorSpec]) -> None:
    """Whether every matrix became the linear that the plan says, inside a delegate, in every method.

    Raises:
        RuntimeError: linears are missing, or there are others than those of the plan: the lowering lost what it was
            given. They are named.
    """
    expected = expected_linears(weights, specs)
    for method in file.methods.values():
        outside = [name for name in method.operators if name.split("::")[-1].split(".")[0] in _MATMULS]
        if outside:
            raise RuntimeError(f"{method.name}: linears were left outside the delegate: {', '.join(outside)}")
        differences = [line for _, line in _miscounted(expected, _linears(method))]
        if differences:
            raise RuntimeError(f"{method.name}: {'; '.join(differences)}")


_MATMULS = {"mm", "addmm", "linear", "matmul", "bmm", "baddbmm"}


def _linears(method: PlanMethod) -> list[Linear]:
    return [linear for delegate in method.delegates for linear in delegate.linears]


def _compare(method: PlanMethod, linears: list[Expected], constants: list[Expected]) -> Iterator[str]:
    # Linears of the file are unpacked when they are compared, and not kept: in a damaged file many may share bytes.
    yield from _match(linears, _linears(method))
    values = [value for part in method.delegates for value in part.constants] + list(method.constants)
    yield from _match(
        [constant for constant in constants if constant.codes.size > _SCALARS],
        [Expected("", value) for value in values if value.size > _SCALARS],
    )
    # A small tensor may be as short as a number of a formula: no order is held, and nothing is left over.
    short = [Expected("", value) for value in values if value.size <= _SCALARS]
    for constant in constants:
        if constant.codes.size <= _SCALARS and not any(constant.holds(value) for value in short):
            yield f"{constant.name} is not in the file as {_title(constant)}"


def _match(expected: Sequence[Expected], held: Sequence[Held]) -> Iterator[str]:
    """Hold what is expected against what a method holds, kind by kind in their order, and say how they differ."""
    miscounted = dict(_miscounted(expected, held))
    yield from miscounted.values()
    stored = _by_kind(held)
    for kind, group in _by_kind(expected).items():
        if kind not in miscounted:
            for tensor, array in zip(group, stored[kind], strict=True):
                if not tensor.holds(array):
                    yield f"{tensor.name}: {_difference(tensor, array, group)}"


def _miscounted(expected: Sequence[Expected], held: Sequence[Held]) -> Iterator[tuple[object, str]]:
    """Kinds of which a method has another number of arrays than it must, each with a line that says so."""
    wanted, stored = _by_kind(expected), _by_kind(held)
    for kind, group in wanted.items():
        missing, names = len(group) - len(stored.get(kind, ())), ", ".join(tensor.name for tensor in group)
        if missing > 0:
            which = names if missing == len(group) else f"{missing} of {names}"
            yield kind, f"{which} is not in the file as {_title(group[0])}"
    for kind, arrays in stored.items():
        more = len(arrays) - len(wanted.get(kind, ()))
        if more > 0:
            count = "" if more == 1 else f"{more} times "
            yield kind, f"{count}{_title(arrays[0])} is in the file and belongs to no tensor"


def _by_kind(arrays: Sequence[_Array]) -> dict[tuple[object, ...], list[_Array]]:
    kinds: dict[tuple[object, ...], list[_Array]] = {}
    for array in arrays:
        kinds.setdefault(array.kind, []).append(array)
    return kinds


def _title(array: Held) -> str:
    precision = "fp32" if array.bits is None else f"{array.bits}-bit"
    unusual = array.rounds_input != (array.bits is not None)
    rounded = f", its input {'' if array.rounds_input else 'not '}rounded" if unusual else ""
    return f"{precision} {list(array.shape)}{rounded}"


def _difference(tensor: Expected, array: Held, group: list[Expected]) -> str:
    exchanged = next((expected.name for expected in group if expected.holds(array)), None)
    if exchanged is not None:
        return f"{exchanged} is in its place"
    difference = first_difference(array.codes, tensor.codes, "value" if tensor.bits is None else "code")
    return difference or first_difference(array.scales, tensor.scales, "scale") or "another array is in its place"
