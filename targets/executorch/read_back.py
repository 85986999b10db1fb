# SPDX-License-Identifier: Apache-2.0
"""Whether a .pte holds the weights of its checkpoint: in every method, code for code, scale for scale, value for value.

A .pte has no names for its weights. What every method must hold follows from the checkpoint alone: linears with the
codes of one tensor, or of a run of experts, and constants with the values of small tensors. Among those of one shape a
program keeps the model's order, so that each is held against the one in its place: two that were exchanged are seen.
Two exceptions, in models smaller than any that is used: the order of arrays of up to 16 values is not held, and where a
router has the shape of a kept matrix of its block, the program's order is not ours and good files are refused.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.tensors import TensorSpec
from mossquant.targets.executorch.expected import Expected, Held, expected_constants, expected_linears
from mossquant.targets.executorch.metadata import open_program
from mossquant.targets.executorch.program_file import PlanMethod, ProgramFile
from mossquant.targets.program import METHODS
from mossquant.targets.weights_report import WeightsReport, first_difference

__all__ = ["check_linears", "read_back"]

_Array = TypeVar("_Array", bound=Held)
_SCALARS = 16
"""Constants of so few values belong to shapes and formulas, not to tensors."""
_MOST_TIMES = 4
"""With more linears of a kind than so many times those expected, none is looked for among them."""


def read_back(weights: Weights, located: Located) -> WeightsReport:
    """Compare every weight in a .pte with the weights that it was lowered from.

    Raises:
        InputError: the program cannot be read, or is of a model of another shape.
    """
    program = open_program(located.path)
    file, metadata, origin = program.file, program.metadata, weights.origin
    if weights.config.to_json(torch_dtype=origin.torch_dtype) != metadata.config:
        raise InputError(
            f"{located.given} is a model of another shape than {origin.path}; give what it was lowered from"
        )
    specs = list(weights.specs.values())
    linears, constants = expected_linears(weights, specs), expected_constants(weights, specs)
    differences = [f"method {name} is missing" for name in METHODS if name not in file.methods]
    for method in file.methods.values():
        differences += [f"{method.name}: {what}" for what in _compare(method, linears, constants)]
    return WeightsReport.of(located.given, weights, metadata.source_files, differences)


def check_linears(file: ProgramFile, weights: Weights, specs: Sequence[TensorSpec]) -> None:
    """Whether every matrix became the linear that the plan says, inside a delegate, in every method.

    Raises:
        RuntimeError: quantized linears are missing, or there are fp32 ones that the plan does not keep: the lowering
            lost what it was given. They are named.
    """
    expected = expected_linears(weights, specs)
    for method in file.methods.values():
        outside = [name for name in method.operators if name.split("::")[-1].split(".")[0] in _MATMULS]
        if outside:
            raise RuntimeError(f"{method.name}: linears were left outside the delegate: {', '.join(outside)}")
        found = [(linear.bits, linear.shape) for part in method.delegates for linear in part.linears]
        for one in expected:
            if (one.bits, one.codes.shape) not in found:
                raise RuntimeError(f"{method.name}: {one.name} is no {_kind(one.bits)} linear of the delegate")
            found.remove((one.bits, one.codes.shape))
        if found:
            left = ", ".join(f"{_kind(bits)} {list(shape)}" for bits, shape in found)
            raise RuntimeError(f"{method.name}: linears that belong to no tensor: {left}")
        wrong = [x for part in method.delegates for x in part.linears if x.rounds_input != (x.bits is not None)]
        if wrong:
            raise RuntimeError(f"{method.name}: {len(wrong)} linears round an input that they should not, or do not")


_MATMULS = {"mm", "addmm", "linear", "matmul", "bmm", "baddbmm"}


def _kind(bits: int | None) -> str:
    return "fp32" if bits is None else f"{bits}-bit"


def _title(one: Held) -> str:
    unusual = one.rounds_input != (one.bits is not None)
    rounded = f", its input {'' if one.rounds_input else 'not '}rounded" if unusual else ""
    return f"{_kind(one.bits)} {list(one.shape)}{rounded}"


def _compare(method: PlanMethod, linears: list[Expected], constants: list[Expected]) -> Iterator[str]:
    # Those of the file are unpacked when they are looked at, and not kept: many may share their bytes.
    yield from _match(linears, [linear for part in method.delegates for linear in part.linears])
    plain = [c for part in method.delegates for c in part.constants] + list(method.constants)
    large = [Expected("", value) for value in plain if value.size > _SCALARS]
    small = [Expected("", value) for value in plain if value.size <= _SCALARS]
    # A small tensor may be as short as a number of a formula; what is left over of those is not an offender.
    yield from _match([one for one in constants if one.codes.size > _SCALARS], large)
    yield from _match([one for one in constants if one.codes.size <= _SCALARS], small, all_of_them=False)


def _match(expected: list[Expected], found: Sequence[Held], *, all_of_them: bool = True) -> Iterator[str]:
    """Hold what is expected against what is found, kind by kind, and say how they differ."""
    left, wanted = _by_kind(found), _by_kind(expected)
    for kind, group in wanted.items():
        here = left.pop(kind, [])
        pairs: list[tuple[Expected, Held | None]]
        if all_of_them and len(here) == len(group):
            pairs = list(zip(group, here, strict=True))
        elif all_of_them and len(here) > _MOST_TIMES * len(group):  # each with each would have no end
            pairs, left[kind] = [(one, None) for one in group], here
        else:
            pairs, left[kind] = _paired(group, here)
        for one, other in pairs:
            if other is None:
                yield f"{one.name} is not in the file as {_title(one)}"
            elif not one.holds(other):
                yield f"{one.name}: {_difference(one, other, group)}"
    if all_of_them:
        for more in (more for here in left.values() for more in here):
            yield f"{_title(more)} is in the file and belongs to no tensor"


def _by_kind(arrays: Sequence[_Array]) -> dict[tuple[object, ...], list[_Array]]:
    found: dict[tuple[object, ...], list[_Array]] = {}
    for one in arrays:
        found.setdefault(one.kind, []).append(one)
    return found


def _paired(group: list[Expected], here: list[Held]) -> tuple[list[tuple[Expected, Held | None]], list[Held]]:
    """Where their number differs: each with the same one, or the most alike; and what is left."""
    left, pairs = list(here), []
    for one in group:
        index = next((i for i, other in enumerate(left) if one.holds(other)), None)
        pairs.append((one, None if index is None else left.pop(index)))
    for i, (one, other) in enumerate(pairs):
        if other is None and left:
            nearest = min(range(len(left)), key=lambda j, one=one: int((left[j].codes != one.codes).sum()))  # type: ignore[misc]
            pairs[i] = (one, left.pop(nearest))
    return pairs, left


def _difference(one: Expected, other: Held, group: list[Expected]) -> str:
    exchanged = next((expected.name for expected in group if expected.holds(other)), None)
    if exchanged is not None:
        return f"{exchanged} is in its place"
    difference = first_difference(other.codes, one.codes, "value" if one.bits is None else "code")
    return difference or first_difference(other.scales, one.scales, "scale") or "another array is in its place"
