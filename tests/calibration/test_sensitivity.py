# SPDX-License-Identifier: Apache-2.0
"""Sensitivities against the definition: two whole models, one of them with a group replaced."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from commands import command, die_at, forked, refused
from scipy.stats import spearmanr
from small import CONFIGS, random_model, write_model

from mossquant.calibration.meter import Meter, divergence
from mossquant.calibration.options import open_groups, rounded
from mossquant.calibration.quantize import quantize
from mossquant.calibration.sensitivity import Level, Sensitivities, losses_of, sensitivity
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.divergence import Predictions, kl
from mossquant.errors import InputError
from mossquant.plan.recipe import Recipe
from mossquant.text.text import Text

VOCABULARY = 53
INT4 = Recipe.named("int4")


def ids(count: int, seed: int = 0) -> CalibrationText:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, count)
    return CalibrationText("random ids", ("0" * 64,), tokens)


@pytest.fixture(scope="module", params=["experts", "mamba", "untied"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    write_model(folder, random_model(CONFIGS[request.param], dtype=torch.float32), dtype=torch.bfloat16)
    return open_weights(folder, verb="test")


def brute_force(weights: Weights, changed: dict[str, torch.Tensor], windows: torch.Tensor) -> float:
    """Mean KL of two models in float64, run from the beginning."""
    one, two = (load_model(weights, dtype=torch.float64) for _ in range(2))
    for name, values in changed.items():
        two.parameter_of(weights.specs[name]).copy_(values)
    with torch.inference_mode():
        logits = [model(windows)[0].numpy() for model in (one, two)]
    return float(kl(Predictions(logits[0]), Predictions(logits[1])).mean())


def test_divergence_is_exact_also_where_it_is_tiny() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20, 500, generator=generator, dtype=torch.float64)
    for size in (1e-3, 1e-1, 1.0):
        other = logits + size * torch.randn(logits.shape, generator=generator, dtype=torch.float64) + 3
        exact = kl(Predictions(logits.numpy()), Predictions(other.numpy()))
        found = divergence(logits.float(), other.float()).double().numpy()
        assert np.abs(found / exact - 1).max() <= bounds.KL_IN_FLOAT32
    assert float(divergence(logits, logits).abs().max()) == 0


def test_a_group_alone_is_what_two_models_say(weights: Weights) -> None:
    text = ids(200)
    found = losses_of(weights, [INT4], text, targets=["torch"], tokens=100, method="measured")
    groups = {group.group.name: group for group in open_groups(weights, INT4, ["torch"])}
    assert [group.name for group in found.groups] == list(groups)
    windows = text.windows(1, 256)
    everything: dict[str, torch.Tensor] = {}
    for losses in found.groups:
        specs = groups[losses.name].group.specs
        for loss in losses.losses:
            changed = {spec.name: rounded(weights, spec, loss.storage) for spec in specs}
            assert loss.kl == pytest.approx(brute_force(weights, changed, windows), rel=1e-3, abs=1e-9)
        smallest = losses.losses[0].storage
        everything |= {spec.name: rounded(weights, spec, smallest) for spec in specs}
    first, *others = found.levels
    assert first.kl == pytest.approx(brute_force(weights, everything, windows), rel=1e-3)
    assert first.sum == pytest.approx(sum(losses.losses[0].kl for losses in found.groups))
    assert others
    assert all(more.sum >= 3 * less.sum for more, less in pairwise(found.levels))


def test_what_is_promised_lies_between_what_was_measured(weights: Weights) -> None:
    found = losses_of(weights, [INT4], ids(200), targets=["torch"], tokens=100, method="measured")
    levels = (Level(0.4, 0.5), Level(0.1, 0.05), Level(0.02, 0.06))
    made_up = replace(found, levels=levels)
    assert made_up.additivity == pytest.approx(1.25)
    assert made_up.promised(0.4) == pytest.approx(0.5)
    assert made_up.promised(0.2) == pytest.approx((0.5 * 0.06) ** 0.5, rel=1e-6)
    assert made_up.promised(0.8) == pytest.approx(1.0)
    assert made_up.promised(0.002) == pytest.approx(0.006)
    sums = np.geomspace(1e-3, 1, 50)
    assert np.all(np.diff([made_up.promised(total) for total in sums]) > 0)
    assert [made_up.within(made_up.promised(total)) for total in sums] == pytest.approx(list(sums), rel=1e-5)
    assert replace(found, levels=()).promised(0.3) == replace(found, levels=()).within(0.3) == 0.3


def test_changes_are_taken_back(weights: Weights) -> None:
    meter = Meter(weights, ids(100).windows(2, 50))
    spec = next(iter(weights.specs.values()))
    before = meter.model.parameter_of(spec).clone()
    assert float(meter.kl({spec: before + 1}).mean()) > 0
    assert torch.equal(meter.model.parameter_of(spec), before)
    assert float(meter.kl({spec: before}).max()) == 0


def test_estimates_follow_what_is_measured(weights: Weights) -> None:
    """A wrong gradient, a group mixed up with another or a missing factor would be off by much more.

    Where there are routers, a few tokens that change hands decide what a small change costs: ranks are compared.
    """
    text = ids(4000)
    measured, estimated = (
        losses_of(weights, [INT4], text, targets=["torch"], tokens=1024, method=method)
        for method in ("measured", "estimated")
    )
    assert (measured.method, estimated.method) == ("measured", "estimated")
    pairs = [
        (one.kl, two.kl)
        for a, b in zip(measured.groups, estimated.groups, strict=True)
        for one, two in zip(a.losses, b.losses, strict=True)
        if one.kl > 1e-7
    ]
    one, two = np.log(pairs).T
    assert len(pairs) > 10
    assert spearmanr(one, two).statistic > 0.8
    if weights.config.ssm_experts(0) == 1:
        assert float(np.sqrt(np.mean(np.square(one - two)))) < bounds.ESTIMATED_LOG_ERROR


def test_experts_are_looked_at_alone_on_request(weights: Weights) -> None:
    found = losses_of(weights, [INT4], ids(100), targets=["torch"], tokens=50, method="measured", experts=True)
    whole = {group.name: set(group.tensors) for group in found.groups if group.expert is None}
    for group in found.groups:
        if group.expert is not None:
            name, _, number = group.name.rpartition(" expert ")
            assert int(number) == group.expert
            assert set(group.tensors) < whole[name] or weights.config.ssm_experts(0) == 1


def test_a_file_is_read_back_and_belongs_to_its_model(tmp_path: Path, weights: Weights) -> None:
    np.save(tmp_path / "ids.npy", ids(600).tokens)
    text = Text.from_ids(tmp_path / "ids.npy")
    found = sensitivity(weights, tmp_path / "s.json", text=[text], recipes=["int4"], tokens=512)
    values = json.loads((tmp_path / "s.json").read_text())
    assert Sensitivities.from_json(values, where="s.json") == found
    ledger = quantize(weights, tmp_path / "out", budget="10.5bpw", sensitivities=tmp_path / "s.json", text=[text])
    assert ledger.calibrated is not None
    assert (ledger.calibrated.budget, ledger.calibrated.losses) == ("10.5bpw", "measured")
    assert ledger.calibrated.kl == ledger.calibrated.rounded_kl > 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["text"]["calibration"] == [text.sha256]
    with pytest.raises(InputError, match="of another model"):
        replace(found, model={}).check(weights)
    with pytest.raises(InputError, match="exists already"):
        sensitivity(weights, tmp_path / "s.json", text=[text])
    (tmp_path / "s.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match="mossquant sensitivity"):
        quantize(weights, tmp_path / "again", sensitivities=tmp_path / "s.json")


def test_a_text_of_one_token_is_refused(weights: Weights) -> None:
    with pytest.raises(InputError, match="two or more"):
        losses_of(weights, [INT4], ids(1))


@pytest.mark.parametrize(("method", "operation"), [("measured", 60), ("estimated", 20)])
def test_killed_and_resumed(method: str, operation: int, tmp_path: Path) -> None:
    """Each run goes on where the one before was killed; the file is the same, and nothing else is left."""
    config = replace(CONFIGS["mamba"], vocab_size=256, num_hidden_layers=1)
    model = write_model(tmp_path / "model", random_model(config, dtype=torch.float32))
    (tmp_path / "a.txt").write_bytes(np.random.default_rng(0).integers(32, 127, 3000).astype(np.uint8).tobytes())
    words = ["sensitivity", model, "--text", tmp_path / "a.txt", "--tokens", 1024, "--method", method, "--threads", 1]
    assert command(*words, "-o", tmp_path / "whole.json").status == 0
    (place := tmp_path / "place").mkdir()
    words += ["-o", place / "out.json"]
    for killed in range(20):
        if not os.WIFSIGNALED(forked(*words, before=die_at(operation, place))):
            break
        assert not (place / "out.json").exists()
        if killed == 0:
            (other := tmp_path / "b.txt").write_bytes((tmp_path / "a.txt").read_bytes()[::-1])
            changed = [other if word == tmp_path / "a.txt" else word for word in words]
            for another in ([*words, "--recipe", "int8"], changed, [*words, "--tokens", 768]):
                assert "belongs to another model" in refused(place, *another)
            damaged = json.loads((place / "out.json.measuring").read_text())
            damaged["windows"], damaged["squares"] = 1, [0.5]
            whole = (place / "out.json.measuring").read_bytes()
            (place / "out.json.measuring").write_text(json.dumps(damaged))
            assert "is damaged" in refused(place, *words)
            (place / "out.json.measuring").write_bytes(whole)
    assert 1 < killed < 19
    assert (place / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [path.name for path in place.iterdir()] == ["out.json"]
