# SPDX-License-Identifier: Apache-2.0
"""The calls that a model consists of: which function of libmoss, with which tensors of the checkpoint, in which form.

The PyTorch Runner makes them. ExecuTorch's lowering makes a graph of them and reading back compares a file with them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of
from mossquant.model.config import MossNetConfig
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp
from mossquant.model.mossnet import tensor_specs
from mossquant.model.tensors import TensorSpec, Use, outside_blocks

LAYOUTS = ("rows", "x86", "arm")
"""`MOSS_ROWS` … of `moss_blocks.h`."""
FORMATS = ("float32", "int8", "int8_g32", "int4_g32", "int4_g128")
"""`MOSS_FLOAT32` …"""
Setting = int | float | bool
Packed = tuple[int, list[int]]


@dataclass(frozen=True)
class Matrix:
    """The matrix of a linear, or a table: packed bytes, or values where it is kept."""

    spec: TensorSpec

    @property
    def name(self) -> str:
        """Of the tensor in the checkpoint."""
        return self.spec.name


@dataclass(frozen=True)
class Small:
    """fp32 values in the form in which kernels read them: of one tensor, or of one after the other."""

    specs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """Of the first tensor in the checkpoint."""
        return self.specs[0].name


Constant = Matrix | Small | tuple[Matrix, ...] | None
"""What an operator takes: None where a block has no router."""


@dataclass(frozen=True)
class Call:
    """A call of an operator, whose arguments are what is computed, constants, settings, and how matrices are packed.

    Attributes:
        operator: its name.
        states: arrays that it carries from token to token, behind its first argument and its first output.
        constants: those of the checkpoint.
        settings: numbers.
        matrices: all of them, in the order in which their formats are said.
    """

    operator: str
    states: int
    constants: tuple[Constant, ...]
    settings: tuple[Setting, ...]
    matrices: tuple[Matrix, ...]

    @property
    def held(self) -> Iterator[Matrix | Small]:
        """All of its constants, one after the other."""
        for constant in self.constants:
            if isinstance(constant, tuple):
                yield from constant
            elif constant is not None:
                yield constant

    def packed(self, formats: Mapping[str, str], layout: str) -> Packed:
        """The arguments behind the settings: a layout, and formats; `formats` is name of a matrix → what it is in."""
        return LAYOUTS.index(layout), [FORMATS.index(formats[matrix.name]) for matrix in self.matrices]


def has_calls(kind: type[Block]) -> bool:
    """Whether libmoss computes blocks of a kind."""
    return kind in _BLOCKS


def calls(config: MossNetConfig, *, last: bool) -> Iterator[Call]:
    """The calls of a method, in their order; `last`: logits of the last position alone."""
    outer, eps = outside_blocks(tensor_specs(config)), config.rms_norm_eps
    table, head = Matrix(outer[Use.TABLE]), Matrix(outer[Use.LINEAR])
    yield Call("embedding", 0, (table,), (config.vocab_size, config.hidden_size), (table,))
    for layer, kind in blocks_of(config):
        yield _BLOCKS[kind](config, layer, kind.specs(config, layer))
    yield Call("head", 0, (head, Small((outer[Use.NORM],))), (eps, config.vocab_size, last), (head,))


def _ssm(config: MossNetConfig, layer: int, specs: Sequence[TensorSpec]) -> Call:
    own = _by_role(specs, "ssm.")
    in_proj, out_proj = Matrix(own["in_proj"][0]), Matrix(own["out_proj"][0])
    x_proj, dt_proj = (tuple(map(Matrix, own[f"expert.{name}"])) for name in ("x_proj", "dt_proj"))
    small = (Small(tuple(own[role])) for role in ("conv", "conv_bias", "expert.dt_bias", "A_log", "D"))
    constants = in_proj, x_proj, dt_proj, out_proj, Small(tuple(own["norm"])), _router(own), *small
    settings = config.rms_norm_eps, config.time_step_rank, config.ssm_chosen(layer)
    return Call("ssm_moe", 2, constants, settings, (in_proj, out_proj, *x_proj, *dt_proj))


def _mlp(config: MossNetConfig, layer: int, specs: Sequence[TensorSpec]) -> Call:
    own = _by_role(specs, "mlp.")
    w1, w3, w2 = (tuple(map(Matrix, own[f"expert.{name}"])) for name in ("w1", "w3", "w2"))
    constants = w1, w3, w2, Small(tuple(own["norm"])), _router(own)
    settings = config.rms_norm_eps, config.mlp_intermediate_size, config.mlp_chosen(layer)
    return Call("mlp_moe", 0, constants, settings, (*w1, *w3, *w2))


_BLOCKS: dict[type[Block], Callable[[MossNetConfig, int, Sequence[TensorSpec]], Call]] = {Mixer: _ssm, Mlp: _mlp}


def _by_role(specs: Sequence[TensorSpec], prefix: str) -> dict[str, list[TensorSpec]]:
    own: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        own.setdefault(spec.role.removeprefix(prefix), []).append(spec)
    return own


def _router(own: Mapping[str, Sequence[TensorSpec]]) -> Small | None:
    return Small(tuple(own["router"])) if "router" in own else None
