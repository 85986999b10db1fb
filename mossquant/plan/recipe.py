# SPDX-License-Identifier: Apache-2.0
"""What is asked for: ordered rules from roles and names to formats. A recipe knows no shapes, packing or target.

    version: 1
    name: int4                      # letters, digits, - and _
    targets: [torch, onnx]          # where it must run; checked before any work
    solver: nearest-mse             # default of the weight rules: nearest, nearest-mse
    weights:                        # every tensor must match a rule; the first match wins
      - {role: "*.router", keep: fp32, why: "chooses the experts", optional: true}
      - {match: "backbone.layers.0.*.in_proj.weight", format: int8, solver: nearest}
      - {role: "*", format: int4_g32}
    activations:                    # every input of a linear layer
      - {role: "*", format: int8_block}
    state:                          # every recurrent state array
      - {role: "*", format: fp32}

`role` and `match` are shell-style patterns (`*`, `?`, `[…]`) on roles and on names. `keep: fp32` stores the values as
fp32, `keep: stored` in the checkpoint's own type; `why` says what for. A rule that matches nothing is an error, unless
it says `optional: true`, which is meant for parts that not every model has (routers, MLP experts, an untied head).
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from mossquant.errors import InputError
from mossquant.files.yaml import Lines, parse_yaml, read_yaml_text
from mossquant.formats import get_format
from mossquant.formats.activations import get_activation_format
from mossquant.formats.states import get_state_format

RECIPES = ("int8", "int4")
"""Recipes that ship with the package, by name."""

TargetName = Annotated[str, StringConstraints(min_length=1, max_length=40)]
SolverName = Annotated[str, StringConstraints(min_length=1, max_length=40)]
"""Which solvers there are, only calibration knows."""
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Why = Annotated[str, StringConstraints(min_length=1, max_length=500)]


def _recipe_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise InputError(f"a name is 1 to 64 letters, digits, - and _, not {name[:70]!r}")
    return name


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


class WeightRule(Rule):
    """Tensors that get a number format, or are kept for a reason."""

    format: Annotated[str, AfterValidator(lambda name: get_format(name).name)] | None = None
    keep: Literal["fp32", "stored"] | None = None
    why: Why | None = None
    solver: SolverName | None = None

    @model_validator(mode="after")
    def _format_or_keep(self) -> "WeightRule":
        if (self.format is None) == (self.keep is None):
            raise InputError("a weight rule needs either format or keep")
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
        weights: rules for tensors, in order.
        activations: rules for the inputs of linear layers, in order.
        state: rules for state arrays, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    name: Annotated[str, AfterValidator(_recipe_name)]
    targets: list[TargetName]
    solver: SolverName = "nearest-mse"
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

    def place(self, section: str, index: int) -> str:
        """Where a rule stands, e.g. "line 7"."""
        return f"line {_line(self._lines, (section, index))}"


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
