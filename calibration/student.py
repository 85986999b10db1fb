# SPDX-License-Identifier: Apache-2.0
"""A model computed with what a plan will store of it, every stored value of which can be trained.

    quantized:  value = round(u) · s,   s = s₀ · e^r in the stored scale type     [rows, groups, G] · [rows, groups, 1]
    kept:       value = w + x · m in the stored float type,                       m the root mean square of w

u are the weights in units of their group's scale, r the logarithm of what became of the scale, x what was added to a
kept tensor w, in units of its size: a step of an optimizer means the same everywhere. Roundings pass gradients straight
through (Bengio, Léonard & Courville 2013): dvalue/du = s, dvalue/dr = value, dvalue/dx = m. u starts where the
full-precision weight lies or, where that rounds to another code than the solved one, on the code: the start is what was
solved, and what a solver moved to make up for others does not fall back at the first step.
Tensors that the model stacks are one parameter, as far as their neighbours are stored alike.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mossquant.checkpoint.weights import View, Weights, value
from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.formats.activations import straight_through
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import Plan

Stored = QuantizedTensor | Tensor
"""A tensor as a plan stores it: its quantized matrix view, or the tensor in the type in which it is kept."""

REACH = 0.499
"""How far from a code its u may lie at the start, and from the outermost codes at any time."""


class Planned(View):
    """Full-precision weights as a plan stores them.

    Args:
        weights: the full-precision model.
        plan: its plan.
        tensors: tensor name → as stored; kept ones that are not there are the model's own.
    """

    def __init__(self, weights: Weights, plan: Plan, tensors: Mapping[str, Stored]) -> None:
        super().__init__(weights)
        self._plan, self._tensors = plan, tensors

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor."""
        return self._plan.weight_format(name)

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor."""
        stored = self._tensors.get(name)
        if not isinstance(stored, QuantizedTensor):
            raise ValueError(f"{name} is not quantized")
        return stored

    def kept(self, name: str) -> Tensor:
        """A tensor that is kept, in the plan's type."""
        entry, stored = self._plan.by_name[name], self._tensors.get(name)
        if entry.kept is None or isinstance(stored, QuantizedTensor):
            raise ValueError(f"{name} is not kept")
        return (self._weights.kept(name) if stored is None else stored).to(FLOAT_DTYPES[entry.kept])

    def activation(self, site: str) -> str:
        """The activation format of a site."""
        return self._plan.site(site).format


class Student:
    """The values of a model as they will be stored, and the parameters behind them.

    Args:
        weights: the full-precision model.
        plan: its plan.
        solved: tensor name → its quantized matrix view.
        codes: whether codes are trained; else scales and kept tensors only.
        device: where it is computed.
        frozen: names of tensors that stay as they are.

    Attributes:
        groups: optimizer's groups with parameters of one kind: "codes" (in codes), "small" (the same of tensors that
            are no matrices), "scales" (relative), "kept" (relative).
    """

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        solved: Mapping[str, QuantizedTensor],
        *,
        codes: bool,
        device: str = "cpu",
        frozen: Collection[str] = (),
    ) -> None:
        start = Planned(weights, plan, solved)
        of_parameter: dict[tuple[int | None, str], list[TensorSpec]] = {}
        for spec in weights.specs.values():
            of_parameter.setdefault((spec.layer, spec.role), []).append(spec)
        self._runs: dict[str, list[_Quantized | _Kept]] = {}
        self.groups: dict[str, list[nn.Parameter]] = {"codes": [], "small": [], "scales": [], "kept": []}
        for specs in of_parameter.values():
            runs: list[_Quantized | _Kept] = []
            alike = groupby(specs, key=lambda spec: (plan.by_name[spec.name].storage, spec.name in frozen))
            for (storage, stays), run in alike:
                made: _Quantized | _Kept
                if storage in FLOAT_DTYPES:
                    made = _Kept(list(run), start, FLOAT_DTYPES[storage], device)
                    parameters = {"kept": made.x}
                else:
                    made = _Quantized(list(run), start, weights, get_format(storage), codes and not stays, device)
                    parameters = {"scales": made.r, "codes" if specs[0].is_matrix else "small": made.u}
                for kind, parameter in parameters.items():
                    parameter.requires_grad_(parameter.requires_grad and not stays)
                    if parameter.requires_grad:
                        self.groups[kind].append(parameter)
                runs.append(made)
            self._runs[specs[0].name] = runs
        self._names = list(weights.specs)
        self._values: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Compute every value anew from the parameters, as part of the graph that the next pass makes."""
        self._values = {
            name: runs[0].values() if len(runs) == 1 else torch.cat([run.values() for run in runs])
            for name, runs in self._runs.items()
        }

    def parameter(self, names: Sequence[str], parameter: Tensor) -> Tensor:
        """What is computed with in place of a parameter of the model, for `Forward`."""
        return self._values[names[0]].view(parameter.shape)

    def stay_in_range(self) -> None:
        """Bring u back between the outermost codes, after a step."""
        for run in self._all():
            if isinstance(run, _Quantized):
                run.stay_in_range()

    def tensors(self) -> dict[str, Stored]:
        """Every tensor as it is stored, by name, in processing order, on the CPU."""
        made = {name: stored for run in self._all() for name, stored in run.stored()}
        return {name: made[name] for name in self._names}

    def _all(self) -> Iterator["_Quantized | _Kept"]:
        for runs in self._runs.values():
            yield from runs


class _Quantized:
    """Tensors of one role, layer and format, their matrix views one below the other."""

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        start: Planned,
        weights: Weights,
        number_format: NumberFormat,
        codes: bool,
        device: str,
    ) -> None:
        self._specs, self._format = specs, number_format
        solved = [start.quantized(spec.name) for spec in specs]
        self._scales = torch.cat([one.scales for one in solved]).float().to(device)
        u = torch.cat([one.codes for one in solved]).float().view(*self._scales.shape, -1).to(device)
        if codes:
            matrix = torch.cat([spec.to_matrix(weights.kept(spec.name)).float() for spec in specs])
            exact = number_format.grouped(matrix.to(device)) / self._scales.unsqueeze(-1)
            u = torch.where((exact - u).abs() <= REACH, exact, u)
        self.u = nn.Parameter(u, requires_grad=codes)
        self.r = nn.Parameter(torch.zeros_like(self._scales))

    def values(self) -> Tensor:
        """fp32 [tensors, *shape in the checkpoint]."""
        made: Tensor = FakeQuantize.apply(self.u, self.r, self._scales, self._format)  # type: ignore[no-untyped-call]
        (rows, columns), count = self._specs[0].matrix_shape, len(self._specs)
        matrices = made.view(count, rows, -1)[..., :columns]
        if len(self._specs[0].shape) == 3:
            matrices = matrices.transpose(1, 2)
        return matrices.reshape(count, *self._specs[0].shape)

    def stay_in_range(self) -> None:
        if self.u.requires_grad:
            self.u.detach().clamp_(self._format.code_min - REACH, self._format.code_max + REACH)

    def stored(self) -> Iterator[tuple[str, Stored]]:
        rows, columns = self._specs[0].matrix_shape
        codes = self.u.detach().round().to(torch.int8).flatten(1).cpu()
        scales = self._format.round_scales(self._scales * self.r.detach().exp()).cpu()
        for index, spec in enumerate(self._specs):
            own = slice(index * rows, (index + 1) * rows)
            yield spec.name, QuantizedTensor(self._format, codes[own], scales[own], rows, columns)


class _Kept:
    """Tensors of one role and layer that are kept in one type."""

    def __init__(self, specs: Sequence[TensorSpec], start: Planned, dtype: torch.dtype, device: str) -> None:
        self._specs, self._dtype = specs, dtype
        exact = torch.stack([value(start, spec.name) for spec in specs]).to(device)
        size = float(exact.square().mean().sqrt())
        self._unit = size if size > 0 else 1.0
        self._start = exact
        self.x = nn.Parameter(torch.zeros_like(exact))

    def values(self) -> Tensor:
        """fp32 [tensors, *shape in the checkpoint]."""
        return straight_through(self._start + self.x * self._unit, lambda moved: moved.to(self._dtype).float())

    def stored(self) -> Iterator[tuple[str, Stored]]:
        for spec, one in zip(self._specs, self.values().detach().to(self._dtype).cpu(), strict=True):
            yield spec.name, one.clone()


class FakeQuantize(torch.autograd.Function):
    """u [n, groups, G], r and s₀ [n, groups] → round(u) · s; d/du = s, d/dr = value."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, r: Tensor, scales: Tensor, number_format: NumberFormat) -> Tensor:
        stored = number_format.round_scales(scales * r.exp()).float().unsqueeze(-1)
        made = u.round().mul_(stored)
        ctx.save_for_backward(made, stored)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        made, stored = ctx.saved_tensors
        d_u = grads[0] * stored if ctx.needs_input_grad[0] else None
        return d_u, (grads[0] * made).sum(-1), None, None
