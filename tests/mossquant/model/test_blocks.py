# SPDX-License-Identifier: Apache-2.0
"""What a kind of block says about itself: experts, names after pruning, loading alone, states that grow."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small import CONFIGS, SMALL, random_model, random_tokens

from mossquant.errors import InputError
from mossquant.model.block import Block
from mossquant.model.blocks import KINDS, blocks_of
from mossquant.model.forward import Forward
from mossquant.model.mlp import Mlp
from mossquant.model.mossnet import experts_of, state_specs, tensor_specs
from mossquant.model.tensors import StateSpec, Use
from mossquant.runner import checked_arrays

KEPT: list[tuple[type[Block], tuple[int, ...]]] = [
    *((kind, keep) for kind in KINDS for keep in ((0, 1, 2, 3), (3, 1), (2,))),
    (Mlp, ()),
]


@pytest.mark.parametrize(("kind", "keep"), KEPT)
def test_names_after_pruning(kind: type[Block], keep: tuple[int, ...]) -> None:
    experts = next(experts for experts in experts_of(SMALL) if experts.kind == kind.kind and experts.layer == 1)
    counts: dict[str, Any] = {experts.counted_by: (experts.count, len(keep))}
    pruned = replace(SMALL, **counts)
    renamed = {}
    for layer, block in blocks_of(SMALL):
        for spec in block.specs(SMALL, layer):
            name = block.renamed(spec, keep) if (block, layer) == (kind, 1) else spec.name
            if name is not None:
                renamed[name] = spec
    after = {spec.name: spec for spec in tensor_specs(pruned) if spec.layer is not None}
    assert sorted(renamed) == sorted(after)
    for name, spec in after.items():
        assert renamed[name].role == spec.role
        assert renamed[name].shape[1:] == spec.shape[1:]
        if spec.expert is not None and (spec.layer, spec.role.split(".")[0]) == (1, kind.kind):
            assert renamed[name].expert == keep[spec.expert]


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_and_uses(name: str) -> None:
    config = CONFIGS[name]
    specs = {spec.name: spec for spec in tensor_specs(config)}
    members = [tensor for experts in experts_of(config) for member in experts.members for tensor in member]
    assert sorted(members) == sorted(spec.name for spec in specs.values() if spec.expert is not None)
    for experts in experts_of(config):
        assert 1 <= experts.chosen <= experts.count
        assert (experts.router is None) == (experts.count == 1)
        assert experts.router is None or specs[experts.router].use == {Use.ROUTER}
    for spec in specs.values():
        assert (spec.site is not None) == bool(spec.use & {Use.LINEAR, Use.SUMMED}), spec.name
        assert not spec.parts or sum(rows for _, rows in spec.parts) == spec.shape[0]
    tables = [spec for spec in specs.values() if Use.TABLE in spec.use]
    assert [Use.LINEAR in table.use for table in tables] == [config.tie_word_embeddings]


def test_a_block_loads_and_runs_alone() -> None:
    model = random_model(SMALL)
    values = {spec.name: model.parameter_of(spec) for spec in tensor_specs(SMALL)}
    x, state = model.embeddings[random_tokens(SMALL, 2, 12)], model.initial_state(2)
    run = Forward(scan="sequential")
    for block, (layer, kind) in zip(model.blocks, blocks_of(SMALL), strict=True):
        alone = kind(SMALL, layer).double().requires_grad_(False)
        alone.load(values.__getitem__)
        expected, after = block.added(x, state, run)
        found, own = alone.added(x, {spec.name: state[spec.name] for spec in kind.states(SMALL, layer)}, run)
        assert torch.equal(found, expected)
        assert own.keys() == after.keys() == {spec.name for spec in kind.states(SMALL, layer)}
        x = expected


def test_a_state_that_grows() -> None:
    cache = StateSpec("layers.0.cache", (2, 0, 4), "attention.cache", grows=1)
    assert cache.zeros(3).shape == (3, 2, 0, 4)
    assert cache.after(7) == (2, 7, 4)
    assert cache.symbolic("T") == [2, "T", 4]
    specs = [*state_specs(SMALL), cache]
    arrays = {spec.name: np.zeros((3, *spec.after(7)), np.float32) for spec in specs}
    assert checked_arrays(arrays, specs) == 3
    wrong = {"layers.0.cache": np.zeros((3, 2, 7), np.float32), "layers.0.mixer.ssm": np.zeros((3, 47, 5), np.float32)}
    with pytest.raises(InputError) as caught:
        checked_arrays(arrays | wrong, specs)
    assert "layers.0.cache has shape [3, 2, 7], needs ['batch', 2, 'tokens', 4]" in str(caught.value)
    assert "layers.0.mixer.ssm has shape [3, 47, 5], needs ['batch', 40, 5]" in str(caught.value)
