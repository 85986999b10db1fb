# SPDX-License-Identifier: Apache-2.0
"""An artifact computes the same in older releases of onnxruntime: the newest in phone packages, and the oldest."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bounds import ONNX_INT8_MEDIAN
from lowered import Workshop, relative

from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM

PHONES = "1.27.0"
_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import onnxruntime
from mossquant.targets.onnx import OnnxRunner
assert onnxruntime.__version__ == sys.argv[2], onnxruntime.__version__
tokens = np.load(sys.argv[4])
runner = OnnxRunner(sys.argv[3], threads=1)
state, steps = runner.initial_state(len(tokens)), []
whole, _ = runner(tokens, runner.initial_state(len(tokens)), logits="all")
for time in range(tokens.shape[1]):
    step, state = runner(tokens[:, time : time + 1], state)
    steps.append(step)
np.save(sys.argv[5], np.stack([whole, np.concatenate(steps, 1)]))
"""


@pytest.fixture(scope="module", params=[PHONES, RUNTIME_MINIMUM])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A release of onnxruntime in a folder of its own."""
    folder, wanted = tmp_path_factory.mktemp("onnxruntime"), str(request.param)
    command = ["install", "--quiet", "--no-deps", "--target", str(folder), f"onnxruntime=={wanted}"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no package of onnxruntime {wanted} for this Python")
    return wanted, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"), [("wide", "int4"), ("experts", "int8"), ("wide", "mixed"), ("wide", None)]
)
def test_an_older_release(
    workshop: Workshop, release: tuple[str, Path], tmp_path: Path, model: str, recipe: str | None
) -> None:
    lowered = workshop(model, recipe)
    tokens = lowered.tokens(2, 12)
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [
        str(release[1]),
        release[0],
        str(lowered.artifact),
        str(tmp_path / "tokens.npy"),
        str(tmp_path / "y.npy"),
    ]
    subprocess.run([sys.executable, "-c", _RUN, *arguments], check=True)
    expected, _ = lowered.runner(tokens, lowered.runner.initial_state(2), logits="all")
    for found in np.load(tmp_path / "y.npy"):
        assert np.median(relative(found, expected)) <= ONNX_INT8_MEDIAN


def test_pip_is_there() -> None:
    """The slow tests skip where a package is missing, never for want of pip."""
    assert importlib.util.find_spec("pip") is not None
