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

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.locate import asset_folder
from mossquant.divergence import Predictions, kl
from mossquant.targets.export import export
from mossquant.targets.onnx.metadata import RUNTIME_MINIMUM
from mossquant.targets.onnx.runner import OnnxRunner
from mossquant.text.text import Tokenizer, bundled_text

PHONES = "1.27.0"
_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import onnxruntime
from mossquant.targets.onnx.runner import OnnxRunner
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


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model at int4, as `make demo` ships it, and with fp32 activations."""
    folder = tmp_path_factory.mktemp("tiny")
    quantize("tiny", folder / "int4", recipe="int4-uniform")
    return {
        "int8": export(folder / "int4", folder / "int8-onnx", activations="int8").program("onnx"),
        "fp32": export(folder / "int4", folder / "fp32-onnx", activations="fp32").program("onnx"),
    }


@pytest.mark.slow
def test_the_bundled_models_artifact_in_an_older_release(
    release: tuple[str, Path], tiny_int4: dict[str, Path], tmp_path: Path
) -> None:
    """With fp32 activations the same logits; with int8 ones rounding ties fall otherwise, at most at their own cost."""
    tokenizer = Tokenizer.from_file(asset_folder("tiny") / "tokenizer.json")
    tokens = tokenizer.encode(bundled_text("heldout").data[:4000])[:512].reshape(8, 64)
    np.save(tmp_path / "tokens.npy", tokens)
    expected, found = {}, {}
    for activations, program in tiny_int4.items():
        arguments = [str(release[1]), release[0], str(program), str(tmp_path / "tokens.npy"), str(tmp_path / "y.npy")]
        subprocess.run([sys.executable, "-c", _RUN, *arguments], check=True)
        runner = OnnxRunner(program, threads=1)
        expected[activations], _ = runner(tokens, runner.initial_state(8), logits="all")
        found[activations] = np.load(tmp_path / "y.npy")
    for logits in found["fp32"]:
        assert np.median(relative(logits, expected["fp32"])) <= ONNX_INT8_MEDIAN
    cost = kl(Predictions(expected["fp32"]), Predictions(expected["int8"])).mean()
    for logits in found["int8"]:
        assert kl(Predictions(expected["int8"]), Predictions(logits)).mean() <= cost
