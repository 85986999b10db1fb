# SPDX-License-Identifier: Apache-2.0
"""The recipe that the documentation shows is a recipe, and fits the models that it is shown for."""

import re
from pathlib import Path

import torch

from mossquant.model.config import PRESETS
from mossquant.model.mossnet import tensor_specs
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import load_recipe

PAGE = Path(__file__).resolve().parents[3] / "docs" / "quantization.md"


def test_the_documented_recipe_gives_a_total_plan(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "careful.yaml"
    path.write_text(text)
    specs = tensor_specs(PRESETS["tiny"])
    plan = make_plan(PRESETS["tiny"], {spec.name: torch.bfloat16 for spec in specs}, load_recipe(path))
    formats = {entry.name: entry.format for entry in plan.tensors}
    assert formats["backbone.layers.0.mlp.experts.1.w2.weight"] == "int8"
    assert formats["backbone.layers.1.mlp.experts.1.w2.weight"] == "int4_g32"
    assert formats["backbone.layers.1.mlp.router.weight"] is None
    roles = set(re.findall(r"`([\w.]+)`", PAGE.read_text().split("Roles: ")[1].split("Activations:")[0]))
    assert roles == {spec.role for spec in specs} | {"head"}
