# SPDX-License-Identifier: Apache-2.0
"""Errors of decays against a dense search over time steps, and the time steps against the scan's own."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bounds import SAME_SUM_FLOAT64
from small import CONFIGS, random_model, random_tokens, write_model

from mossquant.calibration.decays import decay_error, decay_errors, steps_seen
from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import value
from mossquant.model.forward import Forward
from mossquant.model.scan import SCANS
from mossquant.plan.entries import DecayError
from mossquant.text.text import Text


def test_the_summit_or_the_nearer_end() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = -torch.exp(2 * torch.randn(40, 6, generator=generator, dtype=torch.float64))
    other = decay * (1 + 0.1 * torch.randn(40, 6, generator=generator, dtype=torch.float64))
    other[:, 5] = decay[:, 5]
    low = torch.exp(torch.randn(40, generator=generator, dtype=torch.float64) - 4)
    high = low * torch.exp(3 * torch.rand(40, generator=generator, dtype=torch.float64))
    found = decay_error(decay, other, low, high)
    deltas = low[:, None] * (high / low)[:, None] ** torch.linspace(0, 1, 4001, dtype=torch.float64)
    curves = [torch.exp(deltas[:, None, :] * rates[..., None]) for rates in (decay, other)]
    searched = (curves[0] - curves[1]).abs().amax(-1)
    assert not found[:, 5].any()
    assert bool((found >= searched - SAME_SUM_FLOAT64).all())
    # Between two neighbours of the search a summit is missed by less than its curve bends: (1e-3)² of it.
    assert bool((found <= searched * (1 + 1e-6) + SAME_SUM_FLOAT64).all())


def test_the_steps_are_those_of_the_scan_and_the_errors_those_of_the_worst(tmp_path: Path) -> None:
    model = random_model(CONFIGS["experts"])
    batches = [random_tokens(model.config, 2, 19, seed=seed) for seed in range(2)]
    steps = steps_seen(model, batches)
    recorded: list[torch.Tensor] = []
    plain = SCANS["sequential"]
    try:
        SCANS["sequential"] = lambda *inputs: (recorded.append(F.softplus(inputs[1])), plain(*inputs))[1]
        for tokens in batches:
            model(tokens, run=Forward(scan="sequential"))
    finally:
        SCANS["sequential"] = plain
    assert list(steps) == [f"backbone.layers.{layer}.mixer.A_log" for layer in (0, 1)]
    for layer, (low, high) in enumerate(steps.values()):
        own = torch.cat(recorded[layer::2], 1).flatten(0, 1)
        torch.testing.assert_close(low, own.amin(0))
        torch.testing.assert_close(high, own.amax(0))
    write_model(tmp_path / "model", model)
    quantize(tmp_path / "model", tmp_path / "int8", recipe="int8")
    original, rounded = (open_weights(tmp_path / name, verb="the test") for name in ("model", "int8"))
    errors = decay_errors(original, rounded, steps)
    for name, (low, high) in steps.items():
        deltas = low[:, None] * (high / low)[:, None] ** torch.linspace(0, 1, 200, dtype=torch.float64)
        decays = [-torch.exp(value(weights, name).double())[..., None] for weights in (original, rounded)]
        searched = [torch.exp(deltas[:, None, :] * rates) for rates in decays]
        largest, apart = errors[name].largest, (searched[0] - searched[1]).abs().amax(-1)
        assert 0.99 * largest < float(apart.max()) <= largest + SAME_SUM_FLOAT64
        assert 0.99 * errors[name].mean < float(apart.mean()) <= errors[name].mean + SAME_SUM_FLOAT64
    assert all(found == DecayError(0, 0) for found in decay_errors(original, original, steps).values())


def test_the_ledger_says_it_where_text_is_given(tmp_path: Path) -> None:
    """Of what is stored in the end, by the time steps of what was learned from."""
    model = random_model(CONFIGS["mamba"])
    write_model(tmp_path / "model", model)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 53, 400))
    text = [Text.from_ids(tmp_path / "ids.npy")]
    ledger = quantize(tmp_path / "model", tmp_path / "out", recipe="int8-uniform", text=text)
    original, rounded = (open_weights(tmp_path / name, verb="the test") for name in ("model", "out"))
    learned = torch.from_numpy(np.load(tmp_path / "ids.npy"))[None, :256]
    expected = decay_errors(original, rounded, steps_seen(load_model(original), [learned]))
    assert {entry.name: entry.decay_error for entry in ledger.tensors if entry.decay_error is not None} == expected
    assert QuantizedCheckpoint.open(tmp_path / "out").plan == ledger
