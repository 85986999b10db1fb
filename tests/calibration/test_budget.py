# SPDX-License-Identifier: Apache-2.0
"""Budgets: kept to the byte, an ordinary recipe comes out, and what cannot be kept is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import CONFIGS, random_model, write_model

from mossquant.calibration.budget import Chosen, smallest, spend
from mossquant.calibration.costs import Costs, LinearCost
from mossquant.calibration.options import dtypes_of, open_groups
from mossquant.calibration.quantize import quantize
from mossquant.calibration.sensitivity import GroupLosses, Level, Loss, Sensitivities
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.mossnet import activation_sites
from mossquant.plan.capabilities import Held, check
from mossquant.plan.groups import groups_of
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import RECIPES, Budget, Recipe, rewritten

CHOOSING = [name for name in RECIPES if Recipe.named(name).chooses]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "model"
    return write_model(folder, random_model(CONFIGS[request.param], dtype=torch.float32), dtype=torch.bfloat16)


def weights_of(folder: Path) -> Weights:
    return open_weights(folder, verb="test")


def made_up(weights: Weights, recipe: Recipe, *, together: float = 2.0) -> Sensitivities:
    """Losses that fall with bytes, others for each group; all groups together lose `together` times the sum."""
    groups = []
    for number, group in enumerate(open_groups(weights, recipe, recipe.targets)):
        own = tuple(
            Loss(
                storage, size, 0.0 if storage == "stored" else (1 + number % 3) * 4.0 ** -(8 * size / group.group.count)
            )
            for storage, size in group.bytes.items()
        )
        named = group.group
        groups.append(GroupLosses(named.name, named.role, named.layer, None, named.count, named.tensors, own))
    smallest = sum(group.losses[0].kl for group in groups)
    files = dict(weights.origin.files)
    levels = (Level(smallest, together * smallest),)
    return Sensitivities("measured", files, "made up", (), 1, levels, tuple(groups))


@pytest.mark.parametrize("name", RECIPES)
def test_every_target_that_a_recipe_names_takes_it(name: str, model: Path) -> None:
    """Whatever is chosen of what it leaves open."""
    weights, recipe = weights_of(model), Recipe.named(name)
    groups = open_groups(weights, recipe, recipe.targets)
    for end in (0, -1):
        choices = {group.group: list(group.bytes)[end] for group in groups}
        chosen = rewritten(recipe, choices, targets=recipe.targets, why="a test") if groups else recipe
        check(Held.by(make_plan(weights.config, dtypes_of(weights), chosen), weights.config), recipe.targets)


def test_groups_are_whole_and_readers_of_a_site_agree(model: Path) -> None:
    weights = weights_of(model)
    groups = groups_of(weights.config)
    named = [name for group in groups for name in group.tensors]
    assert len(named) == len(set(named))
    left = {weights.specs[name].role for name in weights.specs if name not in named}
    assert all("norm" in role or "router" in role for role in left)
    of = {name: group.name for group in groups for name in group.tensors}
    for site in activation_sites(weights.config):
        assert len({of[name] for name in site.tensors}) == 1
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_promised_is_written_and_the_recipe_runs_again(name: str, model: Path, tmp_path: Path) -> None:
    weights, recipe = weights_of(model), Recipe.named(name)
    losses = made_up(weights, recipe)
    largest = quantize(model, tmp_path, recipe=name, budget="16bpw", dry_run=True).predicted_bytes
    chosen = spend(weights, recipe, budget=f"{largest * 0.8 / 1000:.3f}kB", sensitivities=losses)
    plan = make_plan(weights.config, dtypes_of(weights), chosen.recipe)
    assert plan.predicted_bytes <= largest * 0.8
    assert chosen.gap == 0
    (tmp_path / "again.yaml").write_text(chosen.recipe.text.replace('"gptq"', '"nearest-mse"'))
    ledger = quantize(model, tmp_path / "out", recipe=tmp_path / "again.yaml")
    assert [entry.storage for entry in ledger.tensors] == [entry.storage for entry in plan.tensors]
    assert sum(entry.written_bytes or 0 for entry in ledger.tensors) == plan.predicted_bytes
    by_bytes = {point.bytes: point.kl for point in chosen.frontier}
    assert plan.predicted_bytes not in by_bytes or chosen.predicted_kl == pytest.approx(by_bytes[plan.predicted_bytes])
    above = [point.kl for point in chosen.frontier if point.bytes <= plan.predicted_bytes]
    assert chosen.predicted_kl is not None
    assert not above or chosen.predicted_kl <= min(above) * (1 + 1e-9)


def test_a_kl_to_keep_is_kept_in_few_bytes(model: Path) -> None:
    weights, recipe = weights_of(model), Recipe.named("int4")
    losses = made_up(weights, recipe)
    loose = spend(weights, recipe, budget="kl=0.5", sensitivities=losses)
    tight = spend(weights, recipe, budget="kl=0.001", sensitivities=losses)
    for chosen, bound in ((loose, 0.5), (tight, 0.001)):
        assert chosen.predicted_kl is not None
        assert chosen.predicted_kl <= bound * (1 + 1e-9)
    assert bytes_of(weights, loose) < bytes_of(weights, tight)


def bytes_of(weights: Weights, chosen: Chosen) -> int:
    return make_plan(weights.config, dtypes_of(weights), chosen.recipe).predicted_bytes


def test_roles_that_are_known_to_lose_more_get_more(tmp_path: Path) -> None:
    text = Recipe.named("int4").text.replace("role: embedding, choose", "role: embedding, solver: nearest, choose")
    folder = write_model(
        tmp_path / "model", random_model(CONFIGS["experts"], dtype=torch.float32), dtype=torch.bfloat16
    )
    weights = weights_of(folder)
    formats = {}
    for sensitivity in ("0.0001", "10000"):
        line = next(line for line in text.splitlines() if "role: embedding" in line)
        changed = text.replace(line, line.split("sensitivity:")[0] + f"sensitivity: {sensitivity}}}")
        plain = spend(weights, Recipe.parse(changed, where="mine"), budget="10.5bpw")
        plan = make_plan(weights.config, dtypes_of(weights), plain.recipe)
        assert plan.bits_per_weight <= 10.5
        assert plain.predicted_kl is None
        formats[sensitivity] = plan.by_name["backbone.embeddings.weight"].predicted_bytes
    assert formats["0.0001"] < formats["10000"]


def test_targets_decide_what_may_be_chosen(model: Path, tmp_path: Path) -> None:
    weights, recipe = weights_of(model), Recipe.named("int8")
    for targets, held in ((("torch", "onnx"), True), (("torch", "executorch"), False)):
        groups = open_groups(weights, recipe, targets)
        matrices = [group for group in groups if group.group.specs[0].site is not None]
        assert any("int8_g32" in group.bytes for group in matrices) == held
    plan = quantize(model, tmp_path, recipe="int4-uniform", targets=["torch"], dry_run=True)
    assert plan.targets == ("torch",)


def test_what_cannot_be_kept_is_said(model: Path, tmp_path: Path) -> None:
    weights, recipe = weights_of(model), Recipe.named("int4")
    with pytest.raises(InputError, match="the smallest choice takes"):
        smallest(weights, recipe, budget="1bpw")
    with pytest.raises(InputError, match="the smallest choice takes"):
        quantize(model, tmp_path / "out", budget="1bpw", sensitivities=made_up(weights, recipe))
    small = Recipe.parse(recipe.text.replace("4.75bpw", "1bpw"), where="mine")
    assert "it is taken" in spend(weights, small).notes[0]
    with pytest.raises(InputError, match="needs losses that were measured"):
        spend(weights, recipe, budget="kl=0.01")
    with pytest.raises(InputError, match="nothing to spend"):
        quantize(model, tmp_path / "out", recipe="int4-uniform", budget="5bpw")
    other = replace(made_up(weights, recipe), model={"model.safetensors": "0" * 64})
    with pytest.raises(InputError, match="of another model"):
        quantize(model, tmp_path / "out", sensitivities=other)
    lacking = replace(made_up(weights, recipe), groups=())
    with pytest.raises(InputError, match="the sensitivities lack"):
        spend(weights, recipe, sensitivities=lacking)
    for text in ("4.75", "bpw", "-1bpw", "4bpwx", "kl=-1", "kl=1MB", "1e99MB"):
        with pytest.raises(InputError, match="is not a budget"):
            Budget.parse(text)
    for text, message in (
        ("kl=0", "allows no loss, .*; give more than 0"),
        ("0MB", "allows nothing; give more than 0"),
    ):
        with pytest.raises(InputError, match=f"a budget of {text} {message}"):
            Budget.parse(text)
    assert [str(Budget.parse(text)) for text in ("4.75bpw", "40MB", "500kB", "kl=1e-2")] == [
        *("4.75bpw", "40MB", "0.5MB", "kl=0.01")
    ]


def test_readers_of_one_vector_get_one_choice(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "model", random_model(CONFIGS["experts"], dtype=torch.float32), dtype=torch.bfloat16
    )
    text = Recipe.named("int4").text.replace(
        '  - {role: "mlp.expert.w[13]"', '  - {role: mlp.expert.w3, format: int8}\n  - {role: "mlp.expert.w[13]"'
    )
    with pytest.raises(InputError, match="read one vector and get one format"):
        spend(weights_of(folder), Recipe.parse(text, where="mine"))


def test_a_choice_that_is_none_is_said_in_one_line(tmp_path: Path) -> None:
    """Of tensors whose format is never chosen, and where nothing says what a format loses."""
    model = write_model(tmp_path / "model", random_model(CONFIGS["mamba"], dtype=torch.float32), dtype=torch.bfloat16)
    text = Recipe.named("int4").text
    norms = next(line for line in text.splitlines() if '"*norm*"' in line)
    path = tmp_path / "mine.yaml"
    for wrong, message in (
        ('  - {role: "*", choose: [int4_g32, int8]}', "line 8: the formats of ssm.norm, norm_f are no choice"),
        (norms + '\n  - {role: "*", choose: [int8, stored]}', "line 9: nothing says what these formats lose"),
    ):
        before, after = text.partition("weights:")[0], text[text.index("activations:") :]
        path.write_text(f"{before}weights:\n{wrong}\n{after}")
        with pytest.raises(InputError) as caught:
            quantize(model, tmp_path / "out", recipe=path, budget="12bpw")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(InputError, match="nothing says what these formats lose"):
        quantize(model, tmp_path / "out", recipe=path, budget="12bpw", text=[tmp_path / "text.txt"], dry_run=True)
    weights = weights_of(model)
    with pytest.raises(InputError, match="sensitivities choose nothing"):
        quantize(model, tmp_path / "out", recipe="int4-uniform", sensitivities=made_up(weights, Recipe.named("int4")))


def made_up_costs(weights: Weights) -> Costs:
    """A nanosecond a byte of codes, and ten where a matrix is kept; every shape that is a linear's."""
    shapes = {spec.matrix_shape for spec in weights.specs.values() if spec.site is not None}
    per_weight = {"int4_g128": 0.5, "int4_g32": 0.55, "int8": 1.0, "int8_g32": 1.1, "float32": 10.0}
    linears = [
        LinearCost(name, *shape, ns=ns * shape[0] * shape[1]) for shape in shapes for name, ns in per_weight.items()
    ]
    return Costs(1, "made up", 1, 2e6, 1e6, tuple(linears))


def test_a_budget_of_time_is_kept_and_spent(model: Path, tmp_path: Path) -> None:
    """Independently added up: every linear in the format that it got, of experts the chosen share."""
    weights, recipe = weights_of(model), Recipe.named("int4")
    losses, costs = made_up(weights, recipe), made_up_costs(weights)

    def taken(chosen: Chosen) -> float:
        plan, total = make_plan(weights.config, dtypes_of(weights), chosen.recipe), costs.fixed_ns
        for name, spec in weights.specs.items():
            if spec.site is None:
                continue
            own = plan.by_name[name].format or "float32"
            config, layer = weights.config, spec.layer or 0
            share = 1.0
            if spec.expert is not None and ".mlp." in name:
                share = config.mlp_chosen(layer) / config.mlp_experts(layer)
            elif spec.role.startswith("ssm.expert"):
                share = config.ssm_chosen(layer) / config.ssm_experts(layer)
            each = {(cost.format, cost.outputs, cost.columns): cost.ns for cost in costs.linears}
            total += share * each[own, *spec.matrix_shape]
        return total / 1e6

    fast = spend(weights, recipe, budget="100ms", sensitivities=losses, costs=costs)
    least = make_plan(weights.config, dtypes_of(weights), smallest(weights, recipe, budget="100ms", costs=costs))
    lowest = taken(replace(fast, recipe=smallest(weights, recipe, budget="100ms", costs=costs)))
    between = (lowest + taken(fast)) / 2
    chosen = spend(weights, recipe, budget=f"{between:.6f}ms", sensitivities=losses, costs=costs)
    assert chosen.predicted_ms == pytest.approx(taken(chosen), rel=1e-4)
    assert lowest < taken(chosen) <= between
    assert chosen.predicted_kl is not None
    assert fast.predicted_kl is not None
    assert chosen.predicted_kl > fast.predicted_kl
    assert any("one decoded token should take" in note for note in chosen.notes)
    assert make_plan(weights.config, dtypes_of(weights), chosen.recipe).predicted_bytes > least.predicted_bytes

    with pytest.raises(InputError, match=r"ms a token, more than the budget of 0\.5ms"):
        smallest(weights, recipe, budget="0.5ms", costs=costs)
    with pytest.raises(InputError, match="give --costs, which moss-costs writes"):
        spend(weights, recipe, budget="8ms", sensitivities=losses)
    lacking = replace(costs, linears=costs.linears[:1])
    with pytest.raises(InputError, match="time a model of this shape with moss-costs"):
        spend(weights, recipe, budget="8ms", sensitivities=losses, costs=lacking)
    (tmp_path / "costs.json").write_text('{"version": 1, "machine": "x"}')
    with pytest.raises(InputError, match=r"costs\.json"):
        quantize(model, tmp_path / "out", budget="8ms", costs=tmp_path / "costs.json")
