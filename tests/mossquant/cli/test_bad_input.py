# SPDX-License-Identifier: Apache-2.0
"""Bad input, whatever the verb: exit status 2, one line that says what and where, nothing on stdout, nothing left.

What a reader refuses is tried on the reader; the tables below hold each kind of damage once, each through one verb.
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest
import torch
from commands import command, making, reading, refused
from safetensors.torch import load_file, save_file

from mossquant.checkpoint.locate import asset_folder
from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.plan.recipe import Recipe
from mossquant.targets.artifact import check_tokenizer
from mossquant.text.text import Tokenizer

Break = Callable[[Path], object]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def put(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def values(name: str, **change: object) -> Break:
    """Other values in a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def break_it(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")

    return break_it


class Harmful:
    """What a pickle runs when it is loaded: it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._mark,)


NESTED = 100_000
D = "backbone.layers.1.mixer.D"
BAD_CHECKPOINTS: dict[str, tuple[Break, str]] = {
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither of model.safetensors"),
    "truncated": (
        rewrite("model.safetensors", lambda data: data[:-100]),
        "model.safetensors is not a safetensors file",
    ),
    "NaN": (tensors(lambda arrays: arrays[D].fill_(float("nan"))), f"{D} holds NaN or infinite values"),
    "wrong shapes": (
        tensors(
            lambda arrays: arrays.update({D: arrays[D][1:].clone(), "backbone.norm_f.weight": torch.ones(3).bfloat16()})
        ),
        f"{D} has shape [127], needs [128]; backbone.norm_f.weight has shape [3], needs [64]",
    ),
    "a tensor too many": (
        tensors(lambda arrays: arrays.update({"odd\n\x1b[31mname": torch.ones(2)})),
        r"odd\n\x1b[31mname is unexpected",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds neither config.json nor a program"),
}


def one_of(verbs: Iterable[list[object]], name: str, table: Iterable[str]) -> list[object]:
    """Each damage meets one verb, and each verb some damage."""
    choices = list(verbs)
    return choices[list(table).index(name) % len(choices)]


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(
    name: str, checkpoint_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    break_it, message = BAD_CHECKPOINTS[name]
    model, out = shutil.copytree(checkpoint_folder, tmp_path / "model"), place / "out"
    break_it(model)
    verbs = [*making(model, out), *reading(model, checkpoint_folder, text, out), ["verify", model, artifact_folder]]
    assert message in refused(place, *one_of(verbs, name, BAD_CHECKPOINTS))


def listed_anew(break_it: Break) -> Break:
    """Break a folder, then let its manifest agree."""

    def break_and_list(folder: Path) -> None:
        break_it(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in manifest["files"]:
            path = folder / name
            manifest["files"][name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return break_and_list


def entry(**change: object) -> Break:
    """Other values in the ledger's first entry."""

    def break_it(folder: Path) -> None:
        ledger = json.loads((folder / "ledger.json").read_text())
        ledger["tensors"][0] |= change
        (folder / "ledger.json").write_text(json.dumps(ledger))

    return listed_anew(break_it)


def flipped(data: bytes, at: int = -9) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def first(arrays: dict[str, torch.Tensor], ending: str) -> torch.Tensor:
    return next(tensor for name, tensor in arrays.items() if name.endswith(ending))


BAD_QUANTIZED: dict[str, tuple[Break, str]] = {
    "a bit flipped": (rewrite("model.safetensors", flipped), "model.safetensors has another SHA-256"),
    "a manifest of another release": (
        values("manifest.json", version=2, release="\x1b[31m9.9"),
        r"was written by mossquant \x1b[31m9.9; use that release",
    ),
    "a ledger with another format": (entry(format="int4_g128"), "has a role, shape, format or size that it cannot"),
    "a ledger with no parameters": (listed_anew(values("ledger.json", parameters=0)), "ledger.json says 0 parameters"),
    "negative scales": (
        listed_anew(tensors(lambda arrays: first(arrays, "_scale").fill_(-1))),
        "holds values that are not positive and finite",
    ),
    "a config of another shape": (listed_anew(values("config.json", hidden_size=128)), "contradicts itself"),
    "a config that says otherwise": (
        listed_anew(values("config.json", quantization_config={})),
        "quantization_config of config.json does not say what ledger.json says",
    ),
}


@pytest.mark.parametrize("name", BAD_QUANTIZED)
def test_bad_quantized_checkpoints(
    name: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    break_it, message = BAD_QUANTIZED[name]
    model = shutil.copytree(quantized_folder, tmp_path / "model")
    break_it(model)
    verbs = [*reading(model, checkpoint_folder, text, place / "out"), ["verify", model, artifact_folder]]
    assert message in refused(place, *one_of(verbs, name, BAD_QUANTIZED))


def program(change: Callable[[onnx.ModelProto], object]) -> Break:
    def break_it(folder: Path) -> None:
        proto = onnx.load(folder / "model.onnx")
        change(proto)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())

    return break_it


def metadata(**change: object) -> Break:
    """Other values in the metadata; the manifest is gone, so that nothing but the program is left to believe."""

    def change_it(proto: onnx.ModelProto) -> None:
        prop = next(prop for prop in proto.metadata_props if prop.key == "mossquant")
        prop.value = json.dumps(json.loads(prop.value) | change)

    return alone(program(change_it))


def alone(break_it: Break) -> Break:
    return lambda folder: (break_it(folder), (folder / "manifest.json").unlink())


def no_metadata(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


# The message of every verb.
BAD_ARTIFACTS: dict[str, tuple[Break, str]] = {
    "truncated": (rewrite("model.onnx", lambda data: data[: len(data) // 2]), "is not a readable ONNX file"),
    "of another program": (program(no_metadata), "holds no mossquant metadata: it was cut short, or another program"),
    "metadata of another release": (metadata(version=2), "another release of mossquant wrote it"),
    "weights that are not there": (
        metadata(data={"name": "x.data", "sha256": "0" * 64, "bytes": 3}),
        "x.data is missing, and the weights of model.onnx lie in it",
    ),
    "weights in another folder": (
        metadata(data={"name": "../x", "sha256": "0" * 64, "bytes": 3}),
        "its metadata cannot be read (data.name",
    ),
}
# What only running it, or holding it against its manifest, brings out: `verify` says what differs instead.
CHANGED_ARTIFACTS: dict[str, tuple[Break, str]] = {
    "another release in the metadata": (
        lambda folder: program(lambda proto: setattr(proto, "producer_version", "9"))(folder),
        "is not what its manifest.json says: model.onnx has another SHA-256",
    ),
    "a manifest that is none": (put("manifest.json", b"[" * NESTED), "manifest.json is not JSON"),
}


@pytest.mark.parametrize("name", [*BAD_ARTIFACTS, *CHANGED_ARTIFACTS])
def test_bad_artifacts(
    name: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    break_it, message = {**BAD_ARTIFACTS, **CHANGED_ARTIFACTS}[name]
    artifact = shutil.copytree(artifact_folder, tmp_path / "artifact")
    break_it(artifact)
    verbs = [words for words in reading(artifact, checkpoint_folder, text, place / "out") if words[0] != "export"]
    if name in BAD_ARTIFACTS:
        verbs.append(["verify", quantized_folder, artifact])
    assert message in refused(place, *one_of(verbs, name, [*BAD_ARTIFACTS, *CHANGED_ARTIFACTS]))


def test_a_model_without_tokenizer_or_with_anothers(
    checkpoint_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    tiny = shutil.copytree(asset_folder("tiny"), tmp_path / "tiny")
    (tiny / "tokenizer.json").unlink()
    for words in (["perplexity", tiny], ["generate", tiny, "x"], ["compare", tiny, tiny]):
        assert "has no tokenizer.json, and a vocabulary of 4096 is not byte-level" in refused(place, *words)
    words = asset_folder("tiny") / "tokenizer.json"
    message = refused(place, "import", checkpoint_folder, "-o", place / "out", "--tokenizer", words)
    assert "has tokens up to 4095, and the model has a vocabulary of 256" in message
    assert "another tokenizer or vocabulary" in refused(place, "compare", checkpoint_folder, "tiny", "--text", text)
    for verb in (["perplexity"], ["compare", checkpoint_folder]):
        assert "has another tokenizer than the bundled text is for" in refused(place, *verb, checkpoint_folder)


def test_a_pickle_is_never_run(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    mark, out, buffer = tmp_path / "was run", place / "out", io.BytesIO()
    torch.save({"backbone.embeddings.weight": Harmful(mark)}, buffer)
    mamba = tmp_path / "mamba"
    mamba.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    (mamba / "config.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    work = tmp_path / "work"
    work.mkdir()
    training = ["train", "--text", text, "-o", out, "--tokenizer", "bytes", "--steps", 1, "--batch", 2, "--window", 8]
    for harmful in (pickle.dumps(Harmful(mark)), buffer.getvalue()):
        for folder, name in (
            *((checkpoint_folder, name) for name in ("model.safetensors", "config.json", "tokenizer.json")),
            *((quantized_folder, name) for name in ("model.safetensors", "ledger.json", "manifest.json")),
            *((artifact_folder, name) for name in ("model.onnx", "manifest.json")),
        ):
            model = shutil.copytree(folder, tmp_path / "model")
            (model / name).write_bytes(harmful)
            assert name in refused(place, "generate", model, "x")
            shutil.rmtree(model)
        (mamba / "pytorch_model.bin").write_bytes(harmful)
        assert "pytorch_model.bin" in refused(place, "import", mamba, "-o", out)
        (tmp_path / "recipe.yaml").write_bytes(harmful)
        refused(place, "quantize", checkpoint_folder, "-o", out, "-r", tmp_path / "recipe.yaml")
        (work / "snapshot.safetensors").write_bytes(harmful)
        ended = command("--quiet", *training, "--work", work)
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert "snapshot.safetensors is not a training snapshot" in ended.err
    assert not mark.exists()


def test_the_wrong_kind(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, place: Path
) -> None:
    program, out = artifact_folder / "model.onnx", place / "out"
    for words, message in (
        (["quantize", program, "-o", out], "is of kind 'onnx', but quantize needs: checkpoint"),
        (
            ["quantize", quantized_folder, "--dry-run"],
            "is of kind 'quantized checkpoint', but quantize needs",
        ),
        (["import", program, "-o", out], "is of kind 'onnx', but import needs: checkpoint"),
        (["export", program, "-o", out], "is of kind 'onnx', but export needs: checkpoint or quantized checkpoint"),
        (["verify", program, artifact_folder], "is of kind 'onnx', but verify needs: checkpoint or quantized"),
        (["verify", quantized_folder, checkpoint_folder], "is no program; give one that was lowered from a checkpoint"),
        (["export", checkpoint_folder, "-o", out, "--activations", "int8"], "is not quantized, and int8 activations"),
        (
            ["perplexity", checkpoint_folder, "--activations", "planned", "--text", text],
            "is not quantized, so it",
        ),
        (["perplexity", program, "--text", text, "--activations", "fp32"], "has int8_block activations built in"),
    ):
        assert message in refused(place, *words), words


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "an empty path does not exist"),
        ("nowhere", "does not exist"),
        ("loop", "does not exist"),
        ("n" * 300, "cannot be opened (File name too long)"),
        ("odd\n\x1b[31m", r"odd\n\x1b[31m does not exist"),
        ("\udcff", r"\udcff does not exist"),
    ],
)
def test_paths_of_nothing(
    path: str, message: str, checkpoint_folder: Path, text: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "loop").symlink_to("loop")
    for words in (
        ["info", path],
        ["quantize", path, "-o", place / "out"],
        ["compare", checkpoint_folder, path, "--text", text],
        ["verify", checkpoint_folder, path],
    ):
        assert message in refused(place, *words), words


RECIPE = Recipe.named("int4-uniform").text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (RECIPE.replace("format:", "fromat:", 1).encode(), "unknown key 'fromat' (did you mean 'format'?)"),
        (b"!!python/object/apply:os.mkdir ['was run']\n", "tags are not supported"),
        (b"a: b: c\n", "mapping values are not allowed here"),
    ],
    ids=["a misspelled key", "code", "not YAML"],
)
def test_bad_recipes(data: bytes, message: str, checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    assert message in refused(place, "quantize", checkpoint_folder, "--dry-run", "--recipe", path)
    assert not (Path.cwd() / "was run").exists()


@pytest.mark.parametrize("program", ["model.onnx", "model.pte", "model.moss"])
def test_a_program_that_is_no_file(program: str, checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    os.mkfifo(tmp_path / program)
    for words in (["info", tmp_path], ["generate", tmp_path, "x"], ["verify", checkpoint_folder, tmp_path]):
        assert f"{program} is not a file; give an artifact that" in refused(place, *words), words


def test_pipes_for_files(checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    """Nobody writes to them, so that reading would wait without end."""
    os.mkfifo(tmp_path / "pipe")
    for words in (
        ["quantize", checkpoint_folder, "--dry-run", "-r", tmp_path / "pipe"],
        ["generate", checkpoint_folder, "--prompt-file", tmp_path / "pipe"],
        ["generate", checkpoint_folder, "--prompt-file", "/dev/zero"],
        ["perplexity", checkpoint_folder, "--text", tmp_path / "pipe"],
        ["import", checkpoint_folder, "-o", place / "out", "--tokenizer", tmp_path / "pipe"],
    ):
        assert "cannot be read (it is not a regular file)" in refused(place, *words), words


def test_what_may_be_left_out_and_is_no_file_is_left_out(checkpoint_folder: Path, text: Path, tmp_path: Path) -> None:
    """A pipe or a link that leads nowhere is not waited for."""
    model = Path(shutil.copytree(checkpoint_folder, tmp_path / "model"))
    os.mkfifo(model / "tokenizer.json")
    (model / "training.json").symlink_to("../blobs/0123")
    assert command("perplexity", model, "--text", text, "--tokens", 9).status == 0


def test_a_tokenizer_of_twenty_gigabytes(
    checkpoint_folder: Path, artifact_folder: Path, tmp_path: Path, place: Path
) -> None:
    """It is looked at before it is read, hashed or copied."""
    program = tmp_path / "artifact" / "model.onnx"
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    shutil.copytree(artifact_folder, program.parent)
    for folder in (model, program.parent):
        with (folder / "tokenizer.json").open("wb") as file:
            file.truncate(20 << 30)
    with pytest.raises(InputError, match=r"tokenizer\.json is larger than 32 MB"):
        check_tokenizer(program, "0" * 64)
    for verb in ("quantize", "export", "import"):
        assert "tokenizer.json is larger than 32 MB" in refused(place, verb, model, "-o", place / "out"), verb


def test_names_that_the_runtimes_cannot_take(
    checkpoint_folder: Path, artifact_folder: Path, tmp_path: Path, place: Path
) -> None:
    """Names of bytes that are no UTF-8."""
    for folder, words in ((checkpoint_folder, ["-o", place / "out"]), (artifact_folder, [])):
        copy = shutil.copytree(folder, tmp_path / f"{folder.name}\udcff")
        message = refused(place, "quantize" if words else "info", copy, *words)
        assert "is not a name in UTF-8, which the runtimes need; rename it" in message
    state = tmp_path / "\udcff"
    state.write_bytes((2).to_bytes(8, "little") + b"{}")
    message = refused(place, "generate", checkpoint_folder, "x", "--load-state", state)
    assert "is not a name in UTF-8; rename it" in message


def test_an_artifact_without_its_tokenizer(tmp_path: Path) -> None:
    """The advice is one that can be followed: `import` takes no artifact, and what has hashes takes no more files."""
    with pytest.raises(InputError, match=r"token ids only: import the original with one .*, then quantize and export"):
        Tokenizer.for_folder(tmp_path, 4096)
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match=r"token ids only: import it with one \(mossquant import --tokenizer FILE\)"):
        Tokenizer.for_folder(tmp_path, 4096)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match=r"import the original with one .*, then quantize and export it"):
        Tokenizer.for_folder(tmp_path, 4096)
