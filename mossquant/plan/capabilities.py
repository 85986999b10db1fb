# SPDX-License-Identifier: Apache-2.0
"""What each target can hold and run: one table, checked against a plan before any work.

A target lists the kinds of blocks that it can lower, and number formats by what a tensor is used for. "kept" are the
types in which a tensor may stay as it is. Small tensors may be held as the fp32 values that their codes mean, exactly,
and matrices never. Lowering never changes a value: what a target cannot hold is an error.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mossquant.errors import InputError
from mossquant.formats import FORMATS
from mossquant.formats.activations import ACTIVATION_FORMATS
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.formats.states import STATE_FORMATS
from mossquant.model.blocks import KINDS, blocks_of
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import tensor_specs
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan.plan import Plan

Activations = Literal["int8", "fp32"]
"""What may be asked of the inputs of quantized linears in place of the plan: rounded at run time, or not at all."""


@dataclass(frozen=True)
class Limits:
    """Largest batch, and most tokens of one call (a Runner cuts longer ones); None is unlimited."""

    max_batch: int | None = None
    max_chunk: int | None = None


@dataclass(frozen=True)
class Capabilities:
    """What one target can hold and run; the rest is its `TARGET` (`mossquant.targets.target`).

    Attributes:
        name: the name used in recipes and by `export`.
        blocks: kinds of blocks that it can lower.
        formats: number formats that it holds, by what a tensor is used for; a tensor with two uses needs both.
        kept: types in which a tensor may be kept.
        activations: activation formats of the inputs of linear layers whose weights are quantized.
        dynamic_int8: the one of them that stands in for a planned int8 format that the target does not have, and that
            "int8" asks for; such formats round at run time, so nothing is lost by the change.
        state: state formats.
        limits: batch and chunk lengths.
        suffix: of its program files; None where it has none.
    """

    name: str
    blocks: tuple[str, ...]
    formats: Mapping[Use, tuple[str, ...]]
    kept: tuple[str, ...]
    activations: tuple[str, ...]
    dynamic_int8: str
    state: tuple[str, ...]
    limits: Limits
    suffix: str | None

    def holds(self, spec: TensorSpec) -> list[str]:
        """The number formats in which it holds a tensor."""
        return [name for name in FORMATS if all(name in self.formats.get(use, ()) for use in spec.use)]

    def taken(self, planned: str) -> str | None:
        """The activation format used for a planned one: itself, or the target's own int8; None where there is none."""
        if planned in self.activations:
            return planned
        return None if planned == "fp32" else self.dynamic_int8

    def rounded_to(self, asked: Activations) -> str:
        """The activation format for what a user asks in place of the plan.

        Raises:
            InputError: the target does not have it.
        """
        wanted = self.dynamic_int8 if asked == "int8" else asked
        if wanted not in self.activations:
            raise InputError(
                f"{self.name} has no linears with quantized weights and {asked} activations; "
                "leave --activations out, or export to another target"
            )
        return wanted


_EVERY = tuple(FORMATS)
_MATRICES = (Use.LINEAR, Use.SUMMED, Use.TABLE)
_RECURRENT = ("ssm", "mlp")

CAPABILITIES: dict[str, Capabilities] = {
    known.name: known
    for known in (
        Capabilities(
            "torch",
            tuple(kind.kind for kind in KINDS),
            dict.fromkeys(Use, _EVERY),
            tuple(FLOAT_DTYPES),
            tuple(ACTIVATION_FORMATS),
            "int8_block",
            tuple(STATE_FORMATS),
            Limits(),
            None,
        ),
        Capabilities(
            "onnx",
            _RECURRENT,
            # Routers and norms are computed in fp32 and must be kept.
            dict.fromkeys((*_MATRICES, Use.SMALL), _EVERY),
            tuple(FLOAT_DTYPES),
            ("fp32", "int8_block"),
            "int8_block",
            ("fp32",),
            Limits(),
            ".onnx",
        ),
        Capabilities(
            "executorch",
            _RECURRENT,
            # XNNPACK: whole rows in 8 bits or groups in 4, with int8 inputs, one range a row; or both in fp32.
            dict.fromkeys(_MATRICES, ("int8", "int4_g32", "int4_g128")) | {Use.SMALL: _EVERY},
            tuple(FLOAT_DTYPES),
            ("int8_row_asym",),
            "int8_row_asym",
            ("fp32",),
            Limits(max_batch=1, max_chunk=128),
            ".pte",
        ),
        Capabilities(
            "native",
            _RECURRENT,
            dict.fromkeys((*_MATRICES, Use.SMALL), _EVERY),
            tuple(FLOAT_DTYPES),
            ("int8_block",),
            "int8_block",
            ("fp32",),
            Limits(),
            ".moss",
        ),
    )
}
"""Every target, by name."""

_OF_KERNELS = ("blocks", "formats", "kept", "activations", "dynamic_int8")
OWN_KERNELS: dict[str, Capabilities] = {
    "executorch": replace(
        CAPABILITIES["executorch"], **{field: getattr(CAPABILITIES["native"], field) for field in _OF_KERNELS}
    )
}
"""Targets that can also be lowered to with our own kernels in place of the runtime's (`export --kernels mossquant`)."""

TARGETS = tuple(CAPABILITIES)


def get_capabilities(name: str) -> Capabilities:
    """What the target of that name can hold.

    Raises:
        InputError: no such target; the known names are listed.
    """
    if name not in CAPABILITIES:
        raise InputError.unknown("target", name, TARGETS)
    return CAPABILITIES[name]


@dataclass(frozen=True)
class Held:
    """What a target is asked to hold.

    Attributes:
        what: of whom this is, for the error.
        config: the model's shape.
        tensors: (what it is, number format or None, type in which it is kept or None) of every tensor.
        sites: (name, activation format) of every input of a linear with quantized weights.
        states: (name, state format) of every state array.
    """

    what: str
    config: MossNetConfig
    tensors: Sequence[tuple[TensorSpec, str | None, str | None]]
    sites: Sequence[tuple[str, str]]
    states: Sequence[tuple[str, str]]

    @classmethod
    def by(cls, plan: Plan, config: MossNetConfig) -> "Held":
        """What the plan of a model asks for."""
        return cls(
            f"recipe {plan.recipe}",
            config,
            [(spec, entry.format, entry.kept) for spec, entry in zip(tensor_specs(config), plan.tensors, strict=True)],
            [
                (site.name, site.format)
                for site in plan.activations
                if any(plan.by_name[name].kept is None for name in site.tensors)
            ],
            [(state.name, state.format) for state in plan.state],
        )


def check(held: Held, targets: Iterable[str]) -> None:
    """Check what is to be held against the targets that it must run on.

    Raises:
        InputError: an unknown target, or blocks, tensors, inputs and states that a target cannot hold: all offenders at
            once.
    """
    names = list(dict.fromkeys(targets))
    unknown = [f"unknown target {name[:40]!r}" for name in names if name not in CAPABILITIES]
    if unknown:
        raise InputError.listing(held.what, unknown, f"Known targets: {', '.join(TARGETS)}.")
    check_all(held, [CAPABILITIES[name] for name in names])


def check_all(held: Held, targets: Sequence[Capabilities]) -> None:
    """`check` against what targets can hold. Raises `InputError`."""
    for target in targets:
        _check_blocks(held.config, target)
    offenders = [offender for target in targets for offender in _offenders(held, target)]
    if offenders:
        advice = "Change the recipe's rules, or take the target out of its list."
        raise InputError.listing(f"{held.what} does not fit its targets", offenders, advice)


def _check_blocks(config: MossNetConfig, target: Capabilities) -> None:
    unknown = sorted({kind.kind for _, kind in blocks_of(config)} - set(target.blocks))
    if unknown:
        known = ", ".join(target.blocks)
        raise InputError(f"{target.name} cannot lower {' and '.join(unknown)} blocks (it lowers {known})")


def _offenders(held: Held, target: Capabilities) -> Iterator[str]:
    for spec, number_format, kept in held.tensors:
        formats = target.holds(spec)
        if kept is not None:
            if kept not in target.kept:
                yield f"{target.name} cannot keep {spec.name} in {kept}"
        elif not formats:
            yield f"{target.name} holds no codes for {spec.name} (role {spec.role}): keep it"
        elif number_format not in formats:
            yield f"{target.name} cannot hold {spec.name} in {number_format} (it holds {', '.join(formats)})"
    for name, activation in held.sites:
        if target.taken(activation) is None:
            yield f"{target.name} cannot take {activation} at {name} (it takes {', '.join(target.activations)})"
    for name, state in held.states:
        if state not in target.state:
            yield f"{target.name} cannot carry {name} in {state}"
