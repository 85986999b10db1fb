# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint whose recipe rounds states: it runs so, says so, and no target that cannot is given it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import FORMS_FLOAT64
from small import SMALL, random_model, random_tokens, write_model

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.eval.info import info
from mossquant.state_file import SavedState, load_state, save_state
from mossquant.targets.export import export
from mossquant.targets.torch.runner import TorchRunner

RECIPE = """\
version: 1
name: rounded
targets: [TARGETS]
weights:
  - {role: "*", keep: fp32, why: "the state alone"}
activations:
  - {role: "*", format: fp32}
state:
  - {role: ssm.ssm_state, format: int8}
  - {role: "*", format: fp32}
"""


def _recipe(folder: Path, targets: str = "torch") -> Path:
    path = folder / f"{targets}.yaml"
    path.write_text(RECIPE.replace("TARGETS", targets))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and beside it the same weights with SSM states in int8."""
    folder = tmp_path_factory.mktemp("states")
    write_model(folder / "model", random_model(SMALL))
    quantize(folder / "model", folder / "rounded", recipe=_recipe(folder))
    return folder


def test_it_says_what_its_states_are(folder: Path) -> None:
    assert TorchRunner.open(folder / "rounded").info.state_format == "fp32, int8"
    assert TorchRunner.open(folder / "rounded", dtype=torch.float64).info.state_format == "fp64, int8"
    E, N, W, layers = SMALL.d_inner, SMALL.state_size, SMALL.conv_kernel, SMALL.num_hidden_layers
    size = layers * (E * N + 4 * E + 4 * E * (W - 1))
    assert dict(info(folder / "rounded").facts)["state"] == f"fp32, int8, {size:,} bytes a stream"


def test_the_state_is_rounded_and_pieces_change_nothing(folder: Path) -> None:
    runner = TorchRunner.open(folder / "rounded", dtype=torch.float64)
    exact = TorchRunner.open(folder / "model", dtype=torch.float64)
    tokens = random_tokens(SMALL, 2, 30).numpy()
    whole, end = runner(tokens, runner.initial_state(2), logits="all")
    state, parts = runner.initial_state(2), []
    for start, stop in ((0, 1), (1, 12), (12, 13), (13, 30)):
        logits, state = runner(tokens[:, start:stop], runner.copy(state), logits="all")
        parts.append(logits)
    assert state.position == end.position == 30
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=FORMS_FLOAT64)
    carried = runner.read(end)["layers.1.mixer.ssm"].astype(np.float64)
    codes = carried / np.abs(carried).max(-1, keepdims=True) * 127
    np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=1e-4)
    free, _ = exact(tokens, exact.initial_state(2), logits="all")
    assert np.abs(free - whole).max() > FORMS_FLOAT64


def test_a_saved_state_goes_on_where_it_stood(folder: Path, tmp_path: Path) -> None:
    runner = TorchRunner.open(folder / "rounded")
    tokens = random_tokens(SMALL, 1, 20).numpy()
    logits, state = runner(tokens, runner.initial_state(1))
    save_state(tmp_path / "state", runner, SavedState(runner.copy(state), logits, 20))
    expected, after = runner(tokens, state)
    found, restored = runner(tokens, load_state(tmp_path / "state", runner).state)
    np.testing.assert_array_equal(found, expected)
    assert restored.position == after.position == 40
    for name, value in runner.read(after).items():
        np.testing.assert_array_equal(runner.read(restored)[name], value)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_no_other_target_is_given_it(folder: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(InputError, match=f"{target} cannot carry layers.0.mixer.ssm in int8"):
        quantize(folder / "model", tmp_path / "out", recipe=_recipe(tmp_path, target))
    with pytest.raises(InputError, match=f"{target} cannot carry layers.0.mixer.ssm in int8"):
        export(folder / "rounded", tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()
