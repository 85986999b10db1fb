# SPDX-License-Identifier: Apache-2.0
"""What is asked for: ordered rules from roles and names to formats. A recipe knows no shapes, packing or target.

    version: 1
    name: mine                      # letters, digits, - and _
    targets: [torch, onnx]          # where it must run; checked before any work
    solver: nearest-mse             # default of the weight rules: nearest, nearest-mse, gptq, tune
    budget: 4.75bpw                 # of the rules with choose; or 40MB, or kl=0.01
    weights:                        # every tensor must match a rule; the first match wins
      - {role: "*.router", keep: fp32, why: "chooses the experts", optional: true}
      - {match: "backbone.layers.0.*.in_proj.weight", format: int8, solver: nearest}
      - {role: embedding, choose: [int4_g32, int8, stored], sensitivity: 1.5}
      - {role: "*", format: int4_g32}
    activations:                    # every input of a linear layer
      - {role: "*", format: int8_block}
    state:                          # every recurrent state array
      - {role: "*", format: fp32}

`role` and `match` are shell-style patterns (`*`, `?`, `[…]`) on roles and on names. `keep: fp32` stores the values as
fp32, `keep: stored` in the checkpoint's own type; `why` says what for. A rule that matches nothing is an error, unless
it says `optional: true`, which is meant for parts that not every model has (routers, MLP experts, an untied head).

`choose` leaves the format to the budget, for each group of tensors (`mossquant.plan.groups`) on its own; `stored` is
the checkpoint's own type. `sensitivity` says what is known to be lost where nothing is measured on text: KL in nats a
token ≈ sensitivity · ‖W − Q‖² / ‖W‖², everything that the rule applies to together. A recipe with `measure: true` asks
for text and measures instead; `recover: N` asks for distillation over N tokens, with inputs of the linears in fp32 or,
by `recover_activations: planned`, rounded as planned.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mossquant.errors import InputError
from mossquant.files.yaml import Lines, parse_yaml, read_yaml_text
from mossquant.formats import get_format
from mossquant.formats.activations import get_activation_format
from mossquant.formats.states import get_state_format
from mossquant.plan.groups import Group

RECIPES = ("int4", "int8", "int4-best", "int8-best", "int4-uniform", "int8-uniform")
"""Recipes that ship with the package, by name."""

STORED = "stored"
"""In place of a number format: a tensor stays in the checkpoint's own type."""

TargetName = Annotated[str, StringConstraints(min_length=1, max_length=40)]
SolverName = Annotated[str, StringConstraints(min_length=1, max_length=40)]
"""Which solvers there are, only calibration knows."""
RecoveryActivations = Literal["fp32", "planned"]
"""What enters the linears while recovery trains: fp32 values, or as the plan rounds them."""
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Why = Annotated[str, StringConstraints(min_length=1, max_length=500)]


def _recipe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise InputError(f"a name is 1 to 64 letters, digits, - and _, not {name[:70]!r}")
    return name


_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Budget:
    """What a quantized model may cost: bits a weight, bytes or the time of a token at most, or as few bytes as keep KL
    within a bound.

    Attributes:
        kind: "bpw", "bytes", "ms" or "kl".
        value: bits a weight, bytes, milliseconds, or nats a token.
    """

    kind: Literal["bpw", "bytes", "ms", "kl"]
    value: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "4.75bpw", "40MB" (of 10⁶ bytes; also kB and GB), "8ms" or "kl=0.01".

        Raises:
            InputError: anything else.
        """
        found = re.fullmatch(r"(kl=)?(\d+(?:\.\d+)?(?:e-?\d+)?)(bpw|ms|kB|MB|GB)?", text.strip())
        number, unit = (float(found[2]), found[1] or found[3]) if found else (0.0, None)
        if found is None or unit is None or (found[1] and found[3]) or not number < 1e12:
            raise InputError(f"{text[:40]!r} is not a budget; give one like 4.75bpw, 40MB, 8ms or kl=0.01")
        if number == 0:
            none = "no loss, which nothing but full precision keeps" if unit == "kl=" else "nothing"
            raise InputError(f"a budget of {text[:40]} allows {none}; give more than 0, like 4.75bpw, 40MB or kl=0.01")
        if unit == "bpw":
            return cls("bpw", number)
        if unit == "ms":
            return cls("ms", number)
        return cls("kl", number) if unit == "kl=" else cls("bytes", number * _UNITS[unit])

    def bytes_at_most(self, parameters: int) -> float:
        """The bound in bytes of a model with so many parameters; infinite where that is of time or KL."""
        return {"bpw": self.value * parameters / 8, "bytes": self.value}.get(self.kind, math.inf)

    def __str__(self) -> str:
        """As a user would write it."""
        number = f"{self.value:.12g}"
        if self.kind == "bytes":
            return f"{self.value / 1e6:.12g}MB"
        return f"kl={number}" if self.kind == "kl" else f"{number}{self.kind}"


def _budget_text(text: str) -> str:
    Budget.parse(text)
    return text


class Rule(BaseModel):
    """What a rule applies to: exactly one of `role` and `match`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Pattern | None = None
    match: Pattern | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _one_pattern(self) -> "Rule":
        if (self.role is None) == (self.match is None):
            raise InputError("a rule needs either role or match")
        return self

    @property
    def pattern(self) -> str:
        """The pattern as it is shown in messages and reasons."""
        return f"role {self.role!r}" if self.role is not None else f"match {self.match!r}"

    def applies(self, *, role: str, name: str) -> bool:
        """Whether the pattern fits something of this role and name."""
        if self.role is not None:
            return fnmatchcase(role, self.role)
        return self.match is not None and fnmatchcase(name, self.match)


def _storage(name: str) -> str:
    return name if name == STORED else get_format(name).name


class WeightRule(Rule):
    """Tensors that get a number format, or are kept for a reason, or whose format the budget chooses."""

    format: Annotated[str, AfterValidator(lambda name: get_format(name).name)] | None = None
    keep: Literal["fp32", "stored"] | None = None
    choose: Annotated[list[Annotated[str, AfterValidator(_storage)]], Field(min_length=1, max_length=8)] | None = None
    sensitivity: Annotated[float, Field(ge=0, le=1e9, strict=False)] | None = None
    why: Why | None = None
    solver: SolverName | None = None

    @model_validator(mode="after")
    def _format_or_keep(self) -> "WeightRule":
        if (self.format, self.keep, self.choose).count(None) != 2:
            raise InputError("a weight rule needs either format, keep or choose")
        if self.sensitivity is not None and self.choose is None:
            raise InputError("a sensitivity is for a rule with choose")
        if self.keep is not None and self.why is None:
            raise InputError("keep needs a reason: add why")
        if self.keep is not None and self.solver is not None:
            raise InputError("what is kept needs no solver")
        return self


class ActivationRule(Rule):
    """Inputs of linear layers that get an activation format."""

    format: Annotated[str, AfterValidator(lambda name: get_activation_format(name).name)]


class StateRule(Rule):
    """Recurrent state arrays that get a state format."""

    format: Annotated[str, AfterValidator(lambda name: get_state_format(name).name)]


class Recipe(BaseModel):
    """A recipe, read and checked.

    Attributes:
        version: of the file's form.
        name: its name.
        targets: names of the targets that it must run on.
        solver: solver of the weight rules that name none.
        budget: what the formats of rules with `choose` are chosen for.
        measure: what each format costs is measured on text, and not taken from the rules.
        recover: tokens of text to distil over after rounding.
        recover_activations: what enters the linears then: fp32 values, or as the activation rules round them.
        weights: rules for tensors, in order.
        activations: rules for the inputs of linear layers, in order.
        state: rules for state arrays, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    name: Annotated[str, AfterValidator(_recipe_name)]
    targets: list[TargetName]
    solver: SolverName = "nearest-mse"
    budget: Annotated[str, AfterValidator(_budget_text)] | None = None
    measure: bool = False
    recover: Annotated[int, Field(ge=0, le=10**12)] = 0
    recover_activations: RecoveryActivations = "fp32"
    weights: list[WeightRule]
    activations: list[ActivationRule]
    state: list[StateRule]
    _text: str
    _where: str
    _lines: Lines

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._text

    @property
    def where(self) -> str:
        """The file as the user named it; for messages only, never stored."""
        return self._where

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """A recipe that ships with the package.

        Raises:
            InputError: no such recipe; the known names are listed.
        """
        if name not in RECIPES:
            raise InputError(f"unknown recipe {name[:60]!r}; known recipes: {', '.join(RECIPES)}, or give a YAML file")
        text = (files("mossquant.plan") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return cls.parse(text, where=f"recipe {name}")

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe file.

        Raises:
            InputError: unreadable, not YAML, or not a recipe; every offender with its line.
        """
        return cls.parse(read_yaml_text(path), where=str(path))

    @classmethod
    def parse(cls, text: str, *, where: str) -> "Recipe":
        """Read the text of a recipe; `where` names it in messages."""
        value, lines = parse_yaml(text, where=where)
        if not isinstance(value, dict):
            raise InputError(
                f"{where}: a recipe is a mapping with version, name, targets, weights, activations and state"
            )
        try:
            recipe = cls.model_validate(value)
        except ValidationError as error:
            mistakes = sorted((_line(lines, item["loc"]), _complaint(item)) for item in error.errors(include_url=False))
            listed = [f"line {line}: {complaint}" for line, complaint in mistakes]
            raise InputError.listing(f"{where} is not a valid recipe", listed, "Mend these lines.") from None
        recipe._text, recipe._where, recipe._lines = text, where, lines
        return recipe

    @property
    def chooses(self) -> bool:
        """Whether formats are left to a budget."""
        return any(rule.choose is not None for rule in self.weights)

    def place(self, *path: str | int) -> str:
        """Where something stands, e.g. the rule ("weights", 3): "line 7"."""
        return f"line {_line(self._lines, path)}"


def recipes() -> tuple[Recipe, ...]:
    """The recipes that ship with the package."""
    return tuple(map(Recipe.named, RECIPES))


def load_recipe(recipe: str | Path) -> Recipe:
    """A recipe by name ("int4") or from a file.

    Raises:
        InputError: neither a known name nor a readable recipe file.
    """
    for path in recipe_files(recipe):
        if path.suffix in (".yaml", ".yml") or path.exists():
            return Recipe.read(path)
    return Recipe.named(str(recipe))


def recipe_files(recipe: str | Path) -> list[Path]:
    """The file that is read for a recipe; none where it is a name, whatever lies in a file of that name."""
    return [] if str(recipe) in RECIPES else [Path(recipe)]


def rewritten(recipe: Recipe, choices: Mapping[Group, str], *, targets: Sequence[str], why: str) -> Recipe:
    """The recipe with each `choose` replaced by what was chosen: an ordinary recipe, to read, edit and run again.

    Args:
        recipe: what was asked.
        choices: group → its number format, or `STORED`; of every group that a rule with `choose` applies to.
        targets: where it must run.
        why: what chose, for the tensors that stay as stored.
    """
    weights: list[dict[str, object]] = []
    for index, rule in enumerate(recipe.weights):
        if rule.choose is None:
            weights.append(rule.model_dump(exclude_none=True, exclude_defaults=True))
            continue
        own = {group: storage for group, storage in choices.items() if _index_of(recipe, group) == index}
        solver = {} if rule.solver is None else {"solver": rule.solver}
        # What most of a role get is said of the role; a rule by names says nothing of the rest of a role.
        usual = Counter(own.values()).most_common(1)[0][0] if own and rule.role is not None else ""
        for group, storage in own.items():
            if storage != usual:
                weights += [{"match": name, **_stored_as(storage, why, solver)} for name in group.patterns]
        roles = dict.fromkeys(role for group in own for role in group.roles if own[group] == usual)
        weights += [{"role": role, **_stored_as(usual, why, solver)} for role in roles]
    value: dict[str, object] = {"version": 1, "name": recipe.name, "targets": list(targets), "solver": recipe.solver}
    rules = {"weights": weights}
    rules["activations"] = [rule.model_dump(exclude_defaults=True) for rule in recipe.activations]
    rules["state"] = [rule.model_dump(exclude_defaults=True) for rule in recipe.state]
    lines = [f"# Chosen from recipe {recipe.name}: {why}.", *(f"{key}: {json.dumps(of)}" for key, of in value.items())]
    for section, of in rules.items():
        lines += [f"{section}:", *(f"  - {json.dumps(rule, ensure_ascii=False)}" for rule in of)]
    return Recipe.parse("\n".join(lines) + "\n", where=recipe.where)


def _index_of(recipe: Recipe, group: Group) -> int | None:
    """The rule of a group's first tensor."""
    spec = group.specs[0]
    return first_match(recipe.weights, role=spec.role, name=spec.name)


def rule_of(recipe: Recipe, group: Group) -> WeightRule | None:
    """The rule that applies to a group; None where none does.

    Raises:
        InputError: its tensors, which must get one format, meet rules of which some leave the format open.
    """
    rules = [first_match(recipe.weights, role=spec.role, name=spec.name) for spec in group.specs]
    chosen = [index for index in rules if index is not None and recipe.weights[index].choose is not None]
    if not chosen:
        return None if rules[0] is None else recipe.weights[rules[0]]
    first = recipe.weights[chosen[0]]
    own = [recipe.weights[index] for index in chosen]
    alike = {(tuple(rule.choose or ()), rule.solver, rule.sensitivity) for rule in own}
    if len(chosen) < len(rules) or len(alike) > 1:
        place = recipe.place("weights", chosen[0])
        raise InputError(
            f"{recipe.where}, {place}: the tensors of {group.name} read one vector and get one format; give all of "
            "them the same choose, solver and sensitivity"
        )
    return first


def _stored_as(storage: str, why: str, solver: Mapping[str, object]) -> dict[str, object]:
    return {"keep": STORED, "why": why} if storage == STORED else {"format": storage, **solver, "why": why}


def first_match(rules: Sequence[Rule], *, role: str, name: str) -> int | None:
    """Index of the first rule that applies, None if none does."""
    return next((index for index, rule in enumerate(rules) if rule.applies(role=role, name=name)), None)


def _line(lines: Lines, loc: Sequence[str | int]) -> int:
    for length in range(len(loc), 0, -1):
        if tuple(loc[:length]) in lines:
            return lines[tuple(loc[:length])]
    return 1


def _complaint(item: Any) -> str:
    *above, last = item["loc"] or ("",)
    if item["type"] == "extra_forbidden":
        rules: dict[str, type[Rule]] = {"weights": WeightRule, "activations": ActivationRule, "state": StateRule}
        schema: type[BaseModel] = rules[str(above[0])] if above else Recipe
        close = get_close_matches(str(last), schema.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(schema.model_fields)}"
        return f"unknown key {str(last)[:40]!r} ({hint})"
    if item["type"] == "missing":
        return f"key {last!r} is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    message = item["msg"]
    return f"{last}: {message[0].lower()}{message[1:]}, not {repr(item['input'])[:60]}"
