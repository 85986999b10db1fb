# SPDX-License-Identifier: Apache-2.0
"""The reference Runner keeps the protocol's promises, on every kind of model."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from bounds import FORMS_FLOAT64
from numpy.typing import NDArray
from small import CONFIGS, SMALL, random_model, random_tokens, write_model

from mossquant.errors import InputError
from mossquant.model.forward import Forward
from mossquant.model.routing import Routing
from mossquant.targets.torch import runner as module
from mossquant.targets.torch.runner import TorchRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts of both kinds."""
    return write_model(tmp_path_factory.mktemp("runner") / "model", random_model(SMALL))


def _tokens(batch: int, time: int) -> NDArray[np.int64]:
    return random_tokens(SMALL, batch, time).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    runner = TorchRunner.open(write_model(tmp_path / "model", model), dtype=torch.float64)
    tokens = random_tokens(CONFIGS[name], 2, 9)
    expected, _ = model(tokens, run=Forward(scan="sequential"))
    found, _ = runner(tokens.numpy(), runner.initial_state(2), logits="all")
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=FORMS_FLOAT64)


def test_info_says_what_it_is(folder: Path) -> None:
    info = TorchRunner.open(folder).info
    assert (info.path, info.kind, info.activations, info.state_format) == (str(folder), "checkpoint", "fp32", "fp32")
    assert info.weights == "float32"
    assert info.weight_bytes == 4 * info.parameters
    assert info.bits_per_weight == 32
    assert info.file_bytes == (folder / "model.safetensors").stat().st_size
    assert set(info.files) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("wanted", ["all", "last"])
def test_a_long_prefill_in_pieces_equals_one_piece(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: Literal["all", "last"]
) -> None:
    runner = TorchRunner.open(folder, dtype=torch.float64)
    whole, after = runner(_tokens(2, 33), runner.initial_state(2), logits=wanted)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 16)  # eight tokens at a time; the last piece is a single step
    cut, cut_after = runner(_tokens(2, 33), runner.initial_state(2), logits=wanted)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=FORMS_FLOAT64)
    for name, value in runner.read(after).items():
        np.testing.assert_allclose(runner.read(cut_after)[name], value, rtol=0, atol=1e-6)


def test_margins_are_the_smallest_over_the_routers(folder: Path) -> None:
    runner, tokens = TorchRunner.open(folder), _tokens(2, 5)
    logits: dict[str, NDArray[np.float32]] = {}

    def watch(name: str, routing: Routing) -> Routing:
        assert routing.logits is not None
        logits[name] = routing.logits.numpy()
        return routing

    runner._forward = replace(runner._forward, reroute=watch)
    runner(tokens, runner.initial_state(2), logits="all")
    _, _, margins = runner.run_with_margins(tokens, runner.initial_state(2))
    ordered = [-np.sort(-value, -1) for value in logits.values()]
    expected = np.min([value[..., 1] - value[..., 2] for value in ordered], 0).reshape(2, 5)
    assert margins.shape == (2, 5)
    np.testing.assert_allclose(margins, expected, rtol=0, atol=1e-6)


def test_margins_without_routers_are_infinite(tmp_path: Path) -> None:
    runner = TorchRunner.open(write_model(tmp_path / "mamba", random_model(CONFIGS["mamba"])))
    assert np.isinf(runner.run_with_margins(_tokens(1, 3), runner.initial_state())[2]).all()


def test_another_model_of_the_activations(folder: Path) -> None:
    runner, tokens = TorchRunner.open(folder), _tokens(1, 8)
    seen: set[str] = set()

    def halves(name: str, x: torch.Tensor) -> torch.Tensor:
        seen.add(name)
        return x / 2

    other = runner.with_activation(halves, name="halves")
    assert other.info.activations == "halves"
    expected, _ = runner(tokens, runner.initial_state())
    found, _ = other(tokens, other.initial_state())
    assert np.abs(found - expected).max() > 0.1
    assert "backbone.embeddings.weight" in seen


def test_an_unquantized_checkpoint_plans_no_activations(folder: Path) -> None:
    with pytest.raises(InputError, match="has no planned activations"):
        TorchRunner.open(folder, activations="planned")
