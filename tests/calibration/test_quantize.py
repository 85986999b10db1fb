# SPDX-License-Identifier: Apache-2.0
"""`quantize` from end to end: bytes as predicted, the same every time, nothing left behind, bad input refused."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import CONFIGS, random_model, write_model

from mossquant.calibration.quantize import disk_bytes, memory_bytes, quantize
from mossquant.calibration.sensitivity import sensitivity
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import value
from mossquant.errors import InputError
from mossquant.plan.recipe import Recipe
from mossquant.text.text import Text


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few and small tensors. Not to be changed: copy it first."""
    return write_model(tmp_path_factory.mktemp("models") / "mamba", random_model(CONFIGS["mamba"], dtype=torch.float32))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("int4", torch.bfloat16), ("int8", torch.float32), ("int4-uniform", torch.float16)]
)
@pytest.mark.parametrize("config", CONFIGS)
def test_predicted_is_written_to_the_byte(config: str, dtype: torch.dtype, recipe: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[config], dtype=torch.float32)
    source = write_model(tmp_path / "model", model, dtype=dtype)
    ledger = quantize(source, tmp_path / "out", recipe=recipe)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    payload = sum(tensor.nbytes for name, tensor in stored.items() if not name.endswith("_shape"))
    assert payload == ledger.predicted_bytes
    plan = quantize(source, tmp_path / "none", recipe=recipe, dry_run=True)
    assert [entry.predicted_bytes for entry in plan.tensors] == [entry.written_bytes for entry in ledger.tensors]
    assert not (tmp_path / "none").exists()
    folder_bytes = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert folder_bytes <= disk_bytes(plan)
    assert memory_bytes(plan) > max(entry.stored_bytes for entry in plan.tensors)
    opened = QuantizedCheckpoint.open(tmp_path / "out")
    assert (opened.config, opened.plan) == (CONFIGS[config], ledger)


def test_errors_in_the_ledger(checkpoint_folder: Path, quantized_folder: Path) -> None:
    """Against a direct computation from the two folders; kept tensors have none."""
    before, after = Checkpoint.open(checkpoint_folder), QuantizedCheckpoint.open(quantized_folder)
    for entry in after.plan.tensors:
        exact, found = before.kept(entry.name).double(), value(after, entry.name).double()
        assert found.shape == exact.shape
        error = ((found - exact).norm() / exact.norm()).item()
        assert entry.relative_error == pytest.approx(error, rel=bounds.SUM_ROUNDING, abs=1e-12)
        if entry.kept is not None:
            assert torch.equal(found, exact)
        else:
            assert 0 < error < 0.2


def test_same_bytes_twice(checkpoint_folder: Path, quantized_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint_folder, tmp_path / "elsewhere")
    quantize(moved, tmp_path / "again", recipe="int4-uniform")
    assert digests(tmp_path / "again") == digests(quantized_folder)
    written = b"".join(path.read_bytes() for path in (tmp_path / "again").glob("*.json"))
    assert str(tmp_path).encode() not in written


def test_shards_hold_the_same_tensors(mamba: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(mamba, tmp_path / "one", recipe="int8-uniform")
    monkeypatch.setattr("mossquant.checkpoint.tensorfiles.ONE_FILE_BYTES", 2_000)
    monkeypatch.setattr("mossquant.checkpoint.tensorfiles.SHARD_BYTES", 3_000)
    quantize(mamba, tmp_path / "many", recipe="int8-uniform")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (QuantizedCheckpoint.open(tmp_path / name) for name in ("one", "many"))
    for name in one.specs:
        assert torch.equal(value(one, name), value(many, name))


def test_copies_tokenizer_and_training(mamba: Path, tmp_path: Path) -> None:
    source = shutil.copytree(mamba, tmp_path / "model")
    seen = hashlib.sha256(b"text").hexdigest()
    (source / "training.json").write_text(json.dumps({"version": 1, "text": [{"name": "a", "sha256": seen}]}))
    (source / "tokenizer.json").write_text("{}")
    quantize(source, tmp_path / "out")
    opened = QuantizedCheckpoint.open(tmp_path / "out")
    assert opened.origin.tokenizer == tmp_path / "out" / "tokenizer.json"
    assert opened.origin.seen_text == (seen,)
    assert opened.manifest.parent.files == Checkpoint.open(source).origin.files


def test_progress_reaches_the_end(mamba: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    ledger = quantize(mamba, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == [entry.name for entry in ledger.tensors]
    assert steps[-1][1] == steps[-1][2] == ledger.parameters
    assert all(earlier[1] < later[1] for earlier, later in pairwise(steps))


def test_solver_of_the_recipe_is_used(mamba: Path, tmp_path: Path) -> None:
    text = Recipe.named("int4-uniform").text
    (tmp_path / "plain.yaml").write_text(text.replace("solver: nearest-mse", "solver: nearest"))
    plain = quantize(mamba, tmp_path / "plain", recipe=tmp_path / "plain.yaml")
    clipped = quantize(mamba, tmp_path / "clipped", recipe="int4-uniform")
    for a, b in zip(plain.tensors, clipped.tensors, strict=True):
        assert (a.solver, b.solver) == ((None, None) if a.kept else ("nearest", "nearest-mse"))
        assert b.relative_error is not None
        assert a.relative_error is not None
        assert b.relative_error <= a.relative_error * (1 + bounds.SUM_ROUNDING)


def refused(model: Path | str, output: Path, message: str, *, recipe: str | Path = "int4") -> None:
    """Refused with one line, and nothing left beside what was there."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(InputError) as caught:
        quantize(model, output, recipe=recipe)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.iterdir()) == before


def test_refusals(mamba: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(tmp_path / "none", out, "does not exist")
    refused(mamba, out, "unknown recipe 'int5'", recipe="int5")
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(tmp_path / "model.onnx", out, "is of kind 'onnx', but quantize needs: checkpoint")
    quantize(mamba, out)
    refused(out, tmp_path / "again", "is of kind 'quantized checkpoint', but quantize needs: checkpoint")
    refused(mamba, out, "exists already")
    quantize(mamba, out, force=True, recipe="int8-uniform")
    assert QuantizedCheckpoint.open(out).origin.recipe == "int8-uniform"


def test_a_dry_run_tells_and_refuses_what_a_run_would(mamba: Path, quantized_folder: Path, tmp_path: Path) -> None:
    """Memory with the model on text, a text that is missing, a budget that nothing is left to spend on."""
    (tmp_path / "text.txt").write_text("a text that is not read")
    said: list[str] = []
    uniform = Recipe.named("int4-uniform").text.replace("weights:", "budget: 2bpw\nweights:", 1)
    (tmp_path / "mine.yaml").write_text(uniform)
    asked: dict[str, Any] = {"recipe": tmp_path / "mine.yaml", "recover": 100, "dry_run": True, "said": said.append}
    quantize(mamba, tmp_path / "out", text=[tmp_path / "text.txt"], **asked)
    assert any("its budget of 2bpw is not spent" in line for line in said)
    assert any(line.startswith("running the model on text takes about ") for line in said)
    quantize(mamba, tmp_path / "out", **asked)
    assert said[-1].startswith("without --dry-run this is refused: ")
    with pytest.raises(InputError, match="lies in a checkpoint or artifact"):
        quantize(mamba, quantized_folder / "sub")


def test_refused_by_a_target(checkpoint_folder: Path, tmp_path: Path) -> None:
    text = Recipe.named("int4-uniform").text.replace('role: "*.router", keep: fp32', 'role: "*.router", format: int8')
    (tmp_path / "mine.yaml").write_text(text)
    refused(checkpoint_folder, tmp_path / "out", "onnx holds no codes for", recipe=tmp_path / "mine.yaml")


def test_no_room(checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(checkpoint_folder, tmp_path / "out", "MB free")


def test_no_room_is_said_before_anything_is_measured(
    mamba: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(50))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("mossquant.calibration.quantize.losses_of", lambda *given, **more: pytest.fail("measured"))
    with pytest.raises(InputError, match="MB free"):
        quantize(mamba, tmp_path / "out", budget="12bpw", text=[Text.from_ids(tmp_path / "ids.npy")])


def test_blocks_of_rows_change_nothing(mamba: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales of a few rows at a time, and of the whole matrix."""
    for name, weights in (("blocks", 500), ("whole", 1 << 30)):
        monkeypatch.setattr("mossquant.files.space.BLOCK_WEIGHTS", weights)
        quantize(mamba, tmp_path / name)
    blocks, whole = (digests(tmp_path / name)["model.safetensors"] for name in ("blocks", "whole"))
    assert blocks == whole


def test_what_text_entered_is_told(mamba: Path, tmp_path: Path) -> None:
    """Under the text's name without its folder, also by sensitivities alone; a text is no snapshot, and stays."""
    np.save(tmp_path / "out.recovering.safetensors.npy", np.random.default_rng(0).integers(0, 53, 400))
    text = Text.from_ids(tmp_path / "out.recovering.safetensors.npy")
    found = sensitivity(mamba, tmp_path / "s.json", text=[text], recipes=["int4"], tokens=256)
    ledger = quantize(mamba, tmp_path / "by-file", budget="12bpw", sensitivities=found)
    assert ledger.calibrated is not None
    assert (ledger.calibrated.text, ledger.calibrated.kl) == (Path(text.name).name, None)
    assert ledger.calibrated.frontier
    assert QuantizedCheckpoint.open(tmp_path / "by-file").origin.calibration_text == (text.sha256,)
    kept = tmp_path / "out.recovering.safetensors"
    kept.write_bytes(b"of a user")
    quantize(mamba, tmp_path / "out", recipe="int4-uniform", text=[text])
    assert kept.read_bytes() == b"of a user"
    with pytest.raises(InputError, match="is not a snapshot"):
        quantize(mamba, tmp_path / "out", recipe="int4-uniform", text=[text], recover=10, force=True)


def test_recovery_with_planned_activations(mamba: Path, tmp_path: Path) -> None:
    """By the recipe or by who asks, who is stronger; the ledger says which, and files without the key stay as read."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 53, 400))
    text = [Text.from_ids(tmp_path / "ids.npy")]
    written = Recipe.named("int4-uniform").text.replace("weights:", "recover_activations: planned\nweights:", 1)
    (tmp_path / "planned.yaml").write_text(written)

    def made(name: str, recipe: str | Path, **asked: Any) -> tuple[str | None, str]:
        calibrated = quantize(mamba, tmp_path / name, recipe=recipe, text=text, recover=200, **asked).calibrated
        assert calibrated is not None
        assert QuantizedCheckpoint.open(tmp_path / name).plan.calibrated == calibrated
        return calibrated.recovered_activations, digests(tmp_path / name)["model.safetensors"]

    planned = made("planned", tmp_path / "planned.yaml")
    assert planned == made("asked", "int4-uniform", recover_activations="planned")
    assert planned[0] == "planned"
    exact = made("fp32", tmp_path / "planned.yaml", recover_activations="fp32")
    assert exact[0] == "fp32"
    assert exact[1] != planned[1]
    ledger = quantize(mamba, tmp_path / "none", recipe=tmp_path / "planned.yaml", text=text)
    assert "recovered_activations" not in ledger.to_json()["calibrated"]
    with pytest.raises(InputError, match="unknown activation mode 'int8'"):
        quantize(mamba, tmp_path / "bad", text=text, recover=10, recover_activations="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="without recovery"):
        quantize(mamba, tmp_path / "bad", text=text, recipe="int4-uniform", recover_activations="planned")


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["mamba"], dtype=torch.float32)
    next(model.blocks).norm.mul_(3e37)
    source = write_model(tmp_path / "model", model)
    np.save(tmp_path / "ids.npy", np.arange(50))
    with pytest.raises(InputError, match="overflows fp32"):
        quantize(source, tmp_path / "out", recipe="int4-uniform", text=[Text.from_ids(tmp_path / "ids.npy")])
    assert not (tmp_path / "out").exists()
