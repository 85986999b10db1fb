# SPDX-License-Identifier: Apache-2.0
"""Mamba checkpoints of both layouts, brought in with what lies beside them; everything else is refused by name."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from mambas import hugging_face, save_hugging_face, save_original
from safetensors.torch import load_file, save_file
from small import SMALL, random_model, write_model
from tokenizers import models
from torch import Tensor
from transformers import MambaForCausalLM

from mossquant.checkpoint import tensorfiles
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.importing.mamba import import_mamba

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = hugging_face({"hidden_size": 40, "num_hidden_layers": 2})
    return save_hugging_face(model, tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def source(source_once: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder that a test may change."""
    return Path(shutil.copytree(source_once, tmp_path / "hf"))


@pytest.fixture(scope="module")
def original_once(source_once: Path) -> Path:
    return save_original(MambaForCausalLM.from_pretrained(source_once), source_once.parent / "original")


@pytest.fixture
def original_source(original_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_once, tmp_path / "original"))


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(source: Path, tmp_path: Path, *parts: str, **options: Any) -> None:
    """The import fails with one line that says all of `parts`, and leaves nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        import_mamba(source, tmp_path / "out", **options)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_and_pickles_read_like_one_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_mamba(source, tmp_path / "out")
    model = MambaForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shutil.copytree(source, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for layout in ("shards", "pickled"):
        import_mamba(tmp_path / layout, tmp_path / f"from {layout}")
        assert (tmp_path / f"from {layout}" / "model.safetensors").read_bytes() == (
            tmp_path / "out" / "model.safetensors"
        ).read_bytes()
    monkeypatch.setattr(tensorfiles, "ONE_FILE_BYTES", 20_000)
    monkeypatch.setattr(tensorfiles, "SHARD_BYTES", 20_000)
    import_mamba(source, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    many, one = Checkpoint.open(tmp_path / "many"), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(many.kept(name), one.kept(name)) for name in one.specs)


def test_stored_types(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    for asked in ("bfloat16", "float16", "float32"):
        done = import_mamba(source, tmp_path / asked, dtype=asked)
        assert done.torch_dtype == asked
        checkpoint = Checkpoint.open(tmp_path / asked)
        assert all(torch.equal(checkpoint.kept(n), tensors[n].to(getattr(torch, asked))) for n in checkpoint.specs)
    change_tensors(source, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    assert import_mamba(source, tmp_path / "kept").torch_dtype == "bfloat16"
    change_tensors(
        source, lambda t: t.update({name: value.float() for name, value in t.items() if name.endswith("A_log")})
    )
    mixed = import_mamba(source, tmp_path / "mixed")
    assert mixed.torch_dtype == "float32"
    assert "stored as float32, since the source mixes bfloat16 and float32" in mixed.notes
    change_tensors(source, lambda t: t.update({name: value.double() for name, value in t.items()}))
    refused(source, tmp_path, "is stored in float64", "--dtype float32")
    assert import_mamba(source, tmp_path / "rounded", dtype="float32").torch_dtype == "float32"
    refused(source, tmp_path, "unknown stored type 'int8'", dtype="int8")
    change_tensors(source, lambda t: t["backbone.norm_f.weight"][:1].fill_(1e5))
    refused(source, tmp_path, "backbone.norm_f.weight holds values too large for float16", dtype="float16")


# changes of a Hugging Face config → what the message says
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba2"}, "has model_type 'mamba2'; import takes a Mamba-1"),
    ({"model_type": None}, "has no model_type"),
    ({"hidden_act": "gelu"}, "hidden_act: input should be 'silu' or 'swish', not 'gelu'"),
    ({"intermediate_size": 48}, "intermediate_size is 48, expand · hidden_size is 80"),
    ({"quantization_config": {"bits": 4}}, "needs: checkpoint"),
    ({"vocab_size": 10**12}, "vocab_size: input should be less"),
]


@pytest.mark.parametrize(
    ("changes", "message"), UNSUPPORTED, ids=[f"{k}={v}" for c, _ in UNSUPPORTED for k, v in c.items()]
)
def test_unsupported_configs(changes: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    change_config(source, changes)
    refused(source, tmp_path, message)


UNSUPPORTED_ORIGINALS: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm": False}, "rms_norm: input should be true, not False"),
    ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer: input should be 'mamba1', not 'Mamba2'"),
    ({"ssm_cfg": {"headdim": 64}}, "unknown key ssm_cfg.headdim"),
    ({"pad_vocab_size_multiple": 16}, "backbone.embedding.weight has shape [104, 40], needs [112, 40]"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED_ORIGINALS)
def test_unsupported_originals(changes: dict[str, Any], message: str, original_source: Path, tmp_path: Path) -> None:
    change_config(original_source, changes)
    refused(original_source, tmp_path, message)


def test_the_originals_published_config(original_source: Path, tmp_path: Path) -> None:
    """As in mamba-130m, where the layer's settings are the code's own defaults."""
    change_config(original_source, {"ssm_cfg": {}, "tie_embeddings": None})
    config = import_mamba(original_source, tmp_path / "out").config
    assert (config.expand, config.state_size, config.conv_kernel, config.time_step_rank) == (2, 16, 4, 3)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)


def test_what_hugging_face_takes_for_granted(source: Path, tmp_path: Path) -> None:
    wanted = import_mamba(source, tmp_path / "one").config
    assert wanted.time_step_rank == 3, "⌈40 / 16⌉"
    defaults = (
        "expand",
        "state_size",
        "conv_kernel",
        "intermediate_size",
        "layer_norm_epsilon",
        "use_bias",
        "hidden_act",
    )
    change_config(source, {**dict.fromkeys(defaults), "tie_word_embeddings": None, "time_step_rank": "auto"})
    assert import_mamba(source, tmp_path / "two").config == wanted
    change_config(source, {"time_step_rank": None, "use_conv_bias": None})
    assert import_mamba(source, tmp_path / "three").config == wanted


def test_all_offending_keys_at_once(source: Path, tmp_path: Path) -> None:
    change_config(source, {"use_bias": True, "hidden_act": "relu", "state_size": -1, "vocab_size": None})
    refused(source, tmp_path, "use_bias: ", "hidden_act: ", "state_size: ", "vocab_size: field required")


def test_keys_without_effect_are_named(source: Path, tmp_path: Path) -> None:
    assert import_mamba(source, tmp_path / "out").notes == (
        "no tokenizer.json: the model takes token ids only, until it is imported with --tokenizer FILE",
    )
    change_config(source, {"surprise": 1})
    assert "keys of config.json that have no effect here: surprise" in import_mamba(source, tmp_path / "two").notes


def test_all_offending_tensors_at_once(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["backbone.layers.1.mixer.D"]
        tensors["backbone.layers.1.mixer.b_norm.weight"] = torch.zeros(3)
        tensors["backbone.norm_f.weight"] = torch.zeros(39)
        tensors["backbone.layers.0.mixer.dt_proj.bias"] = torch.zeros(80, dtype=torch.int32)

    change_tensors(source, change)
    at = "backbone.layers"
    refused(
        source,
        tmp_path,
        f"{at}.1.mixer.D is missing",
        f"{at}.1.mixer.b_norm.weight is unexpected",
        "norm_f.weight has shape [39], needs [40]",
        f"{at}.0.mixer.dt_proj.bias has dtype int32, needs float32",
    )


def test_nan_weights(source: Path, tmp_path: Path) -> None:
    change_tensors(
        source, lambda t: [value.view(-1)[-1:].fill_(float("nan")) for n, value in t.items() if n.endswith(".D")]
    )
    refused(source, tmp_path, "layers.0.mixer.D holds NaN", "layers.1.mixer.D holds NaN")


def test_a_tied_head_in_the_file(source: Path, tmp_path: Path) -> None:
    table = "backbone.embeddings.weight"
    change_tensors(source, lambda t: t.update({"lm_head.weight": t[table].clone()}))
    import_mamba(source, tmp_path / "same")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "same").specs
    change_tensors(source, lambda t: t["lm_head.weight"].view(-1)[-1:].add_(1))
    refused(source, tmp_path, f"lm_head.weight differs from {table}, though the config says that they are tied")
    change_config(source, {"tie_word_embeddings": False})
    import_mamba(source, tmp_path / "untied")
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "untied").specs


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_never_runs(original_source: Path, tmp_path: Path) -> None:
    weights = original_source / "pytorch_model.bin"
    good = torch.load(weights, weights_only=True)
    torch.save({**good, "extra": Runs(tmp_path / "owned")}, weights)
    refused(original_source, tmp_path, "holds more than tensors", "mkdir", "refused")
    weights.write_bytes(pickle.dumps(Runs(tmp_path / "owned")))
    refused(original_source, tmp_path, "is not a whole file of torch.save")
    (original_source / "model.safetensors").write_bytes(pickle.dumps(Runs(tmp_path / "owned")))
    refused(original_source, tmp_path, "is not a safetensors file")
    assert not (tmp_path / "owned").exists()


def test_damaged_pickles(original_source: Path, tmp_path: Path) -> None:
    """Cut, overwritten, or with records that are not what the zip says: one line; never weights that are none."""
    weights = original_source / "pytorch_model.bin"
    good = weights.read_bytes()
    with zipfile.ZipFile(weights) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}

    def zipped(kind: int, **change: bytes) -> bytes:
        with zipfile.ZipFile(weights, "w", kind) as file:
            for name, content in entries.items():
                file.writestr(name, change.get(name.rpartition("/")[2], content))
        return weights.read_bytes()

    at = good.index(entries["pytorch_model/data/1"])
    for damaged in (
        good[: len(good) // 2],
        b"PK\x03\x04",
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
        zipped(zipfile.ZIP_STORED, **{"1": entries["pytorch_model/data/1"][:-8]}),
        zipped(zipfile.ZIP_DEFLATED, **{"1": bytes(1 << 24)}),
        zipped(zipfile.ZIP_STORED, **{"data.pkl": entries["pytorch_model/data.pkl"][:-9]}),
    ):
        weights.write_bytes(damaged)
        refused(original_source, tmp_path, "is not a whole file of torch.save")


def test_a_training_record_that_is_none_is_not_taken_along(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", random_model(SMALL))
    (source / "training.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"training\.json is not a record that says which texts were seen"):
        import_mamba(source, tmp_path / "out", tokenizer=words(tmp_path / "t.json", 53))
    assert not (tmp_path / "out").exists()


def test_pickles_that_hold_something_else(original_source: Path, tmp_path: Path) -> None:
    weights = original_source / "pytorch_model.bin"
    good = torch.load(weights, weights_only=True)
    for content, message in (
        ([1, 2], "holds a list, not named tensors"),
        ({"model": good}, "model is no dense tensor on the CPU"),
        (
            {**good, "step": 3, "sparse": torch.eye(3).to_sparse()},
            "step is no dense tensor on the CPU; sparse is no dense",
        ),
        ({**good, "none": torch.empty(3, device="meta")}, "none is no dense tensor"),
        ({**good, 7: torch.zeros(1)}, "7 is unexpected"),
    ):
        torch.save(content, weights)
        refused(original_source, tmp_path, message)


def test_folders_without_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "holds neither model.safetensors nor pytorch_model.bin")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    refused(source, tmp_path, "in shards, which are not read; save the model as safetensors first")
    (source / "config.json").unlink()
    refused(source, tmp_path, "holds neither config.json")
    refused(tmp_path / "none", tmp_path, "does not exist")


def words(path: Path, entries: int) -> Path:
    library = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(entries)}, unk_token="w0"))
    library.save(str(path))
    return path


def test_tokenizers(source: Path, tmp_path: Path) -> None:
    given = words(tmp_path / "given.json", 104)
    done = import_mamba(source, tmp_path / "one", tokenizer=given)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert done.notes == ()
    refused(
        source,
        tmp_path,
        "large.json has tokens up to 104, and the model has a vocabulary of 104",
        tokenizer=words(tmp_path / "large.json", 105),
    )
    refused(source, tmp_path, "config.json is not a tokenizer.json", tokenizer=source / "config.json")
    refused(source, tmp_path, "none.json cannot be read", tokenizer=tmp_path / "none.json")
    own = words(source / "tokenizer.json", 50)
    import_mamba(source, tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == own.read_bytes()
    import_mamba(source, tmp_path / "three", tokenizer=given)
    assert (tmp_path / "three" / "tokenizer.json").read_bytes() == given.read_bytes()
    words(source / "tokenizer.json", 200)
    refused(source, tmp_path, "--tokenizer FILE")


def test_the_output_path(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(source, tmp_path, "out exists already; choose another output path or pass --force to replace it")
    import_mamba(source, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(InputError, match="is, holds or lies in the input"):
        import_mamba(source, source, force=True)


def test_a_mossnet_is_taken_to_add_a_tokenizer(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", random_model(SMALL))
    (source / "training.json").write_text(json.dumps({"version": 1, "text": [{"sha256": "12" * 32}]}))
    done = import_mamba(source, tmp_path / "out", tokenizer=words(tmp_path / "t.json", 53), dtype="bfloat16")
    checkpoint, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert (done.layout, done.torch_dtype, checkpoint.config) == ("mossnet", "bfloat16", SMALL)
    assert checkpoint.origin.training_text == ("12" * 32,)
    assert all(torch.equal(checkpoint.kept(name), before.kept(name).bfloat16()) for name in before.specs)
