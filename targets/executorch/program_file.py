# SPDX-License-Identifier: Apache-2.0
"""What a .pte holds, read from its bytes: methods, operators, delegates with their linears, constants, sections.

    flatbuffer "ET12" (program.fbs)     execution plans, and where the segments lie
    segments                            constants of portable kernels, delegates' payloads, named data

Weights of the delegates are named data, stored once for all methods. Slot numbers are those of the schema of ExecuTorch
1.4; a delegate's own are in `mossquant.targets.executorch.delegate`. A stranger's file is first read in a child process
with limits (`read`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossquant.errors import InputError
from mossquant.files.json import LARGEST_SMALL, parse_json
from mossquant.targets.executorch.delegate import Delegate, array, read_delegate, sizes
from mossquant.targets.executorch.flatbuffer import DamagedError, Table, root

METADATA = "mossquant"
"""A method that takes nothing and returns what the program says about itself, as JSON."""

WEIGHTS, CONSTANTS = "weights of the delegates", "tables and small tensors"
"""Names of the sections that hold weights."""

_HEADER = slice(8, 40)
_NULL, _INT, _BOOL, _DOUBLE, _TENSOR, _STRING, _INTS, _TENSORS = 1, 2, 3, 4, 5, 6, 7, 10  # of the union KernelTypes
_KERNEL, _DELEGATE, _JUMP = 1, 2, 4  # of the union InstructionArguments
_SEGMENT = 1  # DataLocation
_TYPES = {0: "u1", 1: "i1", 3: "<i4", 4: "<i8", 6: "<f4", 11: "?"}  # ScalarType
_AGAIN = "copy the artifact's folder again, or export again"


@dataclass(frozen=True)
class PlanMethod:
    """One execution plan.

    Attributes:
        name: the method's name.
        inputs: (numpy type, sizes) of each; where a size is dynamic, its largest.
        outputs: the same.
        operators: names of the operators outside delegates.
        delegates: XNNPACK's.
        constants: of operators outside delegates, and inputs of delegates.
        planned_bytes: memory that the runtime sets aside for values.
    """

    name: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    operators: tuple[str, ...]
    delegates: tuple[Delegate, ...]
    constants: tuple[NDArray[Any], ...]
    planned_bytes: int


@dataclass(frozen=True)
class Variable:
    """A tensor that is given to a method, or computed by it: its number among the method's values."""

    number: int


@dataclass(frozen=True)
class KernelCall:
    """A call of an operator.

    Attributes:
        operator: its name.
        arguments: constants, variables, numbers, None, and lists of them; outputs come last.
    """

    operator: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Chain:
    """A method that is nothing but calls of operators, one after the other."""

    inputs: tuple[Variable, ...]
    outputs: tuple[Variable, ...]
    calls: tuple[KernelCall, ...]


class ProgramFile:
    """A .pte.

    Args:
        path: the file; it is mapped, not read.

    Raises:
        InputError: it is no .pte, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = memoryview(np.memmap(path, np.uint8, mode="r"))  # type: ignore[arg-type]
        except ValueError:
            raise InputError(f"{path} is empty; {_AGAIN}") from None
        self._delegates: dict[int, Delegate] = {}
        with _reading(path):
            self._open()

    def _open(self) -> None:
        data = self._data
        header = bytes(data[_HEADER])
        if header[:4] != b"eh00" or len(header) < 32:
            raise DamagedError("it is no ExecuTorch program with segments")
        self.program_bytes, self._base, segment_bytes = (
            int.from_bytes(header[at : at + 8], "little") for at in (8, 16, 24)
        )
        if not 48 <= self.program_bytes <= self._base <= len(data) or self._base + segment_bytes != len(data):
            raise DamagedError(f"it has {len(data)} bytes and its header says {self._base + segment_bytes}")
        self._program = root(data[: self.program_bytes], b"ET12")
        self._segments = [
            self._part(segment.number(0, "<u8"), segment.number(1, "<u8")) for segment in self._program.tables(4)
        ]
        self._named = {entry.string(0): self._segments[entry.number(1)] for entry in self._program.tables(7)}
        constants = self._program.table(5)
        self._constants, self._constant_offsets = data[:0], np.empty(0, "<u8")
        if constants is not None and len(self._segments) > 0:
            self._constants = self._segments[constants.number(0)]
            self._constant_offsets = constants.numbers(1, "<u8")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the program says about itself. Raises `InputError` where it says nothing."""
        with _reading(self.path):
            for plan in self._program.tables(1):
                if plan.string(0) == METADATA:
                    kind, value = list(plan.tables(2))[int(plan.numbers(4, "<i4")[0])].union(1)
                    if kind == _STRING and value is not None:
                        text = value.numbers(0, "u1").tobytes()
                        if len(text) > LARGEST_SMALL:
                            raise DamagedError(f"it says more about itself than {LARGEST_SMALL >> 20} MB")
                        metadata = parse_json(text)
                        if isinstance(metadata, dict):
                            return metadata
        raise InputError(f"{self.path} was not written by mossquant; give a .pte that `mossquant export` wrote")

    @cached_property
    def methods(self) -> Mapping[str, PlanMethod]:
        """Every method but the one that returns the metadata, by name."""
        with _reading(self.path):
            methods: dict[str, PlanMethod] = {}
            for plan in self._program.tables(1):
                name = plan.string(0)
                if name in methods:
                    raise DamagedError(f"method {name[:40]!r} is there twice")
                if name != METADATA:
                    methods[name] = self._method(plan)
            return methods

    @cached_property
    def sections(self) -> dict[str, int]:
        """Bytes by section; together they are the file."""
        with _reading(self.path):
            payloads = {
                reference.number(1)
                for plan in self._program.tables(1)
                for delegate in plan.tables(7)
                if (reference := delegate.table(1)) is not None and reference.number(0, "u1") == _SEGMENT
            }
            sections = {
                "methods": self.program_bytes,
                "delegates' graphs": sum(len(self._segments[index]) for index in payloads),
                WEIGHTS: sum(len(data) for data in self._named.values()),
                CONSTANTS: len(self._constants),
            }
            rest = len(self._data) - sum(sections.values())
            if rest < 0:
                raise DamagedError("its sections overlap")
            return sections | {"alignment": rest}

    def chain(self, name: str) -> Chain:
        """The calls of a method. Raises `InputError`: it does other things than to call operators."""
        with _reading(self.path):
            (plan,) = [plan for plan in self._program.tables(1) if plan.string(0) == name]
            operators = [f"{operator.string(0)}.{operator.string(1)}" for operator in plan.tables(6)]
            values = list(plan.tables(2))
            calls = []
            for instructions in plan.tables(5):
                for instruction in instructions.tables(2):
                    kind, call = instruction.union(1)
                    if kind != _KERNEL or call is None:
                        raise DamagedError(f"{name} does other things than to call operators")
                    arguments = [self._argument(values, int(number)) for number in call.numbers(1, "<i4")]
                    calls.append(KernelCall(operators[call.number(0)], tuple(arguments)))
            inputs, outputs = (tuple(Variable(int(number)) for number in plan.numbers(slot, "<i4")) for slot in (3, 4))
            return Chain(inputs, outputs, tuple(calls))

    def _argument(self, values: list[Table], number: int, *, in_list: bool = False) -> Any:
        if not 0 <= number < len(values):
            raise DamagedError("an operator takes what is not there")
        kind, value = values[number].union(1)
        if value is None or kind == _NULL:
            return None
        if kind == _TENSOR:
            index = value.number(5)
            return self._constant(value, index) if index else Variable(number)
        if kind in (_INT, _BOOL):
            return value.number(0, "<i8") if kind == _INT else bool(value.number(0, "u1"))
        if kind == _DOUBLE:
            return value.real(0)
        if kind in (_INTS, _TENSORS) and not in_list:  # numbers of values, both
            items = value.numbers(0, "<i8" if kind == _INTS else "<i4")
            return [self._argument(values, int(item), in_list=True) for item in items]
        raise DamagedError("an operator takes what mossquant does not write")

    def _method(self, plan: Table) -> PlanMethod:
        _check_calls(plan)
        constants = []
        values = list(plan.tables(2))

        def ports(slot: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
            return tuple(_port(values, int(index)) for index in plan.numbers(slot, "<i4"))

        for value in values:
            kind, tensor = value.union(1)
            # Equal constants are stored once, and each is a value of its own.
            if kind == _TENSOR and tensor is not None and (index := tensor.number(5)):
                constants.append(self._constant(tensor, index))
        delegates = tuple(self._delegate(delegate) for delegate in plan.tables(7))
        return PlanMethod(
            name=plan.string(0),
            inputs=ports(3),
            outputs=ports(4),
            operators=tuple(f"{operator.string(0)}.{operator.string(1)}" for operator in plan.tables(6)),
            delegates=delegates,
            constants=tuple(constants),
            planned_bytes=int(plan.numbers(8, "<i8").sum()),
        )

    def _constant(self, tensor: Table, index: int) -> NDArray[Any]:
        kind = _TYPES.get(tensor.number(0, "i1"))
        if kind is None:
            raise DamagedError("a constant has a type that mossquant does not write")
        return array(self._constants, int(self._constant_offsets[index]), kind, tensor.numbers(2, "<i4"))

    def _delegate(self, delegate: Table) -> Delegate:
        reference = delegate.table(1)
        if delegate.string(0) != "XnnpackBackend" or reference is None or reference.number(0, "u1") != _SEGMENT:
            raise DamagedError("a delegate is not XNNPACK's")
        index = reference.number(1)
        if index not in self._delegates:  # methods share many
            self._delegates[index] = read_delegate(self._segments[index], self._named)
        return self._delegates[index]

    def _part(self, offset: int, size: int) -> memoryview:
        start = self._base + offset
        if start + size > len(self._data):
            raise DamagedError("a segment ends behind the file")
        return self._data[start : start + size]


def read(path: Path) -> None:
    """Read all that is ever read of a program. Raises `InputError`: it is damaged."""
    file = ProgramFile(path)
    for part in (file.methods, file.sections, file.metadata):
        assert part is not None
    for method in file.methods.values():
        if not method.delegates:
            file.chain(method.name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make a user's error that names the file of whatever damage raises."""
    try:
        yield
    except (ValueError, RecursionError, LookupError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a .pte that can be read ({reason}); {_AGAIN}") from None


def _check_calls(plan: Table) -> None:
    """What an instruction calls, and where it jumps to: the runtime does not stop at what is not there."""
    limits = {_KERNEL: sum(1 for _ in plan.tables(6)), _DELEGATE: sum(1 for _ in plan.tables(7))}
    for chain in plan.tables(5):
        calls = [instruction.union(1) for instruction in chain.tables(2)]
        for kind, call in calls:
            slot, limit = (1, len(calls)) if kind == _JUMP else (0, limits.get(kind))
            if limit is not None and (call is None or call.number(slot) >= limit):
                raise DamagedError("an instruction calls or jumps to what is not there")


def _port(values: list[Table], index: int) -> tuple[str, tuple[int, ...]]:
    kind, tensor = values[index].union(1) if 0 <= index < len(values) else (0, None)
    if kind != _TENSOR or tensor is None:
        raise DamagedError("a method takes or gives what is no tensor")
    return _TYPES.get(tensor.number(0, "i1"), "?"), sizes(tensor.numbers(2, "<i4"))
