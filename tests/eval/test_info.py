# SPDX-License-Identifier: Apache-2.0
"""`info` accounts for every byte, of checkpoints and of programs."""

import json
from pathlib import Path

import pytest
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.info import InfoReport, info
from mossquant.files.outputs import file_sha256, json_bytes
from mossquant.model.mossnet import parameter_count
from mossquant.targets.export import export


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, its int4 form and the .onnx of both."""
    above = tmp_path_factory.mktemp("info")
    folders = {"checkpoint": write_model(above / "model", random_model(SMALL)), "int4": above / "int4"}
    quantize(folders["checkpoint"], folders["int4"], recipe="int4-uniform")
    for name in ("checkpoint", "int4"):
        folders[f"{name} onnx"] = above / f"{name}-onnx"
        export(folders[name], folders[f"{name} onnx"])
    return folders


def _json(report: InfoReport) -> dict[str, object]:
    values: dict[str, object] = json.loads(json_bytes(report.to_json()))
    assert values["version"] == 1
    return values


def test_a_checkpoint(paths: dict[str, Path]) -> None:
    report = info(paths["checkpoint"])
    assert (report.kind, report.weights) == ("checkpoint", "float32")
    assert report.parameters == sum(row.weights for row in report.rows) == parameter_count(SMALL)
    assert report.weight_bytes == sum(row.bytes for row in report.rows) == 4 * report.parameters
    assert report.active_parameters < report.parameters
    assert len({(row.role, row.storage) for row in report.rows}) == len(report.rows)
    assert {row.role for row in report.rows} >= {"embedding", "ssm.expert.x_proj", "mlp.expert.w2"}
    assert _json(report)["bits_per_weight"] == 32


def test_a_quantized_checkpoint(paths: dict[str, Path]) -> None:
    report = info(paths["int4"])
    quantized = QuantizedCheckpoint.open(paths["int4"])
    assert (report.kind, report.weights) == ("quantized checkpoint", "int4-uniform")
    assert report.weight_bytes == sum(row.bytes for row in report.rows) == quantized.origin.payload_bytes
    assert [entry["name"] for entry in report.ledger] == list(quantized.specs)
    assert all(row.reason for row in report.rows)
    errors = {row.role: row.relative_error for row in report.rows if row.storage == "int4_g32"}
    assert errors
    assert all(error is not None and 0 < error < 0.2 for error in errors.values())
    # Matrices too narrow for a group are kept in this small model, and read their inputs in fp32.
    assert dict(report.facts)["activations"] == "fp32, int8_block"
    _json(report)


@pytest.mark.parametrize("name", ["checkpoint onnx", "int4 onnx"])
def test_every_byte_of_a_program_is_in_a_section(paths: dict[str, Path], name: str) -> None:
    report = info(paths[name])
    program = paths[name] / "model.onnx"
    assert report.kind == "onnx"
    assert report.program_bytes == sum(report.sections.values()) == program.stat().st_size
    sections = report.sections
    assert all(size >= 0 for size in sections.values())
    assert sections["nodes"] > 0
    values = sections["codes, padding included"] + sections["scales"] + sections["tensors kept in a float type"]
    assert values == report.weight_bytes
    assert (sections["scales"] > 0) == (name == "int4 onnx")
    assert report.files[0].sha256 == file_sha256(program)
    _json(report)


def test_external_weights_are_counted(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mossquant.targets.onnx import save as saving

    monkeypatch.setattr(saving, "EXTERNAL_ABOVE", 0)
    export(paths["checkpoint"], tmp_path / "external")
    report = info(tmp_path / "external")
    files = [path for path in (tmp_path / "external").iterdir() if path.name.startswith("model.onnx")]
    assert len(files) == len(report.files) == 2
    assert report.program_bytes == sum(path.stat().st_size for path in files)
    assert all(size >= 0 for size in report.sections.values())
