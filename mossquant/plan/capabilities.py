# SPDX-License-Identifier: Apache-2.0
"""What each target can hold and run: one table, checked against a plan before any work.

A row says, for the roles that its patterns fit, which formats a target holds; the first row of a target that fits a
role decides. "kept" are the types in which a tensor may stay as it is. A target may hold small tensors `decoded`: as
the fp32 values that their codes mean, exactly. Lowering never changes a value: what a target cannot hold is an error.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from mossquant.errors import InputError
from mossquant.formats import FORMATS
from mossquant.formats.activations import ACTIVATION_FORMATS, STATE_FORMATS
from mossquant.plan.plan import KEPT_DTYPES, Plan

__all__ = [
    "CAPABILITIES",
    "TARGETS",
    "Activations",
    "Capabilities",
    "Held",
    "Limits",
    "Row",
    "check",
    "get_capabilities",
]

Activations = Literal["int8", "fp32"]
"""What may be asked of the inputs of quantized linears in place of the plan: rounded at run time, or not at all."""


@dataclass(frozen=True)
class Row:
    """What a target holds for some roles of tensors.

    Attributes:
        roles: patterns on roles.
        formats: number formats that it holds.
        decoded: whether it holds fp32 values in place of the codes.
    """

    roles: tuple[str, ...]
    formats: tuple[str, ...]
    decoded: bool = False

    def fits(self, role: str) -> bool:
        """Whether a role falls under this row."""
        return any(fnmatchcase(role, pattern) for pattern in self.roles)


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
        rows: what it holds, by role; the first that fits decides.
        kept: types in which a tensor may be kept.
        activations: activation formats of the inputs of linear layers whose weights are quantized.
        dynamic_int8: the one of them that stands in for a planned int8 format that the target does not have, and that
            "int8" asks for; such formats round at run time, so nothing is lost by the change.
        state: state formats.
        limits: batch and chunk lengths.
        suffix: of its program files; None where it has none.
    """

    name: str
    rows: tuple[Row, ...]
    kept: tuple[str, ...]
    activations: tuple[str, ...]
    dynamic_int8: str
    state: tuple[str, ...]
    limits: Limits
    suffix: str | None

    def row(self, role: str) -> Row | None:
        """The row that decides about a role."""
        return next((row for row in self.rows if row.fits(role)), None)

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
_SMALL = ("ssm.conv", "ssm.conv_bias", "ssm.A_log", "ssm.D", "ssm.expert.dt_bias")
_MATRICES = (
    "embedding",
    "head",
    "ssm.in_proj",
    "ssm.expert.x_proj",
    "ssm.expert.dt_proj",
    "ssm.out_proj",
    "mlp.expert.*",
)

CAPABILITIES: dict[str, Capabilities] = {
    known.name: known
    for known in (
        Capabilities(
            "torch",
            (Row(("*",), _EVERY),),
            tuple(KEPT_DTYPES),
            tuple(ACTIVATION_FORMATS),
            "int8_block",
            STATE_FORMATS,
            Limits(),
            None,
        ),
        Capabilities(
            "onnx",
            # Routers and norms have no row: they are computed in fp32 and must be kept.
            (Row(_MATRICES, _EVERY), Row(_SMALL, _EVERY, decoded=True)),
            tuple(KEPT_DTYPES),
            ("fp32", "int8_block"),
            "int8_block",
            ("fp32",),
            Limits(),
            ".onnx",
        ),
        Capabilities(
            "executorch",
            # XNNPACK: whole rows in 8 bits or groups in 4, with int8 inputs, one range a row; or both in fp32.
            (Row(_MATRICES, ("int8", "int4_g32", "int4_g128")), Row(_SMALL, _EVERY, decoded=True)),
            tuple(KEPT_DTYPES),
            ("int8_row_asym",),
            "int8_row_asym",
            ("fp32",),
            Limits(max_batch=1, max_chunk=128),
            ".pte",
        ),
    )
}
"""Every target, by name."""

TARGETS = tuple(CAPABILITIES)


def get_capabilities(name: str) -> Capabilities:
    """What the target of that name can hold.

    Raises:
        InputError: no such target; the known names are listed.
    """
    if name not in CAPABILITIES:
        raise InputError(f"unknown target {name[:40]!r}; known targets: {', '.join(TARGETS)}")
    return CAPABILITIES[name]


@dataclass(frozen=True)
class Held:
    """What a target is asked to hold.

    Attributes:
        what: of whom this is, for the error.
        tensors: (name, role, number format or None, type in which it is kept or None) of every tensor.
        sites: (name, activation format) of every input of a linear with quantized weights.
        states: (name, state format) of every state array.
    """

    what: str
    tensors: Sequence[tuple[str, str, str | None, str | None]]
    sites: Sequence[tuple[str, str]]
    states: Sequence[tuple[str, str]]

    @classmethod
    def by(cls, plan: Plan) -> "Held":
        """What a plan asks for."""
        return cls(
            f"recipe {plan.recipe}",
            [(entry.name, entry.role, entry.format, entry.kept) for entry in plan.tensors],
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
        InputError: an unknown target, or tensors, inputs and states that a target cannot hold: all offenders at once.
    """
    names = list(dict.fromkeys(targets))
    unknown = [f"unknown target {name[:40]!r}" for name in names if name not in CAPABILITIES]
    if unknown:
        raise InputError.listing(held.what, unknown, f"Known targets: {', '.join(TARGETS)}.")
    offenders = [offender for name in names for offender in _offenders(held, CAPABILITIES[name])]
    if offenders:
        advice = "Change the recipe's rules, or take the target out of its list."
        raise InputError.listing(f"{held.what} does not fit its targets", offenders, advice)


def _offenders(held: Held, target: Capabilities) -> Iterator[str]:
    for name, role, number_format, kept in held.tensors:
        row = target.row(role)
        if kept is not None:
            if kept not in target.kept:
                yield f"{target.name} cannot keep {name} in {kept}"
        elif row is None:
            yield f"{target.name} holds no codes for {name} (role {role}): keep it"
        elif number_format not in row.formats:
            yield f"{target.name} cannot hold {name} in {number_format} (it holds {', '.join(row.formats)})"
    for name, activation in held.sites:
        if target.taken(activation) is None:
            yield f"{target.name} cannot take {activation} at {name} (it takes {', '.join(target.activations)})"
    for name, state in held.states:
        if state not in target.state:
            yield f"{target.name} cannot carry {name} in {state}"
