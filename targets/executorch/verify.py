# SPDX-License-Identifier: Apache-2.0
"""Whether a .pte holds the weights of its checkpoint: in every method, code for code, scale for scale, value for value.

A .pte has no names for its weights. What every method must hold follows from the checkpoint alone: linears with the
codes of one tensor, or of a run of experts, and constants with the values of small tensors. Each expected one is looked
for among those of its shape; what is missing is compared with what is left over, so that the place can be named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.capabilities import get_target
from mossquant.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.locate import Located, locate
from mossquant.quantized import QuantizedCheckpoint
from mossquant.targets.executorch.metadata import read_metadata
from mossquant.targets.executorch.program_file import Linear, PlanMethod, ProgramFile
from mossquant.targets.program import METHODS
from mossquant.targets.source import CheckpointSource, QuantizedSource, Source
from mossquant.targets.weights_report import WeightsReport, first_difference
from mossquant.tensors import TensorSpec

__all__ = ["check_linears", "verify"]

_EXP_TOLERANCE = 1e-6
"""Relative: −exp(A_log) was computed where the program was made, to within a rounding or two of any other exp."""
_SCALARS = 16
"""Constants of so few values belong to shapes and formulas, not to tensors."""
_STACKED = (
    "ssm.in_proj",
    "ssm.expert.x_proj",
    "ssm.out_proj",
    "ssm.router",
    "mlp.router",
    "mlp.expert.w1",
    "mlp.expert.w3",
)
_SUMMED = ("ssm.expert.dt_proj", "mlp.expert.w2")


@dataclass(frozen=True)
class _Expected:
    """An array that a method must hold: what it is called, and codes with scales, or values."""

    name: str
    codes: NDArray[Any]
    scales: NDArray[np.float32]
    bits: int | None = None
    tolerance: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        return (self.bits, self.codes.shape, self.codes.tobytes(), self.scales.tobytes())


def verify(checkpoint: str | Path | Located, artifact: str | Path | Located) -> WeightsReport:
    """Compare every weight in a .pte with the checkpoint that it was lowered from.

    Args:
        checkpoint: the quantized checkpoint; the full-precision one for an artifact of that.
        artifact: the .pte, or the folder that holds it.

    Raises:
        InputError: one of them cannot be read, or the artifact is of a model of another shape.
    """
    source_at = checkpoint if isinstance(checkpoint, Located) else locate(checkpoint)
    folder = source_at.require("checkpoint", "quantized checkpoint", verb="verify")
    at = artifact if isinstance(artifact, Located) else locate(artifact)
    file = ProgramFile(at.require("executorch", verb="verify"))
    metadata = read_metadata(file)
    source: Source
    if source_at.kind == "quantized checkpoint":
        opened: Checkpoint | QuantizedCheckpoint = QuantizedCheckpoint.open(folder)
        assert isinstance(opened, QuantizedCheckpoint)
        source = QuantizedSource(opened, get_target("executorch"))
    else:
        opened = Checkpoint.open(folder)
        source = CheckpointSource(opened)
    if opened.config.to_json(torch_dtype=opened.torch_dtype) != metadata.config:
        raise InputError(
            f"{at.given} is a model of another shape than {source_at.given}; give what it was lowered from"
        )
    specs = list(opened.specs.values())
    linears, constants = _linears(source, specs), [*_constants(source, specs), *_tables(source, specs)]
    differences = [f"method {name} is missing" for name in METHODS if name not in file.methods]
    for method in file.methods.values():
        differences += [f"{method.name}: {what}" for what in _compare(method, linears, constants)]
    return WeightsReport(at.given, len(specs), sum(spec.count for spec in specs), tuple(differences))


def check_linears(file: ProgramFile, source: Source, specs: Sequence[TensorSpec]) -> None:
    """Whether every matrix became the linear that the plan says, inside a delegate, in every method.

    Raises:
        RuntimeError: quantized linears are missing, or there are fp32 ones that the plan does not keep: the lowering
            lost what it was given. They are named.
    """
    expected = _linears(source, specs)
    for method in file.methods.values():
        outside = [name for name in method.operators if name.split("::")[-1].split(".")[0] in _MATMULS]
        if outside:
            raise RuntimeError(f"{method.name}: linears were left outside the delegate: {', '.join(outside)}")
        found = [(linear.bits, linear.codes.shape) for part in method.delegates for linear in part.linears]
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


def _compare(method: PlanMethod, linears: list[_Expected], constants: list[_Expected]) -> Iterator[str]:
    found = [_found(linear) for part in method.delegates for linear in part.linears]
    yield from _match(linears, found)
    plain = [c for part in method.delegates for c in part.constants] + list(method.constants)
    large = [_Expected("", value, _EMPTY) for value in plain if value.size > _SCALARS]
    small = [_Expected("", value, _EMPTY) for value in plain if value.size <= _SCALARS]
    # A small tensor may be as short as a number of a formula; what is left over of those is not an offender.
    yield from _match([one for one in constants if one.codes.size > _SCALARS], large)
    yield from _match([one for one in constants if one.codes.size <= _SCALARS], small, all_of_them=False)


_EMPTY = np.empty(0, np.float32)


def _found(linear: Linear) -> _Expected:
    return _Expected("", linear.codes, linear.scales, linear.bits)


def _match(expected: list[_Expected], found: list[_Expected], *, all_of_them: bool = True) -> Iterator[str]:
    """Pair what is expected with what is found; then say how the rest differs."""
    left: dict[tuple[object, ...], list[_Expected]] = {}
    for one in found:
        left.setdefault(one.key, []).append(one)
    missing = []
    for one in expected:
        same = left.get(one.key)
        if same:
            same.pop()
        else:
            missing.append(one)
    rest = [one for group in left.values() for one in group]
    for one in missing:
        alike = [other for other in rest if (other.bits, other.codes.shape) == (one.bits, one.codes.shape)]
        if not alike:
            yield f"{one.name} is not in the file as {_kind(one.bits)} {list(one.codes.shape)}"
            continue
        nearest = min(alike, key=lambda other, one=one: int((other.codes != one.codes).sum()))  # type: ignore[misc]
        rest.remove(nearest)
        if one.tolerance and np.allclose(nearest.codes, one.codes, one.tolerance, 0):
            continue
        what = "value" if one.bits is None else "code"
        difference = first_difference(nearest.codes, one.codes, what)
        yield f"{one.name}: {difference or first_difference(nearest.scales, one.scales, 'scale')}"
    if all_of_them:
        for one in rest:
            yield f"a {_kind(one.bits)} array {list(one.codes.shape)} is in the file and belongs to no tensor"


def _linears(source: Source, specs: Sequence[TensorSpec]) -> list[_Expected]:
    """Every linear, as the design lays it out: experts one below the other, or side by side where they are summed."""
    expected = []
    for layer in sorted({spec.layer for spec in specs if spec.layer is not None}):
        own = [spec for spec in specs if spec.layer == layer]
        for role in (*_STACKED, *_SUMMED):
            names = [spec.name for spec in own if spec.role == role]
            for run in _runs(source, names, apart=role in _SUMMED):
                expected.append(_matrix(source, run, 1 if role in _SUMMED else 0))
        biases = [spec.name for spec in own if spec.role == "ssm.expert.dt_bias"]
        if len(biases) > 1:
            columns = np.stack([_value(source, name) for name in biases], 1)
            expected.append(_Expected(_title(biases), columns, _EMPTY))
    head = next((spec for spec in specs if spec.role == "head"), None)
    embedding = next(spec for spec in specs if spec.role == "embedding")
    return [*expected, _matrix(source, [(head or embedding).name], 0)]


def _runs(source: Source, names: Sequence[str], *, apart: bool) -> list[list[str]]:
    """Experts of one format; weights with one scale a row cannot lie side by side."""

    def storage(item: tuple[int, str]) -> tuple[str, int]:
        found = source.format(item[1])
        if found is None:
            return "kept", -1
        return found.name, item[0] if apart and found.group_size is None else -1

    return [[name for _, name in run] for _, run in groupby(enumerate(names), key=storage)]


def _matrix(source: Source, names: Sequence[str], axis: int) -> _Expected:
    found = source.format(names[0])
    if found is None:
        parts = [source.spec(name).to_matrix(source.kept(name)).float() for name in names]
        return _Expected(_title(names), torch.cat(parts, axis).numpy(), _EMPTY)
    tensors = [source.quantized(name) for name in names]
    columns = tensors[0].columns if found.group_size is None else None
    codes = torch.cat([tensor.codes[:, :columns] for tensor in tensors], axis).numpy()
    scales = torch.cat([tensor.scales.float() for tensor in tensors], axis).numpy()
    return _Expected(_title(names), codes, scales, found.bits)


def _tables(source: Source, specs: Sequence[TensorSpec]) -> Iterator[_Expected]:
    name = next(spec.name for spec in specs if spec.role == "embedding")
    found = source.format(name)
    if found is None:
        yield _Expected(name, source.kept(name).float().numpy(), _EMPTY)
        return
    table = source.quantized(name)
    codes = table.codes.numpy() if found.group_size is not None else table.codes[:, : table.columns].numpy()
    if found.bits == 4:
        unsigned = (codes.astype(np.int16) + 8).astype(np.uint8)
        codes = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
    yield _Expected(name, codes, _EMPTY)
    yield _Expected(f"{name}, scales", table.scales.float().numpy(), _EMPTY)


def _constants(source: Source, specs: Sequence[TensorSpec]) -> Iterator[_Expected]:
    """Small tensors, as the values that their codes mean."""
    experts = {spec.layer for spec in specs if spec.role == "ssm.expert.dt_bias" and (spec.expert or 0) > 0}
    for spec in specs:
        values = None
        if (
            spec.role.endswith("norm")
            or spec.role in ("norm_f", "ssm.conv_bias", "ssm.D")
            or (spec.role == "ssm.expert.dt_bias" and spec.layer not in experts)
        ):
            values = _value(source, spec.name)
        elif spec.role == "ssm.A_log":
            decay = (-np.exp(_value(source, spec.name).astype(np.float64))).astype(np.float32)
            yield _Expected(spec.name, decay, _EMPTY, tolerance=_EXP_TOLERANCE)
        elif spec.role == "ssm.conv":
            taps = _value(source, spec.name).reshape(spec.shape[0], -1)
            for tap in range(taps.shape[1]):
                yield _Expected(f"{spec.name}, tap {tap}", np.ascontiguousarray(taps[:, tap]), _EMPTY)
        if values is not None:
            yield _Expected(spec.name, values, _EMPTY)


def _value(source: Source, name: str) -> NDArray[np.float32]:
    if source.format(name) is None:
        values = source.kept(name).float()
    else:
        values = source.spec(name).from_matrix(source.quantized(name).dequantize())
    found: NDArray[np.float32] = values.contiguous().numpy()
    return found


def _title(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
