# SPDX-License-Identifier: Apache-2.0
"""`verify` on real .onnx files: a faithful one passes, a changed nibble and another checkpoint's do not."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.eval.verify import verify
from mossquant.files.outputs import json_bytes
from mossquant.targets.export import export
from mossquant.text.text import Text

BYTES = replace(SMALL, vocab_size=256)
TEXT = Text.of("random text", bytes(range(256)) * 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level model as int4 checkpoint, and as .onnx with int8 and with fp32 activations."""
    above = tmp_path_factory.mktemp("verify")
    paths = {name: above / name for name in ("int4", "int8 activations", "fp32 activations")}
    quantize(write_model(above / "model", random_model(BYTES, seed=5)), paths["int4"], recipe="int4-uniform")
    export(paths["int4"], paths["int8 activations"])
    export(paths["int4"], paths["fp32 activations"], activations="fp32")
    return paths


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
    assert json.loads(json_bytes(report.to_json()))["artifacts"][0]["graph_compared"] is False


def test_bad_input(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no artifact was given"):
        verify(folders["int4"], [])
    with pytest.raises(InputError):
        verify(folders["int4"], [folders["int4"]])
    with pytest.raises(InputError, match="cannot be measured"):
        verify(folders["int4"], [folders["int8 activations"]], text=TEXT, positions=0)
