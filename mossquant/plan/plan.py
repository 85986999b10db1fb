# SPDX-License-Identifier: Apache-2.0
"""A recipe resolved for one model: an entry for every tensor, every linear's input and every state array.

A plan is total and made before any work; with what came out (bytes written, error) it is the ledger. It speaks in roles
and knows no target.

    bits per weight = 8 · payload bytes / parameters;   payload = codes, padding, scales, and tensors kept as they are
    relative error = ‖W − Q‖ / ‖W‖ in the Frobenius norm, float64
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, FailFast

from mossquant.errors import InputError
from mossquant.files.json import parse_stored
from mossquant.formats import NumberFormat, get_format
from mossquant.formats.activations import get_activation_format
from mossquant.formats.dtypes import dtype_name
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import activation_sites, parameter_count, state_specs, tensor_specs
from mossquant.model.tensors import SiteSpec, TensorSpec
from mossquant.plan.entries import DecayError, FormatSummary, SiteEntry, StateEntry, TensorEntry
from mossquant.plan.recipe import Recipe, RecoveryActivations, Rule, first_match

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class FrontierPoint:
    """What a model of so many payload bytes is predicted to lose at least, in nats a token."""

    __pydantic_config__ = _STRICT

    bytes: int
    kl: float


@dataclass(frozen=True)
class Calibrated:
    """How text entered.

    Attributes:
        text: name of the text.
        tokens: of it, without those that it was judged on; 0 where only sensitivities were given.
        judged_tokens: the text's last ones, on which every KL here was measured: fp32, windows that begin afresh.
        budget: what the formats were chosen for; None where the recipe names them.
        losses: "measured" or "estimated", what the formats were chosen by; None where the recipe names them.
        predicted_kl: nats a token, of what was chosen, rounded by `nearest-mse`.
        rounded_kl: measured after rounding; None where no text was given.
        recovered_tokens: tokens that recovery was asked to read; 0 without it.
        kl: measured at the end; None where no text was given.
        kl_ci95: its 95 % interval; None for one window.
        frontier: what other budgets are predicted to lose.
        recovered_activations: what entered the linears while recovery trained; None without it.
    """

    __pydantic_config__ = _STRICT

    text: str
    tokens: int
    judged_tokens: int
    budget: str | None
    losses: Literal["measured", "estimated"] | None
    predicted_kl: float | None
    rounded_kl: float | None
    recovered_tokens: int
    kl: float | None
    kl_ci95: tuple[float, float] | None
    frontier: tuple[FrontierPoint, ...]
    recovered_activations: RecoveryActivations | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe resolved; after the run, the ledger.

    Attributes:
        version: of the stored form.
        recipe: name of the recipe.
        targets: targets that it must run on.
        parameters: parameters of the full-precision model, a tied table once.
        tensors: one entry for every tensor, in processing order.
        activations: one entry for every input of a linear layer.
        state: one entry for every state array.
        calibrated: how text entered; None where none did.
    """

    __pydantic_config__ = _STRICT

    version: Literal[1] = field(default=1, kw_only=True)
    recipe: str
    targets: tuple[str, ...]
    parameters: int
    tensors: Annotated[tuple[TensorEntry, ...], FailFast()]
    activations: Annotated[tuple[SiteEntry, ...], FailFast()]
    state: Annotated[tuple[StateEntry, ...], FailFast()]
    calibrated: Calibrated | None = None

    @cached_property
    def by_name(self) -> Mapping[str, TensorEntry]:
        """Tensor name → its entry."""
        return {entry.name: entry for entry in self.tensors}

    def site(self, name: str) -> SiteEntry:
        """The entry of an activation site."""
        return self._sites[name]

    @cached_property
    def _sites(self) -> Mapping[str, SiteEntry]:
        return {entry.name: entry for entry in self.activations}

    def weight_format(self, tensor: str) -> NumberFormat | None:
        """The number format of a tensor; None where it is kept."""
        name = self.by_name[tensor].format
        return None if name is None else get_format(name)

    @property
    def predicted_bytes(self) -> int:
        """Payload bytes of all tensors as planned."""
        return sum(entry.predicted_bytes for entry in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint that they come from."""
        return sum(entry.stored_bytes for entry in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """8 · payload bytes / parameters."""
        return 8 * self.predicted_bytes / self.parameters

    def summary(self) -> list[FormatSummary]:
        """Tensors, weights and bytes by format, largest first."""
        totals: dict[str, list[TensorEntry]] = {}
        for entry in self.tensors:
            totals.setdefault(entry.storage, []).append(entry)
        rows = [
            FormatSummary(name, len(of), sum(e.count for e in of), sum(e.predicted_bytes for e in of))
            for name, of in totals.items()
        ]
        return sorted(rows, key=lambda row: (-row.bytes, row.storage))

    def with_results(
        self,
        results: Mapping[str, tuple[int, float]],
        notes: Mapping[str, str] | None = None,
        decays: Mapping[str, DecayError] | None = None,
    ) -> "Plan":
        """The ledger: the plan with (bytes written, relative error) of every tensor, notes on some, and decays."""
        entries = []
        for entry in self.tensors:
            (written, error), note = results[entry.name], (notes or {}).get(entry.name)
            decay = (decays or {}).get(entry.name)
            entries.append(replace(entry, written_bytes=written, relative_error=error, note=note, decay_error=decay))
        return replace(self, tensors=tuple(entries))

    def to_json(self) -> dict[str, Any]:
        """The content of a plan file or `ledger.json`."""
        stored = asdict(self)
        if self.calibrated is None:
            del stored["calibrated"]
        elif self.calibrated.recovered_activations is None:
            del stored["calibrated"]["recovered_activations"]
        for entry in stored["tensors"]:
            for key in ("note", "decay_error"):
                if entry[key] is None:
                    del entry[key]
        return stored

    @classmethod
    def from_json(cls, values: Any, *, where: str = "ledger.json") -> "Plan":
        """Read what `to_json` gave.

        Raises:
            InputError: another version, unknown or missing keys, or values of the wrong type.
        """
        return parse_stored(values, cls, where=where, noun="a plan", advice="Make it again with `mossquant quantize`.")


Ledger = Plan
"""A plan with what came out."""


def make_plan(config: MossNetConfig, dtypes: Mapping[str, torch.dtype], recipe: Recipe) -> Plan:
    """Resolve a recipe for a model.

    Args:
        config: the model's shape.
        dtypes: tensor name → type in which the checkpoint stores it.
        recipe: the rules.

    Raises:
        InputError: tensors, inputs or states that no rule matches; rules that match nothing and are not optional;
            inputs whose readers disagree about the block: all offenders at once; formats that are still open.
    """
    if recipe.chooses:
        raise InputError(f"{recipe.where} leaves formats open; spend a budget on it first")
    offenders: list[str] = []
    tensors, sites, states = tensor_specs(config), activation_sites(config), state_specs(config)
    chosen = _choose(recipe, "weights", recipe.weights, [(spec.role, spec.name) for spec in tensors], offenders)
    for_sites = _choose(recipe, "activations", recipe.activations, [(s.role, s.name) for s in sites], offenders)
    for_states = _choose(recipe, "state", recipe.state, [(s.role, s.name) for s in states], offenders)
    advice = (
        "Every tensor, input and state needs a rule, and every rule something that it matches (or `optional: true`)."
    )
    if offenders:
        raise InputError.listing(f"{recipe.where} does not fit this model", offenders, advice)
    entries = tuple(
        _tensor_entry(spec, dtypes[spec.name], recipe, index) for spec, index in zip(tensors, chosen, strict=True)
    )
    formats = {entry.name: entry.format for entry in entries}
    site_entries = []
    for site, index in zip(sites, for_sites, strict=True):
        blocks, rule = activation_blocks(site, formats), recipe.activations[index]
        if get_activation_format(rule.format).blocked and len(blocks) > 1:
            sizes = " and ".join(map(str, sorted(blocks)))
            offenders.append(f"the weights that read {site.name} have blocks of {sizes}")
        reason = f"{rule.pattern} in recipe {recipe.name}"
        site_entries.append(SiteEntry.of(site, rule.format, blocks=blocks, reason=reason))
    if offenders:
        raise InputError.listing(
            f"{recipe.where} does not fit this model", offenders, "Give them formats with one group size."
        )
    return Plan(
        recipe=recipe.name,
        targets=tuple(recipe.targets),
        parameters=parameter_count(config),
        tensors=entries,
        activations=tuple(site_entries),
        state=tuple(
            StateEntry(spec.name, spec.role, spec.shape, recipe.state[index].format)
            for spec, index in zip(states, for_states, strict=True)
        ),
    )


def activation_blocks(site: SiteSpec, formats: Mapping[str, str | None]) -> set[int]:
    """Values of a site that share a scale, by the formats (tensor name → number format) of the weights that read it."""
    return {get_format(name).activation_block for name in map(formats.get, site.tensors) if name is not None}


def _choose(
    recipe: Recipe, section: str, rules: Sequence[Rule], things: Sequence[tuple[str, str]], offenders: list[str]
) -> list[int]:
    """Index of each thing's rule; a rule that comes first for nothing, and a thing without a rule, are offenders."""
    chosen = [first_match(rules, role=role, name=name) for role, name in things]
    for (role, name), index in zip(things, chosen, strict=True):
        if index is None:
            offenders.append(f"no rule under {section} matches {name} (role {role})")
    for index, rule in enumerate(rules):
        if index not in chosen and not rule.optional:
            later = any(rule.applies(role=role, name=name) for role, name in things)
            why = "matches only what earlier rules took" if later else "matches nothing"
            offenders.append(f"{recipe.place(section, index)}: the rule with {rule.pattern} {why}")
    return [index if index is not None else -1 for index in chosen]


def _tensor_entry(spec: TensorSpec, dtype: torch.dtype, recipe: Recipe, index: int) -> TensorEntry:
    rule, stored, stored_bytes = recipe.weights[index], dtype_name(dtype), spec.count * dtype.itemsize
    reason = rule.why or f"{rule.pattern} in recipe {recipe.name}"
    if rule.format is None:
        kept = "float32" if rule.keep == "fp32" else stored
        return TensorEntry.of(spec, kept, stored_bytes=stored_bytes, reason=reason)
    solver = rule.solver or recipe.solver
    entry = TensorEntry.of(spec, rule.format, stored_bytes=stored_bytes, reason=reason, solver=solver)
    if entry.predicted_bytes < stored_bytes:
        return entry
    reason = f"{rule.format} would take {entry.predicted_bytes} bytes, {stored} as stored takes {stored_bytes}"
    return TensorEntry.of(spec, stored, stored_bytes=stored_bytes, reason=reason)
