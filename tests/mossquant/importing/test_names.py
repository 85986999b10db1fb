# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under other names than our own: wrapped, or the base model alone; and misnamed ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mambas import hugging_face, save_hugging_face, save_original
from safetensors.torch import load_file, save_file
from small import SMALL, random_model, write_model
from torch import nn
from transformers import MambaForCausalLM, MambaModel

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.tensorfiles import NeededTensor, tensor_offenders
from mossquant.errors import InputError
from mossquant.importing.mamba import import_mamba
from mossquant.importing.names import plain_name

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in both layouts, and a MossNet with experts."""
    place = tmp_path_factory.mktemp("sources")
    model = hugging_face({"hidden_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": False})
    tied = hugging_face({"hidden_size": 40, "num_hidden_layers": 2})
    return {
        "Hugging Face": save_hugging_face(model, place / "hf"),
        "tied": save_hugging_face(tied, place / "tied"),
        "state-spaces": save_original(model, place / "original"),
        "mossnet": write_model(place / "moss", random_model(SMALL)),
    }


def renamed(source: Path, folder: Path, change: Callable[[str], str], *, pickled: bool) -> Path:
    """The same tensors under other names, as the one or the other kind of file."""
    safe = source / "model.safetensors"
    tensors = load_file(safe) if safe.is_file() else torch.load(source / "pytorch_model.bin", weights_only=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    tensors = {change(name): tensor.clone() for name, tensor in tensors.items()}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


# What is changed in Hugging Face's names.
CHANGES: dict[str, Callable[[str], str]] = {
    "torch.compile in DDP": lambda name: f"module._orig_mod.{name}",
    "layers compiled one by one": lambda name: name.replace(".mixer.", "._orig_mod.mixer."),
    "base model, wrapped": lambda name: f"_orig_mod.{name.removeprefix('backbone.')}",
}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.lm_head.weight", "lm_head.weight"),
        ("module.backbone.layers.0.mixer.D", "backbone.layers.0.mixer.D"),
        ("module.module.layers.1.norm.weight", "backbone.layers.1.norm.weight"),
        ("backbone.layers.1._checkpoint_wrapped_module.norm.weight", "backbone.layers.1.norm.weight"),
        ("_orig_mod._fsdp_wrapped_module.norm_f.weight", "backbone.norm_f.weight"),
        ("embedding.weight", "backbone.embeddings.weight"),
        ("backbone.embedding.weight", "backbone.embeddings.weight"),
        ("backbone.layers.0.mixer.module_weight", "backbone.layers.0.mixer.module_weight"),
        ("model.layers.0.norm.weight", "model.layers.0.norm.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("layout", ["Hugging Face", "state-spaces", "mossnet"])
def test_other_names_bring_the_same_checkpoint(
    layout: str, pickled: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    import_mamba(folders[layout], tmp_path / "plain")
    wanted = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for number, change in enumerate(CHANGES.values()):
        source = renamed(folders[layout], tmp_path / f"source {number}", change, pickled=pickled)
        assert import_mamba(source, tmp_path / f"out {number}").layout == layout
        assert (tmp_path / f"out {number}" / "model.safetensors").read_bytes() == wanted


@pytest.mark.slow
def test_names_that_pytorch_itself_writes(folders: dict[str, Path]) -> None:
    model = MambaForCausalLM.from_pretrained(folders["tied"])
    wanted = set(model.state_dict())
    assert set(map(plain_name, torch.compile(model).state_dict())) == wanted
    assert set(map(plain_name, nn.DataParallel(torch.compile(model)).state_dict())) == wanted
    model.backbone.layers[1] = torch.compile(model.backbone.layers[1])
    assert any("._orig_mod." in name for name in model.state_dict())
    assert set(map(plain_name, model.state_dict())) == wanted


def test_the_base_model_that_transformers_saves(folders: dict[str, Path], tmp_path: Path) -> None:
    import_mamba(folders["tied"], tmp_path / "plain")
    MambaModel.from_pretrained(folders["tied"]).save_pretrained(tmp_path / "base")
    assert "norm_f.weight" in load_file(tmp_path / "base" / "model.safetensors")
    import_mamba(tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    MambaModel.from_pretrained(folders["Hugging Face"]).save_pretrained(tmp_path / "untied")
    with pytest.raises(
        InputError, match=r"without its head \(lm_head\.weight\), which its config\.json says is not tied"
    ):
        import_mamba(tmp_path / "untied", tmp_path / "none")


def test_a_tensor_under_two_names(folders: dict[str, Path], tmp_path: Path) -> None:
    source = renamed(folders["tied"], tmp_path / "source", str, pickled=False)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "_orig_mod.backbone.norm_f.weight": torch.ones(40)}, source / "model.safetensors")
    with pytest.raises(
        InputError, match=r"under two names.*: _orig_mod\.backbone\.norm_f\.weight and backbone\.norm_f"
    ):
        import_mamba(source, tmp_path / "out")


@pytest.mark.parametrize("layout", ["Hugging Face", "state-spaces", "mossnet"])
def test_whole_numbers_written_as_floats(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(folders[layout], tmp_path / "source"))
    wanted = import_mamba(source, tmp_path / "plain").config
    values = json.loads((source / "config.json").read_text())

    def written(change: Callable[[int], float]) -> None:
        def changed(value: object) -> object:
            return change(value) if type(value) is int else value

        floats = {name: changed(value) for name, value in values.items() if name not in ("ssm_cfg", "version")}
        if "ssm_cfg" in values:
            floats["ssm_cfg"] = {name: changed(value) for name, value in values["ssm_cfg"].items()}
        (source / "config.json").write_text(json.dumps({**floats, "version": 1} if "version" in values else floats))

    written(float)
    assert import_mamba(source, tmp_path / "floats").config == wanted
    assert type(wanted.expand) is int
    written(lambda value: value + 0.5)
    with pytest.raises(InputError, match="expand"):
        import_mamba(source, tmp_path / "halves")


def test_what_is_missing_is_shown_beside_what_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of 24 names that are all wrong the eight that are shown say why, in `import` and where a MossNet is opened."""
    source = renamed(folders["tied"], tmp_path / "hf", lambda name: name.replace("backbone", "model"), pickled=False)
    pair = (
        r"\.json: backbone\.embeddings\.weight is missing \(there is {}\.embeddings\.weight\);.* and \d+ more\. {}\.$"
    )
    with pytest.raises(InputError, match=pair.format("model", "Copy or save the model again")):
        import_mamba(source, tmp_path / "out")
    moss = renamed(folders["mossnet"], tmp_path / "moss", lambda name: f"_orig_mod.{name}", pickled=False)
    with pytest.raises(InputError, match=pair.format(r"_orig_mod\.backbone", ".* come in with `mossquant import`")):
        Checkpoint.open(moss)
    import_mamba(moss, tmp_path / "mended")
    Checkpoint.open(tmp_path / "mended")


def test_the_list_of_offenders_shows_every_kind_and_the_nearest_of_the_same_shape() -> None:
    needed = {f"layers.{i}.norm.weight": NeededTensor((4,), (torch.float32,)) for i in range(20)}
    shapes: dict[str, tuple[int, ...]] = {f"layers.{i}.input_norm.weight": (4,) for i in range(1, 20)}
    shapes |= {"layers.0.input_norm.weight": (5,), "layers.19.norm.weight": (3,)}
    offenders = tensor_offenders(needed, shapes, dict.fromkeys(shapes, torch.float32))
    assert offenders[:3] == [
        "layers.0.norm.weight is missing (there is layers.10.input_norm.weight)",
        "layers.0.input_norm.weight is unexpected",
        "layers.19.norm.weight has shape [3], needs [4]",
    ]
    assert "layers.5.norm.weight is missing (there is layers.5.input_norm.weight)" in offenders
    assert len(offenders) == 19 + 20 - 8 + 1


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(folders["tied"], tmp_path / "source"))
    if name == "pytorch_model.bin":
        (source / "model.safetensors").unlink()
    (source / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer\. Run `git lfs pull`\.$"):
        import_mamba(source, tmp_path / "out")
