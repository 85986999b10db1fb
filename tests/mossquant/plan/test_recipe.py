# SPDX-License-Identifier: Apache-2.0
"""Recipes: what ships, first match wins, and one clear line with a line number for every mistake."""

from pathlib import Path

import pytest

from mossquant.errors import InputError
from mossquant.plan.capabilities import TARGETS
from mossquant.plan.recipe import RECIPES, Recipe, first_match, load_recipe

MINIMAL = """\
version: 1
name: mine
targets: [torch]
weights:
  - {role: "*norm*", keep: fp32, why: few bytes}
  - match: "*.D"
    format: int8_g32
    solver: nearest
  - {role: "*", format: int4_g32}
activations:
  - {role: "*", format: int8_block}
state:
  - {role: "*", format: fp32}
"""

MISTAKES = {
    "misspelled key": (
        "    format: int8_g32",
        "    fromat: int8_g32",
        "line 7: unknown key 'fromat' (did you mean 'format'?)",
    ),
    "misspelled top key": ("targets:", "targetz:", "line 3: unknown key 'targetz' (did you mean 'targets'?)"),
    "unknown format": ("int4_g32", "int5", "line 9: unknown number format 'int5'; known formats: int8, int8_g32"),
    "unknown state": ("format: fp32", "format: fp99", "line 13: unknown state format 'fp99'"),
    "no reason": (", why: few bytes", "", "line 5: keep needs a reason: add why"),
    "neither": (
        '{role: "*", format: int4_g32}',
        '{role: "*"}',
        "line 9: a weight rule needs either format, keep or choose",
    ),
    "two patterns": ('match: "*.D"', 'match: "*.D"\n    role: "ssm.D"', "line 6: a rule needs either role or match"),
    "solver of a kept one": ("why: few", "solver: nearest, why: few", "line 5: what is kept needs no solver"),
    "version": ("version: 1", "version: 2", "line 1: version: input should be 1, not 2"),
    "recover": (
        "name: mine",
        "name: mine\nrecover: -5",
        "line 3: recover: input should be greater than or equal to 0, not -5",
    ),
    "no version": ("version: 1\n", "", "line 1: key 'version' is missing"),
    "name": ("name: mine", "name: ../mine", "line 2: a name is 1 to 64 letters, digits, - and _"),
    "twice": ("name: mine", "name: mine\nname: other", "line 3: key 'name' is given twice"),
    "alias": ("[torch]", "&a [torch]", "line 3: anchors and aliases are not supported"),
    "tag": ("[torch]", "!!python/object/apply:os.system [ls]", "line 3: tags are not supported"),
    "deep": ("[torch]", "[" * 5000, "line 3: nested deeper than 8"),
    "not YAML": ("[torch]", "[torch", "line 4: expected ',' or ']'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    old, new, message = MISTAKES[name]
    assert old in MINIMAL
    with pytest.raises(InputError) as caught:
        Recipe.parse(MINIMAL.replace(old, new, 1), where="mine.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_all_mistakes_at_once() -> None:
    text = MINIMAL.replace("int4_g32", "int5").replace("    solver", "    solvr").replace("name: mine", "name: _")
    with pytest.raises(InputError, match=r"line 2: .*; line 8: .*; line 9: "):
        Recipe.parse(text, where="mine.yaml")


@pytest.mark.parametrize("text", ["[]", "hello"])
def test_not_a_mapping(text: str) -> None:
    with pytest.raises(InputError, match="a recipe is a mapping with version, name"):
        Recipe.parse(text, where="mine.yaml")


@pytest.mark.parametrize(
    ("data", "message"), [(b"  \n", "is empty"), (b"\xff", "is not UTF-8"), (b"#" * (2 << 20), "is larger than 128 kB")]
)
def test_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(
        InputError,
        match=r"unknown recipe 'int3'; known recipes: int4, int8, int4-best, int8-best, .*, or give a YAML file",
    ):
        load_recipe("int3")


def test_parsed() -> None:
    recipe = Recipe.parse(MINIMAL, where="mine.yaml")
    assert (recipe.name, recipe.targets, recipe.solver) == ("mine", ["torch"], "nearest-mse")
    assert recipe.text == MINIMAL
    assert [rule.pattern for rule in recipe.weights] == ["role '*norm*'", "match '*.D'", "role '*'"]
    assert (recipe.weights[1].format, recipe.weights[1].solver) == ("int8_g32", "nearest")
    assert [recipe.place("weights", index) for index in range(3)] == ["line 5", "line 6", "line 9"]


def test_first_match_wins() -> None:
    rules = Recipe.parse(MINIMAL, where="mine.yaml").weights
    assert first_match(rules, role="ssm.norm", name="a.norm.D") == 0
    assert first_match(rules, role="ssm.D", name="a.D") == 1
    assert first_match(rules, role="ssm.A_log", name="a.A_log") == 2
    assert first_match(rules[:2], role="ssm.A_log", name="a.A_log") is None


def test_patterns_do_not_explode() -> None:
    text = MINIMAL.replace('"*norm*"', f'"{"*a" * 90}b"')
    assert first_match(Recipe.parse(text, where="mine.yaml").weights, role="a" * 200, name="x") == 2


@pytest.mark.parametrize("name", RECIPES)
def test_shipped(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.targets == list(TARGETS)
    assert recipe.solver == ("gptq" if name.endswith("-best") else "nearest-mse")
    assert all(rule.why for rule in recipe.weights if rule.keep)


def test_a_file_of_a_recipe_name_is_not_confused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine").name == "mine"
    assert load_recipe(Path("mine")).where == "mine"
