# SPDX-License-Identifier: Apache-2.0
"""Plans are total on every shape, say what they do and why, and do not change unseen."""

import json
import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONFIGS

from mossquant.errors import InputError
from mossquant.formats import get_format
from mossquant.model.config import PRESETS, MossNetConfig
from mossquant.model.mossnet import activation_sites, parameter_count, state_specs, tensor_specs
from mossquant.plan.capabilities import TARGETS, Held, check, get_capabilities
from mossquant.plan.entries import TensorEntry
from mossquant.plan.plan import Plan, make_plan
from mossquant.plan.recipe import RECIPES, Recipe

MAMBA = PRESETS["mamba-130m"]
MODELS = {**PRESETS, **{f"small {name}": config for name, config in CONFIGS.items()}}
FIXED = [name for name in RECIPES if not Recipe.named(name).chooses]
SNAPSHOTS = Path(__file__).parents[2] / "snapshots"

RULES = """\
version: 1
name: mine
targets: [torch]
weights:
WEIGHTS
activations:
  - {role: "*", format: int8_block}
state:
  - {role: "*", format: fp32}
"""


def plan_of(config: MossNetConfig, recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> Plan:
    return make_plan(config, {spec.name: dtype for spec in tensor_specs(config)}, recipe)


def rules(*weights: str) -> Recipe:
    text = RULES.replace("WEIGHTS", "\n".join(f"  - {{{rule}}}" for rule in weights))
    return Recipe.parse(text, where="mine.yaml")


@pytest.mark.parametrize("recipe", FIXED)
@pytest.mark.parametrize("model", MODELS)
def test_total(model: str, recipe: str) -> None:
    config = MODELS[model]
    plan = plan_of(config, Recipe.named(recipe))
    assert [entry.name for entry in plan.tensors] == [spec.name for spec in tensor_specs(config)]
    assert [site.name for site in plan.activations] == [site.name for site in activation_sites(config)]
    assert [state.name for state in plan.state] == [state.name for state in state_specs(config)]
    for entry in plan.tensors:
        assert (entry.format is None) != (entry.kept is None)
        assert (entry.format is None) == (entry.solver is None)
        assert entry.reason
        assert entry.stored_bytes == 2 * entry.count
        if entry.format is not None:
            assert entry.predicted_bytes == get_format(entry.format).payload_bytes(entry.rows, entry.columns)
            assert entry.predicted_bytes < entry.stored_bytes
        if "router" in entry.role or "norm" in entry.role:
            assert entry.kept == "float32"
            assert entry.predicted_bytes == 4 * entry.count
    assert sum(row.bytes for row in plan.summary()) == plan.predicted_bytes
    assert sum(row.weights for row in plan.summary()) == plan.parameters == parameter_count(config)
    check(Held.by(plan, config), plan.targets)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_bits_per_weight() -> None:
    """The bars: 5.0 bits at int4 and 8.7 at int8, over all tensors of `tiny`, padding included."""
    for config in (PRESETS["tiny"], MAMBA):
        assert plan_of(config, Recipe.named("int4-uniform")).bits_per_weight <= 5.0
        assert plan_of(config, Recipe.named("int8-uniform")).bits_per_weight <= 8.7
    plan = plan_of(MAMBA, Recipe.named("int4-uniform"))
    assert plan.bits_per_weight == 8 * plan.predicted_bytes / parameter_count(MAMBA)


def test_int4_recipe_says_what_the_design_says(tiny_config: MossNetConfig) -> None:
    plan = plan_of(tiny_config, Recipe.named("int4-uniform"))
    storage = {entry.role: entry.storage for entry in plan.tensors}
    linears = ("embedding", "ssm.in_proj", "ssm.expert.x_proj", "ssm.expert.dt_proj", "ssm.out_proj")
    experts = ("mlp.expert.w1", "mlp.expert.w3", "mlp.expert.w2")
    small = ("ssm.conv", "ssm.conv_bias", "ssm.D", "ssm.expert.dt_bias")
    kept = ("ssm.router", "mlp.router", "ssm.norm", "mlp.norm", "norm_f")
    assert storage == {
        **dict.fromkeys((*linears, *experts), "int4_g32"),
        "ssm.A_log": "int8",
        **dict.fromkeys(small, "int8_g32"),
        **dict.fromkeys(kept, "float32"),
    }
    conv = plan.by_name["backbone.layers.0.mixer.conv1d.weight"]
    assert (conv.shape, conv.rows, conv.columns) == ((128, 1, 4), 4, 128)
    narrow = plan.by_name["backbone.layers.1.mixer.experts.3.dt_proj.weight"]
    assert (narrow.columns, narrow.padded_columns) == (12, 32)
    assert {(site.format, site.block) for site in plan.activations} == {("int8_block", 32)}


def test_untied_head_is_quantized() -> None:
    plan = plan_of(CONFIGS["untied"], Recipe.named("int8-uniform"))
    assert plan.by_name["lm_head.weight"].format == "int8"
    assert plan.by_name["backbone.embeddings.weight"].format == "int8"


def test_what_would_not_get_smaller_is_kept_with_both_sizes(tiny_config: MossNetConfig) -> None:
    config = replace(tiny_config, time_step_rank=4)
    plan = plan_of(config, Recipe.named("int4-uniform"))
    entry = plan.by_name["backbone.layers.0.mixer.experts.0.dt_proj.weight"]
    assert (entry.kept, entry.predicted_bytes, entry.stored_bytes) == ("bfloat16", 1024, 1024)
    assert entry.reason == "int4_g32 would take 2304 bytes, bfloat16 as stored takes 1024"
    site = plan.site("layers.0.mixer.dt_proj.input")
    assert (site.format, site.block, site.reason) == ("fp32", None, "all weights that read it are kept")
    # 2048 bytes in fp32 are still fewer than 2304; three times as many columns are not.
    assert plan_of(config, Recipe.named("int4-uniform"), torch.float32).by_name[entry.name].kept == "float32"
    assert plan_of(tiny_config, Recipe.named("int4-uniform"), torch.float32).by_name[entry.name].format == "int4_g32"


def test_keep_stored(tiny_config: MossNetConfig) -> None:
    plan = plan_of(tiny_config, rules('role: "*", keep: stored, why: to compare with'))
    assert {entry.kept for entry in plan.tensors} == {"bfloat16"}
    assert plan.predicted_bytes == plan.stored_bytes == 2 * plan.parameters
    assert {entry.reason for entry in plan.tensors} == {"to compare with"}
    assert {site.format for site in plan.activations} == {"fp32"}


def test_first_match_wins(tiny_config: MossNetConfig) -> None:
    recipe = rules(
        'match: "backbone.layers.0.*in_proj*", format: int8, solver: nearest',
        'role: "ssm.in_proj", format: int4_g128',
        'role: "*", keep: stored, why: rest',
    )
    plan = plan_of(tiny_config, recipe)
    first, second = (plan.by_name[f"backbone.layers.{layer}.mixer.in_proj.weight"] for layer in (0, 1))
    assert (first.format, first.solver, first.reason) == (
        "int8",
        "nearest",
        "match 'backbone.layers.0.*in_proj*' in recipe mine",
    )
    assert (second.format, second.solver) == ("int4_g128", "nearest-mse")
    sites = [plan.site(f"layers.{layer}.mixer.in_proj.input") for layer in (0, 1)]
    assert [(site.format, site.block) for site in sites] == [("int8_block", 32), ("int8_block", 128)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (['role: "ssm.*", format: int8'], "no rule under weights matches backbone.embeddings.weight (role embedding)"),
        (
            ['role: "*", keep: fp32, why: x', 'role: "head", format: int8'],
            "line 6: the rule with role 'head' matches nothing",
        ),
        (
            ['role: "*", keep: fp32, why: x', 'role: "ssm.D", format: int8'],
            "line 6: the rule with role 'ssm.D' matches only what earlier rules took",
        ),
        (
            ['role: "mlp.expert.w3", format: int4_g128', 'role: "*", format: int4_g32'],
            "the weights that read layers.0.mlp.w1.input have blocks of 32 and 128",
        ),
    ],
)
def test_rules_that_do_not_fit(tiny_config: MossNetConfig, weights: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(tiny_config, rules(*weights))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_optional_rules_may_match_nothing(tiny_config: MossNetConfig) -> None:
    with_head = ('role: "head", format: int8, optional: true', 'role: "*", keep: fp32, why: x')
    assert plan_of(tiny_config, rules(*with_head)).by_name


def test_all_offenders_at_once(tiny_config: MossNetConfig) -> None:
    with pytest.raises(InputError, match=r"no rule under .*; no rule under .*; and \d+ more"):
        plan_of(tiny_config, rules('role: "embedding", format: int8'))


def test_ledger(tiny_config: MossNetConfig) -> None:
    plan = plan_of(tiny_config, Recipe.named("int8-uniform"))
    assert all(entry.written_bytes is None for entry in plan.tensors)
    ledger = plan.with_results({entry.name: (entry.predicted_bytes, 0.25) for entry in plan.tensors})
    assert sum(entry.written_bytes or 0 for entry in ledger.tensors) == plan.predicted_bytes
    assert Plan.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


BROKEN: dict[str, Any] = {
    "version": lambda values: values | {"version": 2},
    "unknown key inside": lambda values: values | {"tensors": [values["tensors"][0] | {"extra": 1}]},
    "not a number": lambda values: values | {"tensors": [values["tensors"][0] | {"relative_error": float("nan")}]},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json(tiny_config: MossNetConfig, name: str) -> None:
    values = plan_of(tiny_config, Recipe.named("int8-uniform")).to_json()
    with pytest.raises(InputError, match=r"ledger\.json"):
        Plan.from_json(BROKEN[name](json.loads(json.dumps(values))))


def test_capabilities_list_all_offenders(tiny_config: MossNetConfig) -> None:
    plan = plan_of(tiny_config, rules('role: "*norm*", keep: stored, why: x', 'role: "*", format: int8'))
    check(Held.by(plan, tiny_config), ["torch"])
    with pytest.raises(InputError) as caught:
        check(Held.by(plan, tiny_config), ["torch", "onnx"])
    message = str(caught.value)
    assert "onnx holds no codes for backbone.layers.0.mixer.router.weight (role ssm.router): keep it" in message
    assert message.count("router.weight") == 4
    exact = replace(plan_of(tiny_config, Recipe.named("int8-uniform")), targets=("torch",))
    exact = replace(exact, activations=tuple(replace(site, format="fp32") for site in exact.activations))
    check(Held.by(exact, tiny_config), ["torch", "onnx"])
    for target in ("executorch", "native"):
        with pytest.raises(InputError, match=rf"{target} cannot take fp32 at layers\.0\.mixer\.in_proj\.input"):
            check(Held.by(exact, tiny_config), [target])
    in_half = replace(plan, state=tuple(replace(state, format="fp16") for state in plan.state))
    check(Held.by(in_half, tiny_config), ["torch"])
    for target in ("onnx", "executorch", "native"):
        with pytest.raises(InputError, match=rf"{target} cannot carry layers.0.mixer.conv in fp16"):
            check(Held.by(in_half, tiny_config), [target])


@pytest.mark.parametrize(
    ("target", "own"), [("onnx", "int8_block"), ("executorch", "int8_row_asym"), ("native", "int8_block")]
)
def test_a_target_rounds_inputs_in_its_own_way(tiny_config: MossNetConfig, target: str, own: str) -> None:
    """Formats that round at run time stand in for one another: nothing that was measured is lost."""
    plan = plan_of(tiny_config, Recipe.named("int8-uniform"))
    for planned in ("int8_block", "int8_row_asym"):
        sites = tuple(replace(site, format=planned) for site in plan.activations)
        check(Held.by(replace(plan, activations=sites), tiny_config), [target])
        assert get_capabilities(target).taken(planned) == own
    assert get_capabilities(target).rounded_to("int8") == own


def test_unknown_targets(tiny_config: MossNetConfig) -> None:
    plan = plan_of(tiny_config, Recipe.named("int8-uniform"))
    with pytest.raises(InputError, match=r"unknown target 'onxx'; unknown target 'npu'\. Known targets: torch, onnx"):
        check(Held.by(plan, tiny_config), ["onxx", "torch", "npu"])
    with pytest.raises(InputError, match="unknown target 'onxx'; known targets: torch, onnx"):
        get_capabilities("onxx")
    assert TARGETS == ("torch", "onnx", "executorch", "native")


def summary(plan: Plan) -> dict[str, Any]:
    """What a reviewer wants to see of a plan: one line for tensors that are alike."""

    def line(entry: TensorEntry) -> str:
        padded = "" if entry.padded_columns == entry.columns else f" padded to {entry.padded_columns}"
        solver = f" ({entry.solver})" if entry.solver else ""
        what = f"{entry.role} [{entry.rows}, {entry.columns}]{padded}"
        return f"{what}: {entry.storage}{solver}, {entry.predicted_bytes} bytes"

    lines = sorted(line(entry) for entry in plan.tensors)
    sites = sorted(f"{site.role} [{site.width}]: {site.format}, block {site.block}" for site in plan.activations)
    return {
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "predicted_bytes": plan.predicted_bytes,
        "tensors": {what: len(list(same)) for what, same in groupby(lines)},
        "activations": {what: len(list(same)) for what, same in groupby(sites)},
        "state": sorted({f"{state.role}: {state.format}" for state in plan.state}),
    }


@pytest.mark.parametrize("recipe", FIXED)
@pytest.mark.parametrize("model", PRESETS)
def test_snapshot(model: str, recipe: str) -> None:
    """A change of formats or bytes is seen in review. MOSSQUANT_SNAPSHOTS=write rewrites the files."""
    found = summary(plan_of(PRESETS[model], Recipe.named(recipe)))
    path = SNAPSHOTS / f"plan-{model}-{recipe}.json"
    if os.environ.get("MOSSQUANT_SNAPSHOTS") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert json.loads(path.read_text()) == found
