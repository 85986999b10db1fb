# SPDX-License-Identifier: Apache-2.0
"""What one decoded token costs on some machine, by format and shape of its linears: the file that `moss-costs` writes.

    time of a token = fixed + Σ over its linears of time[format, shape]        of a layer's experts the chosen ones

Everything that is no linear is in `fixed`. Times were measured one linear at a time, on weights of which the caches
held as much as of the model that was given to `moss-costs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mossquant.calibration.options import stored_bytes
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.json import read_stored
from mossquant.model.mossnet import experts_of
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan.recipe import STORED

_KEPT = "float32"
"""How libmoss computes with a matrix that is kept, whatever type it is stored in."""
_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
_Nanoseconds = Annotated[float, Field(ge=0, le=1e15)]


@dataclass(frozen=True)
class LinearCost:
    """Nanoseconds of one linear for one row of input."""

    __pydantic_config__ = _STRICT

    format: Annotated[str, Field(max_length=80)]
    outputs: int
    columns: int
    ns: _Nanoseconds


@dataclass(frozen=True)
class Costs:
    """What a token costs.

    Attributes:
        version: of the stored form.
        machine: the processor.
        threads: with which it was measured.
        step_ns: nanoseconds of a whole step of the model that was timed.
        fixed_ns: of that step, what is no linear.
        linears: by format and shape.
    """

    __pydantic_config__ = _STRICT

    version: Literal[1]
    machine: Annotated[str, Field(max_length=200)]
    threads: int
    step_ns: _Nanoseconds
    fixed_ns: _Nanoseconds
    linears: Annotated[tuple[LinearCost, ...], Field(max_length=10_000)]

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """Read a file. Raises `InputError`: it is unreadable, or not what `moss-costs` writes."""
        return read_stored(path, cls, noun="costs of a token", advice="Give what `moss-costs MODEL.moss` wrote.")

    @cached_property
    def _by_shape(self) -> Mapping[tuple[str, int, int], float]:
        return {(cost.format, cost.outputs, cost.columns): cost.ns for cost in self.linears}

    def tensors_ns(self, weights: Weights, specs: Sequence[TensorSpec], storage: str) -> float:
        """Nanoseconds of a token that linears with these tensors take in a format ("stored": as they are).

        Raises:
            InputError: a shape or format was not timed.
        """
        shares = {
            name: experts.chosen / experts.count
            for experts in experts_of(weights.config)
            for member in experts.members
            for name in member
        }
        total = 0.0
        for spec in specs:
            if spec.site is None or not spec.use & {Use.LINEAR, Use.SUMMED}:
                continue
            kept = weights.kept(spec.name)
            stays = storage == STORED or stored_bytes(weights, spec, storage) == kept.nbytes
            key = (_KEPT if stays else storage, *spec.matrix_shape)
            if key not in self._by_shape:
                raise InputError(
                    f"the costs of {self.machine} have no linear of {key[1]} × {key[2]} in {key[0]}, which {spec.name} "
                    "needs; time a model of this shape with moss-costs"
                )
            total += shares.get(spec.name, 1.0) * self._by_shape[key]
        return total
