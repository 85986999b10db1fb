# SPDX-License-Identifier: Apache-2.0
"""`verify` on real .onnx files: a faithful one passes, a changed nibble and another checkpoint's do not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small import SMALL, random_model, write_model
from torch import Tensor

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.inputs import activation_model
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.eval.parity import parity_of
from mossquant.eval.verify import verify
from mossquant.files.outputs import json_bytes
from mossquant.runner import Floats, LogitsWanted, State, Tokens
from mossquant.targets.export import export
from mossquant.targets.onnx.runner import OnnxRunner
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Text

BYTES = replace(SMALL, vocab_size=256)
TEXT = Text.of("random text", bytes(range(256)) * 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level model as int4 checkpoint, and as .onnx with int8 and with fp32 activations."""
    above = tmp_path_factory.mktemp("verify")
    found = {name: above / name for name in ("int4", "int8 activations", "fp32 activations")}
    quantize(write_model(above / "model", random_model(BYTES, seed=5)), found["int4"], recipe="int4")
    export(found["int4"], found["int8 activations"])
    export(found["int4"], found["fp32 activations"], activations="fp32")
    return found


def test_artifacts_pass(folders: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    report = verify(
        folders["int4"],
        [folders["int8 activations"], folders["fp32 activations"]],
        text=TEXT,
        positions=160,
        stream=2000,
        threads=1,
        progress=lambda _, done, of: told.append((done, of)),
    )
    assert report.failures() == []
    assert report.passed
    assert told[-1] == (10, 10)
    values = json.loads(json_bytes(report.to_json()))
    assert [artifact["parity"]["activations"] for artifact in values["artifacts"]] == ["int8_block", "fp32"]
    assert all(artifact["weights"]["differences"] == [] for artifact in values["artifacts"])
    bounded = [check for check in values["artifacts"][1]["parity"]["checks"] if check["bound"] is not None]
    assert len(bounded) >= 8


def test_a_changed_code_fails_and_the_artifact_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(folders["int8 activations"] / "model.onnx")
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == "layers.0.mixer.in_proj")
    raw = bytearray(codes.raw_data)
    raw[3] ^= 0x10
    codes.raw_data = bytes(raw)
    changed = tmp_path / "changed"
    changed.mkdir()
    onnx.save(model, changed / "model.onnx")
    report = verify(folders["int4"], [changed], text=TEXT)
    assert not report.passed
    assert report.artifacts[0].parity is None
    assert any("layers.0.mixer.in_proj" in line for line in report.failures())


def test_weights_only_runs_nothing(folders: dict[str, Path]) -> None:
    report = verify(folders["int4"], [folders["int8 activations"]], weights_only=True)
    assert report.passed
    assert report.artifacts[0].parity is None
    assert ("graph", "not compared: nothing was run") in [row[1:3] for row in report.rows()]
    assert json.loads(json_bytes(report.to_json()))["artifacts"][0]["graph_compared"] is False


def test_bad_input(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no artifact was given"):
        verify(folders["int4"], [])
    with pytest.raises(InputError):
        verify(folders["int4"], [folders["int4"]])
    with pytest.raises(InputError, match="cannot be measured"):
        verify(folders["int4"], [folders["int8 activations"]], text=TEXT, positions=0)


class _Forgetful:
    """An .onnx whose state is not carried from call to call."""

    def __init__(self, inner: OnnxRunner) -> None:
        self._inner = inner
        self.info, self.initial_state = inner.info, inner.initial_state
        self.copy, self.read, self.write = inner.copy, inner.read, inner.write

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        found, _ = self._inner(tokens, state, logits=logits)
        return found, self._inner.initial_state(tokens.shape[0])


@pytest.mark.parametrize("fault", ["none", "one site in fp32", "state not carried"])
def test_a_model_of_other_arithmetic_does_not_fit_the_artifact(folders: dict[str, Path], fault: str) -> None:
    planned = activation_model(QuantizedCheckpoint.open(folders["int4"]))

    def one_site_in_fp32(name: str, x: Tensor) -> Tensor:
        return x if ".1.mixer.out_proj" in name else planned(name, x)

    plain = TorchRunner.open(folders["int4"])
    reference = plain.with_activation(one_site_in_fp32 if fault == "one site in fp32" else planned, name=fault)
    artifact = OnnxRunner(folders["int8 activations"], threads=1)
    tokens = np.frombuffer(TEXT.data, np.uint8)[:800].astype(np.int64)
    checks = parity_of(
        reference,
        _Forgetful(artifact) if fault == "state not carried" else artifact,
        tokens,
        positions=80,
        unquantized_activations=plain,
    )
    assert all(check.passed for check in checks) == (fault == "none")
