# SPDX-License-Identifier: Apache-2.0
"""Tensor files: whole and in shards, written and read, and every way in which they can be broken."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mossquant.checkpoint import tensorfiles
from mossquant.checkpoint.tensorfiles import TensorFiles, TensorWriter, all_finite, save_tensors
from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256

TENSORS = {
    f"t{i}": torch.arange(50 * (i + 1), dtype=torch.float32).view(-1, 10) + i for i in range(6)
}  # 200 … 1200 bytes


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS) -> Path:
    folder.mkdir(exist_ok=True)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    writer = TensorWriter(folder, total_bytes=total)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfiles, "ONE_FILE_BYTES", 1000)
    monkeypatch.setattr(tensorfiles, "SHARD_BYTES", 1000)


def same(folder: Path) -> bool:
    files = TensorFiles(folder)
    return files.shapes.keys() == TENSORS.keys() and all(torch.equal(files.tensor(n), t) for n, t in TENSORS.items())


def test_one_file(tmp_path: Path) -> None:
    files = TensorFiles(write(tmp_path / "m"))
    assert files.files == ["model.safetensors"]
    assert files.shapes["t1"] == (10, 10)
    assert files.dtypes["t1"] == torch.float32
    assert same(tmp_path / "m")


def test_shards_of_whole_tensors(tmp_path: Path, small_shards: None) -> None:
    """Closed at the first tensor that reaches the limit: 200 + 400 + 600, then 800 + 1000, then 1200."""
    files = TensorFiles(write(tmp_path / "m"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = [f"model-{i:05d}.safetensors" for i in (1, 2, 3)]
    assert files.files == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 4200
    assert [index["weight_map"][f"t{i}"] for i in range(6)] == [shards[i] for i in (0, 0, 0, 1, 1, 2)]
    assert same(tmp_path / "m")


@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_tensors_give_the_same_bytes(sharded: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if sharded:
        request.getfixturevalue("small_shards")
    for name in ("one", "two"):
        write(tmp_path / name)
    digests = [
        {file.name: file_sha256(file) for file in sorted((tmp_path / name).iterdir())} for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_what_the_system_refuses_is_an_oserror(tmp_path: Path) -> None:
    """The library hides the error number in its text: without it, a full disk would look like an error of ours."""
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere" / "model.safetensors")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "nowhere" / "model.safetensors")


def test_views_of_one_storage_and_transposes(tmp_path: Path) -> None:
    stacked = torch.arange(24.0).view(2, 3, 4)
    tensors = {"a": stacked[0], "b": stacked[1], "t": stacked[0].T, "again": stacked[0].clone()}
    files = TensorFiles(write(tmp_path / "m", tensors))
    assert all(torch.equal(files.tensor(name), tensor) for name, tensor in tensors.items())


Break = Callable[[Path], object]


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(start: int, content: bytes) -> Break:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        old = path.read_bytes()
        path.write_bytes(old[:start] + content + old[start + len(content) :])

    return change


def torch_saved(folder: Path) -> None:
    torch.save(dict(TENSORS), folder / "model.safetensors")


def float8(folder: Path) -> None:
    save_file({"t": torch.zeros(2, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")


# name: (what is done to a folder of one file, what the message says)
BROKEN: dict[str, tuple[Break, str]] = {
    "no file": (lambda f: (f / "model.safetensors").unlink(), "holds neither of model.safetensors and"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a safetensors file that is read"),
    "cut by one byte": (cut, "is not a safetensors file that is read"),
    "header too long": (overwrite(0, b"\xff" * 8), "is not a safetensors file that is read"),
    "header not JSON": (overwrite(8, b"#"), "is not a safetensors file that is read"),
    "a file of torch.save": (torch_saved, "is not a safetensors file that is read"),
    "a dtype of others": (float8, "model.safetensors is not a safetensors file that is read (t has dtype F8_E4M3)"),
    "an index beside it": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "one is needed"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file(how: str, tmp_path: Path) -> None:
    change, message = BROKEN[how]
    change(write(tmp_path / "m"))
    with pytest.raises(InputError) as error:
        TensorFiles(tmp_path / "m")
    assert message in str(error.value)
    assert str(tmp_path / "m") in str(error.value)
    assert "\n" not in str(error.value)


# name: (content of the index, what the message says)
INDEXES: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a list": ([], "is not a safetensors index"),
    "lists of files": ({"weight_map": {"t0": ["a"]}}, "is not a safetensors index"),
    "no shards": ({"weight_map": {}}, "is not a safetensors index"),
    "the folder above": ({"weight_map": {"t0": "../x.safetensors"}}, "is not a safetensors index"),
    "missing shards": ({"weight_map": {"t0": "a.safetensors"}}, "a.safetensors is missing, though"),
}


@pytest.mark.parametrize("how", INDEXES)
def test_a_broken_index(how: str, tmp_path: Path) -> None:
    content, message = INDEXES[how]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError) as error:
        TensorFiles(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["a tensor that is not listed", "a tensor of another shard", "a tensor of none"])
def test_an_index_that_contradicts_its_shards(how: str, tmp_path: Path, small_shards: None) -> None:
    folder = write(tmp_path / "m", {f"t{i}": torch.ones(200 + i) for i in range(6)})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    listed = index["weight_map"]
    if how == "a tensor that is not listed":
        del listed["t1"]
    else:
        listed["t1" if how == "a tensor of another shard" else "odd"] = listed["t5"]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json does not say where (t1|odd) is"):
        TensorFiles(folder)


def test_all_broken_shards_at_once(tmp_path: Path, small_shards: None) -> None:
    folder = write(tmp_path / "m")
    (folder / "model-00001.safetensors").unlink()
    (folder / "model-00002.safetensors").write_bytes(b"PK\x03\x04")
    save_file({"t5": torch.zeros(1), "odd\nname": torch.zeros(1)}, folder / "model-00004.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["odd"] = "model-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        TensorFiles(folder)
    for part in (
        "00001.safetensors is missing",
        "00002.safetensors is not a safetensors file",
        "t5 is in model-00003",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_all_finite_sees_every_place(dtype: torch.dtype, value: float) -> None:
    for place in (0, 1, 15, 500, 1020, 1022):
        tensor = torch.randn(1023).to(dtype)
        assert all_finite(tensor)
        tensor[place] = value
        assert not all_finite(tensor), place
        assert not all_finite(tensor.view(33, 31).T), place
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
