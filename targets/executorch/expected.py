# SPDX-License-Identifier: Apache-2.0
"""What every method of a .pte must hold, as it follows from the checkpoint alone, in the order of the program."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.checkpoint.weights import Weights, value
from mossquant.formats.nibbles import pack_nibbles
from mossquant.model.block import Block
from mossquant.model.blocks import KINDS, blocks_of
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp
from mossquant.model.tensors import TensorSpec, Use, outside_blocks
from mossquant.targets.executorch.delegate import Linear
from mossquant.targets.executorch.matrices import runs_of

_EXP_TOLERANCE = 1e-6
"""Relative: −exp(A_log) was computed where the program was made, to within a rounding or two of any other exp."""


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

    def holds(self, array: "Held") -> bool:
        """Whether an array is the same, bit for bit or up to the tolerance."""
        if self.kind != array.kind:
            return False
        if self.tolerance:
            return bool(np.allclose(array.codes, self.codes, self.tolerance, 0))
        return self.codes.tobytes() == array.codes.tobytes() and self.scales.tobytes() == array.scales.tobytes()


Held = Expected | Linear
"""An array with its scales, wherever it lies; `kind` is what may be exchanged for one another."""


def expected_linears(weights: Weights, specs: Sequence[TensorSpec]) -> list[Expected]:
    """Every linear, as the design lays it out: experts one below the other, or side by side where they are summed."""
    expected: list[Expected] = []
    for layer, kind in blocks_of(weights.config):
        expected += _BLOCKS[kind][0](weights, kind.specs(weights.config, layer))
    return [*expected, _matrix(weights, [outside_blocks(specs)[Use.LINEAR].name], 0)]


def expected_constants(weights: Weights, specs: Sequence[TensorSpec]) -> list[Expected]:
    """Small tensors, as the values that their codes mean, and the table of the embedding.

    Those of the blocks come first, then the norms, kind by kind.
    """
    blocks = sorted(blocks_of(weights.config), key=lambda block: KINDS.index(block[1]))
    own = [(kind, kind.specs(weights.config, layer)) for layer, kind in blocks]
    small = [constant for kind, (_, *inner) in own for constant in _BLOCKS[kind][1](weights, inner)]
    outer = outside_blocks(specs)
    norms = [norm for _, (norm, *_) in own] + [outer[Use.NORM]]
    return [*small, *(_plain(weights, norm) for norm in norms), *_table(weights, outer[Use.TABLE].name)]


def _linears(weights: Weights, specs: Sequence[TensorSpec], *, before_sums: Sequence[Expected] = ()) -> list[Expected]:
    """The linears of a block, in the order of its roles; experts of one role together."""
    expected: list[Expected] = []
    for role in dict.fromkeys(spec.role for spec in specs if spec.is_matrix):
        own = [spec for spec in specs if spec.role == role]
        summed = Use.SUMMED in own[0].use
        expected += before_sums if summed else []
        for run in runs_of(weights, [spec.name for spec in own], apart=summed):
            expected.append(_matrix(weights, run, 1 if summed else 0))
    return expected


def _mixer_linears(weights: Weights, specs: Sequence[TensorSpec]) -> list[Expected]:
    """The biases of several experts are a linear of the gates, before dt_proj."""
    names = [spec.name for spec in specs if spec.role == "ssm.expert.dt_bias"]
    biases = [Expected(_title(names), np.stack([_value(weights, name) for name in names], 1))] if len(names) > 1 else []
    return _linears(weights, specs, before_sums=biases)


def _mixer_constants(weights: Weights, specs: Sequence[TensorSpec]) -> Iterator[Expected]:
    own = {spec.role: spec for spec in specs}
    conv, decay = own["ssm.conv"], own["ssm.A_log"]
    taps = _value(weights, conv.name).reshape(conv.shape[0], -1)
    for tap in range(taps.shape[1]):
        yield Expected(f"{conv.name}, tap {tap}", np.ascontiguousarray(taps[:, tap]))
    yield _plain(weights, own["ssm.conv_bias"])
    values = decay.stored.values(value(weights, decay.name).double()).float()
    yield Expected(decay.name, values.numpy(), tolerance=_EXP_TOLERANCE)
    yield _plain(weights, own["ssm.D"])
    if "ssm.router" not in own:
        yield _plain(weights, own["ssm.expert.dt_bias"])


_Laid = Callable[[Weights, Sequence[TensorSpec]], Iterable[Expected]]
_BLOCKS: dict[type[Block], tuple[_Laid, _Laid]] = {
    Mixer: (_mixer_linears, _mixer_constants),
    Mlp: (_linears, lambda weights, specs: ()),
}
"""Linears and constants of each kind of block, without the norm, in the order of the program."""


def _matrix(weights: Weights, names: Sequence[str], axis: int) -> Expected:
    number_format = weights.format(names[0])
    if number_format is None:
        parts = [weights.specs[name].to_matrix(weights.kept(name)).float() for name in names]
        return Expected(_title(names), torch.cat(parts, axis).numpy())
    tensors = [weights.quantized(name) for name in names]
    columns = tensors[0].columns if number_format.group_size is None else None
    codes = torch.cat([tensor.codes[:, :columns] for tensor in tensors], axis).numpy()
    scales = torch.cat([tensor.scales.float() for tensor in tensors], axis).numpy()
    bits, group = number_format.bits, number_format.group_size or 0
    return Expected(_title(names), codes, scales, bits, group, rounds_input=True)


def _table(weights: Weights, name: str) -> Iterator[Expected]:
    number_format = weights.format(name)
    if number_format is None:
        yield Expected(name, weights.kept(name).float().numpy())
        return
    table = weights.quantized(name)
    codes = table.codes.numpy() if number_format.group_size is not None else table.codes[:, : table.columns].numpy()
    yield Expected(name, pack_nibbles(codes, first="high") if number_format.bits == 4 else codes)
    yield Expected(f"{name}, scales", table.scales.float().numpy())


def _plain(weights: Weights, spec: TensorSpec) -> Expected:
    return Expected(spec.name, _value(weights, spec.name))


def _value(weights: Weights, name: str) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value(weights, name).contiguous().numpy()
    return array


def _title(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
