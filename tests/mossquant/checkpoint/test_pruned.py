# SPDX-License-Identifier: Apache-2.0
"""A view without some experts: the model that a router would make of the whole one if it could not choose them."""

import json
from pathlib import Path

import bounds
import pytest
import torch
from small import CONFIGS, SMALL, difference, random_model, random_tokens, write_model

from mossquant.calibration.meter import reroute_without
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.pruned import Keep, Pruned
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.model.forward import Forward

UNEVEN = Keep(ssm=((1, 3), (2,)), mlp=((0, 1, 3), (0, 3)))
"""Counts that differ from layer to layer, one SSM expert in the last."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("pruned") / "model"
    return open_weights(write_model(folder, random_model(SMALL, dtype=torch.float32)), verb="test")


def test_it_computes_what_the_whole_model_does_without_them(weights: Weights) -> None:
    """Masked in the router's logits: the plain definition of an expert that is gone."""
    tokens = random_tokens(SMALL, 2, 40)
    whole, left = (load_model(of, dtype=torch.float64) for of in (weights, Pruned(weights, UNEVEN)))
    run = Forward(scan="sequential", reroute=reroute_without(UNEVEN.gone(SMALL)))
    expected, _ = whole.hidden(tokens, whole.initial_state(2), run)
    found, _ = left.hidden(tokens, left.initial_state(2), Forward(scan="sequential"))
    assert difference(found, expected) < bounds.SAME_SUM_FLOAT64
    plain, _ = whole.hidden(tokens, whole.initial_state(2), Forward(scan="sequential"))
    assert difference(plain, expected) > bounds.PLANTED_FAULT


def test_what_it_says_of_itself(weights: Weights) -> None:
    left = Pruned(weights, UNEVEN)
    assert left.config.num_ssm_experts == (2, 1)
    assert left.config.num_mlp_experts == (3, 2)
    assert {name: tuple(left.kept(name).shape) for name in left.specs} == {
        name: spec.shape for name, spec in left.specs.items()
    }
    assert torch.equal(
        left.kept("backbone.layers.1.mixer.x_proj.weight"),
        weights.kept("backbone.layers.1.mixer.experts.2.x_proj.weight"),
    )
    assert "backbone.layers.1.mixer.router.weight" not in left.specs
    others = [Pruned(weights, kept).origin.files for kept in (UNEVEN, Keep(ssm=((1, 3), (3,))))]
    assert others[0] != others[1] != weights.origin.files


@pytest.mark.parametrize(("kept", "said"), [
    (Keep(ssm=((0, 1, 2, 3),)), "ssm lists 1 layers, the model has 2"),
    (Keep(ssm=((0, 9), (1,))), "layer 0, ssm: expert 9 is unknown, it has 4"),
    (Keep(ssm=((1, 0), (0, 0))), "layer 0, ssm: [1, 0] is not in ascending order, each expert once"),
    (Keep(ssm=((), (1,))), "layer 0, ssm: 0 left, fewer than the 1 that a token needs"),
    (Keep(mlp=((2,), (0, 1))), "layer 0, mlp: 1 left, fewer than the 2 that a token needs"),
])  # fmt: skip
def test_refused(weights: Weights, kept: Keep, said: str) -> None:
    with pytest.raises(InputError, match="what is to be kept does not fit the model") as caught:
        Pruned(weights, kept)
    assert said in str(caught.value)


def test_a_block_without_a_router_keeps_its_expert() -> None:
    with pytest.raises(InputError, match="its one expert has no router, and cannot go"):
        Keep(ssm=((), ())).check(CONFIGS["mamba"])
    with pytest.raises(InputError, match="layer 1, mlp: it has no experts"):
        Keep(mlp=((), (1,))).check(CONFIGS["mamba"])


def test_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps(UNEVEN.to_json(SMALL)))
    assert Keep.read(file) == UNEVEN
    for text in ('{"ssm": [[0.5]]}', '{"ssm": [[-1]]}', '{"attention": [[1]]}', "[1, 2]", "{"):
        file.write_text(text)
        with pytest.raises(InputError):
            Keep.read(file)
