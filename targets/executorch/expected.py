# SPDX-License-Identifier: Apache-2.0
"""What every method of a .pte must hold, as it follows from the checkpoint alone, in the order of the program."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.weights import Weights, value
from mossquant.model.tensors import TensorSpec

__all__ = ["Expected", "Held", "expected_constants", "expected_linears"]

_EXP_TOLERANCE = 1e-6
"""Relative: −exp(A_log) was computed where the program was made, to within a rounding or two of any other exp."""
_LINEARS = (
    "ssm.in_proj",
    "ssm.router",
    "ssm.expert.x_proj",
    "ssm.expert.dt_bias",
    "ssm.expert.dt_proj",
    "ssm.out_proj",
    "mlp.router",
    "mlp.expert.w1",
    "mlp.expert.w3",
    "mlp.expert.w2",
)
"""In the order in which a block computes them."""
_SUMMED = ("ssm.expert.dt_proj", "mlp.expert.w2")


class Held(Protocol):
    """An array with its scales, wherever it lies; `kind` is what may be exchanged for one another."""

    @property
    def bits(self) -> int | None: ...
    @property
    def rounds_input(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> tuple[object, ...]: ...
    @property
    def codes(self) -> NDArray[Any]: ...
    @property
    def scales(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Expected:
    """An array that a method must hold: what it is called, and codes with scales, or values.

    `rounds_input` says whether the input that it meets is rounded to int8 at run time.
    """

    name: str
    codes: NDArray[Any]
    scales: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    bits: int | None = None
    group: int = 0
    rounds_input: bool = False
    tolerance: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def kind(self) -> tuple[object, ...]:
        return (self.bits, self.group, self.rounds_input, self.codes.dtype, self.codes.shape)

    def holds(self, other: Held) -> bool:
        """Whether the other one is the same, bit for bit or up to the tolerance."""
        if self.kind != other.kind:
            return False
        if self.tolerance:
            return bool(np.allclose(other.codes, self.codes, self.tolerance, 0))
        return self.codes.tobytes() == other.codes.tobytes() and self.scales.tobytes() == other.scales.tobytes()


def expected_linears(weights: Weights, specs: Sequence[TensorSpec]) -> list[Expected]:
    """Every linear, as the design lays it out: experts one below the other, or side by side where they are summed."""
    expected = []
    for layer in sorted({spec.layer for spec in specs if spec.layer is not None}):
        for role in _LINEARS:
            names = [spec.name for spec in specs if spec.layer == layer and spec.role == role]
            if role == "ssm.expert.dt_bias":
                if len(names) > 1:
                    columns = np.stack([_value(weights, name) for name in names], 1)
                    expected.append(Expected(_title(names), columns))
                continue
            for run in _runs(weights, names, apart=role in _SUMMED):
                expected.append(_matrix(weights, run, 1 if role in _SUMMED else 0))
    head = next((spec for spec in specs if spec.role == "head"), None)
    embedding = next(spec for spec in specs if spec.role == "embedding")
    return [*expected, _matrix(weights, [(head or embedding).name], 0)]


def _runs(weights: Weights, names: Sequence[str], *, apart: bool) -> list[list[str]]:
    """Experts of one format; weights with one scale a row cannot lie side by side."""

    def storage(item: tuple[int, str]) -> tuple[str, int]:
        found = weights.format(item[1])
        if found is None:
            return "kept", -1
        return found.name, item[0] if apart and found.group_size is None else -1

    return [[name for _, name in run] for _, run in groupby(enumerate(names), key=storage)]


def _matrix(weights: Weights, names: Sequence[str], axis: int) -> Expected:
    found = weights.format(names[0])
    if found is None:
        parts = [weights.specs[name].to_matrix(weights.kept(name)).float() for name in names]
        return Expected(_title(names), torch.cat(parts, axis).numpy())
    tensors = [weights.quantized(name) for name in names]
    columns = tensors[0].columns if found.group_size is None else None
    codes = torch.cat([tensor.codes[:, :columns] for tensor in tensors], axis).numpy()
    scales = torch.cat([tensor.scales.float() for tensor in tensors], axis).numpy()
    return Expected(_title(names), codes, scales, found.bits, found.group_size or 0, rounds_input=True)


def _tables(weights: Weights, specs: Sequence[TensorSpec]) -> Iterator[Expected]:
    name = next(spec.name for spec in specs if spec.role == "embedding")
    found = weights.format(name)
    if found is None:
        yield Expected(name, weights.kept(name).float().numpy())
        return
    table = weights.quantized(name)
    codes = table.codes.numpy() if found.group_size is not None else table.codes[:, : table.columns].numpy()
    if found.bits == 4:
        unsigned = (codes.astype(np.int16) + 8).astype(np.uint8)
        codes = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
    yield Expected(name, codes)
    yield Expected(f"{name}, scales", table.scales.float().numpy())


def expected_constants(weights: Weights, specs: Sequence[TensorSpec]) -> list[Expected]:
    """Small tensors, and the table of the embedding."""
    return [*_small(weights, specs), *_tables(weights, specs)]


def _small(weights: Weights, specs: Sequence[TensorSpec]) -> Iterator[Expected]:
    """As the values that their codes mean: those of the mixers block by block, then the norms by role."""
    experts = {spec.layer for spec in specs if spec.role == "ssm.expert.dt_bias" and (spec.expert or 0) > 0}
    for layer in sorted({spec.layer for spec in specs if spec.layer is not None}):
        own = {spec.role: spec for spec in specs if spec.layer == layer}
        taps = _value(weights, own["ssm.conv"].name).reshape(own["ssm.conv"].shape[0], -1)
        for tap in range(taps.shape[1]):
            yield Expected(f"{own['ssm.conv'].name}, tap {tap}", np.ascontiguousarray(taps[:, tap]))
        yield _plain(weights, own["ssm.conv_bias"])
        decay = (-np.exp(_value(weights, own["ssm.A_log"].name).astype(np.float64))).astype(np.float32)
        yield Expected(own["ssm.A_log"].name, decay, tolerance=_EXP_TOLERANCE)
        yield _plain(weights, own["ssm.D"])
        if layer not in experts:
            yield _plain(weights, own["ssm.expert.dt_bias"])
    for role in ("ssm.norm", "mlp.norm", "norm_f"):
        for spec in specs:
            if spec.role == role:
                yield _plain(weights, spec)


def _plain(weights: Weights, spec: TensorSpec) -> Expected:
    return Expected(spec.name, _value(weights, spec.name))


def _value(weights: Weights, name: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = value(weights, name).contiguous().numpy()
    return found


def _title(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
