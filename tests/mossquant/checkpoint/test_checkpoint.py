# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: round trips in every stored type, and every tensor checked against the config, all offenders at once."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CONFIGS, SMALL, random_model, random_tokens, write_model
from torch import Tensor

from mossquant.checkpoint import tensorfiles
from mossquant.checkpoint.checkpoint import Checkpoint, load_model, seen_text, write_checkpoint
from mossquant.errors import InputError
from mossquant.model.config import PRESETS
from mossquant.model.mossnet import parameter_count, tensor_specs

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", random_model(SMALL))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind])
    checkpoint = Checkpoint.open(write_model(tmp_path / "model", model, dtype=dtype))
    assert checkpoint.config == CONFIGS[kind]
    assert checkpoint.torch_dtype == str(dtype).removeprefix("torch.")
    assert list(checkpoint.specs) == [spec.name for spec in tensor_specs(CONFIGS[kind])]
    assert checkpoint.origin.parameters == parameter_count(CONFIGS[kind])
    assert checkpoint.origin.payload_bytes == checkpoint.origin.parameters * dtype.itemsize
    for name, spec in checkpoint.specs.items():
        assert torch.equal(checkpoint.kept(name), model.parameter_of(spec).to(dtype)), name
        assert checkpoint.kept(name).dtype == dtype
        assert checkpoint.kept(name).nbytes == spec.count * dtype.itemsize
    tokens = random_tokens(checkpoint.config, 2, 12)
    again = load_model(checkpoint, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_shards_read_like_one_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfiles, "ONE_FILE_BYTES", 10_000)
    monkeypatch.setattr(tensorfiles, "SHARD_BYTES", 10_000)
    one = Checkpoint.open(folder)
    shards = Checkpoint.open(write_model(tmp_path / "shards", load_model(one)))
    files = sorted(path.name for path in shards.folder.iterdir())
    assert files[:3] == ["config.json", "model-00001.safetensors", "model-00002.safetensors"]
    assert files[-1] == "model.safetensors.index.json"
    assert all(torch.equal(one.kept(name), shards.kept(name)) for name in one.specs)
    assert sorted(shards.origin.files) == files
    for name, digest in shards.origin.files.items():
        assert digest == hashlib.sha256((shards.folder / name).read_bytes()).hexdigest()
    (shards.folder / "model-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002\.safetensors is missing"):
        Checkpoint.open(shards.folder)


def test_what_else_lies_in_the_folder(tmp_path: Path) -> None:
    model, folder = random_model(SMALL), tmp_path / "model"
    folder.mkdir()
    training = {"version": 1, "text": [{"name": "a", "sha256": "12" * 32}, {"name": "b", "sha256": "34" * 32}]}
    write_checkpoint(folder, SMALL, model.parameter_of, dtype=torch.bfloat16, training=training)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.origin.training_text == ("12" * 32, "34" * 32)
    assert checkpoint.origin.tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    assert Checkpoint.open(folder).origin.tokenizer == folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2, "text": []}', "version 2 was written by"),
        ('{"version": 1, "text": [{"sha256": "none"}]}', "is not a record that says which texts were seen"),
        ("{", r"training\.json is not JSON"),
    ],
)
def test_a_broken_training_record(tmp_path: Path, content: str, message: str) -> None:
    assert seen_text(tmp_path) == ()
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(InputError, match=message):
        seen_text(tmp_path)


def test_routers_may_stay_in_fp32(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model(SMALL), dtype=torch.bfloat16)
    name = "backbone.layers.0.mlp.router.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.kept(name).dtype == torch.float32
    assert checkpoint.origin.payload_bytes == 2 * (checkpoint.origin.parameters + checkpoint.specs[name].count)


ONE = "backbone.layers.1.mixer.experts.2.x_proj.weight"
TWO = "backbone.norm_f.weight"

# name: (what is done to the tensors, what the message says)
BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(ONE), f"{ONE} is missing"),
    "unexpected": (lambda t: t.update({"lm_head.weight": torch.zeros(53, 20)}), "lm_head.weight is unexpected"),
    "another shape": (lambda t: t.update({ONE: t[ONE][:-1].clone()}), f"{ONE} has shape [12, 40], needs [13, 40]"),
    "integers": (lambda t: t.update({ONE: t[ONE].to(torch.int8)}), f"{ONE} has dtype I8"),
    "NaN": (lambda t: t[ONE].view(-1)[-1:].fill_(float("nan")), f"{ONE} holds NaN or infinite values"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_tensor_that_does_not_fit(how: str, folder: Path) -> None:
    change, message = BROKEN[how]
    change_tensors(folder, change)
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_offenders_at_once(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors[ONE]
        tensors["odd\nname"] = torch.zeros(1)
        tensors[TWO] = torch.zeros(21)
        tensors["backbone.embeddings.weight"] = tensors["backbone.embeddings.weight"].bfloat16()

    change_tensors(folder, change)
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder)
    for part in (
        f"{ONE} is missing",
        "odd\\nname is unexpected",
        f"{TWO} has shape [21]",
        "embeddings.weight has dtype bfloat16",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_that_does_not_fit_the_tensors(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        Checkpoint.open(folder)
    change_config(folder, num_ssm_experts=5, tie_word_embeddings=True)
    with pytest.raises(InputError) as error:
        Checkpoint.open(folder)
    for part in (
        "mixer.experts.4.x_proj.weight is missing",
        "has shape [4, 20], needs [5, 20]",
    ):
        assert part in str(error.value)


def test_the_largest_config_that_is_allowed_is_refused_in_time(folder: Path) -> None:
    change_config(folder, num_hidden_layers=64, num_ssm_experts=64, num_mlp_experts=64)
    start = time.process_time()
    with pytest.raises(InputError, match=r"and \d+ more"):
        Checkpoint.open(folder)
    assert time.process_time() - start < 10


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={})
    with pytest.raises(InputError, match="is quantized already"):
        Checkpoint.open(folder)


def test_a_large_preset_is_not_allocated_to_be_listed() -> None:
    names = [spec.name for spec in tensor_specs(replace(PRESETS["8x1.5b"], num_hidden_layers=2))]
    assert len(names) == len(set(names)) == 2 + 2 * (8 + 3 * 8 + 1 + 3 * 8 + 1)
