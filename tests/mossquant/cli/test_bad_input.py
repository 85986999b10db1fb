# SPDX-License-Identifier: Apache-2.0
"""Bad input, whatever the verb: exit status 2, one line that says what and where, nothing on stdout, nothing left.

The tables below hold what can be wrong with a model; each is tried on every verb that meets it.
"""

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from commands import Outcome, command, making, process, reading, refused
from onnx import TensorProto, helper
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
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

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
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "truncated": (
        rewrite("model.safetensors", lambda data: data[:-100]),
        "model.safetensors is not a safetensors file",
    ),
    "truncated header": (rewrite("model.safetensors", lambda data: data[:50]), "is not a safetensors file"),
    "empty": (put("model.safetensors", b""), "is not a safetensors file"),
    "corrupted header": (
        rewrite("model.safetensors", lambda data: data[:8] + b"x" * 100 + data[108:]),
        "is not a safetensors file",
    ),
    "an endless header": (
        rewrite("model.safetensors", lambda data: b"\xff" * 8 + data[8:]),
        "is not a safetensors file",
    ),
    "NaN": (tensors(lambda found: found[D].fill_(float("nan"))), f"{D} holds NaN or infinite values"),
    "infinite": (tensors(lambda found: found[D][:1].fill_(float("inf"))), f"{D} holds NaN or infinite values"),
    "wrong shapes": (
        tensors(
            lambda found: found.update({D: found[D][1:].clone(), "backbone.norm_f.weight": torch.ones(3).bfloat16()})
        ),
        f"{D} has shape [127], needs [128]; backbone.norm_f.weight has shape [3], needs [64]",
    ),
    "missing tensors": (tensors(lambda found: found.pop(D)), f"{D} is missing"),
    "a tensor too many": (
        tensors(lambda found: found.update({"odd\n\x1b[31mname": torch.ones(2)})),
        r"odd\n\x1b[31mname is unexpected",
    ),
    "integers": (tensors(lambda found: found.update({D: torch.ones(128, dtype=torch.int32)})), f"{D} has dtype int32"),
    "10^12 experts": (values("config.json", num_mlp_experts=10**12), "num_mlp_experts has 1000000000000"),
    "10^12 experts in a layer": (values("config.json", num_ssm_experts=[4, 10**12]), "num_ssm_experts has 10000000000"),
    "an unknown key": (values("config.json", hiden_size=3), "unknown key 'hiden_size'"),
    "a negative size": (values("config.json", hidden_size=-64), "hidden_size is -64"),
    "a size of thousands of digits": (
        rewrite("config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": ' + b"9" * 5000)),
        "config.json is not JSON",
    ),
    "NaN in the config": (values("config.json", rms_norm_eps=float("nan")), "is not JSON (NaN is no number)"),
    "a config of another release": (values("config.json", version=2), "version 2 was written by a newer release"),
    "a config that is cut short": (rewrite("config.json", lambda data: data[:-9]), "config.json is not JSON"),
    "a config that is no object": (put("config.json", b"[]"), "expected a JSON object"),
    "a config that is nested without end": (put("config.json", b'{"a":' * NESTED), "config.json is not JSON"),
    "a value that is nested without end": (
        put("config.json", b'{"model_type": "mossnet", "hidden_size": ' + b"[" * NESTED + b"]" * NESTED + b"}"),
        "config.json is not JSON",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds neither config.json nor a program"),
    "a config that leads to itself": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("config.json")),
        "holds neither config.json nor a program",
    ),
    "shards elsewhere": (
        lambda folder: (
            put("model.safetensors.index.json", b'{"weight_map": {"a": "../../model.safetensors"}}')(folder),
            (folder / "model.safetensors").unlink(),
        ),
        "names files outside its folder",
    ),
    "an index that is nested without end": (
        lambda folder: (
            put("model.safetensors.index.json", b"[" * NESTED)(folder),
            (folder / "model.safetensors").unlink(),
        ),
        "model.safetensors.index.json is not JSON (it is nested without end)",
    ),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(
    name: str, checkpoint_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    break_it, message = BAD_CHECKPOINTS[name]
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    break_it(model)
    for words in [
        *reading(model, checkpoint_folder, text, place / "out"),
        *making(model, place / "out"),
        ["verify", model, artifact_folder],
    ]:
        assert message in refused(place, *words), words
    shutil.rmtree(model)


def test_a_bad_checkpoint_in_a_process_of_its_own(
    checkpoint_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    """`bench` opens it in another process, which says no more than we do."""
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    BAD_CHECKPOINTS["truncated"][0](model)
    assert "is not a safetensors file" in refused(place, "bench", model)
    found = process("quantize", model, "-o", place / "out")
    assert (found.status, found.out, found.err.count("\n")) == (2, "", 1)
    assert list(place.iterdir()) == []


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


def first(found: dict[str, torch.Tensor], ending: str) -> torch.Tensor:
    return next(tensor for name, tensor in found.items() if name.endswith(ending))


BAD_QUANTIZED: dict[str, tuple[Break, str]] = {
    "truncated": (rewrite("model.safetensors", lambda data: data[:-9]), "bytes, the manifest says"),
    "a bit flipped": (rewrite("model.safetensors", flipped), "model.safetensors has another SHA-256"),
    "no ledger": (lambda folder: (folder / "ledger.json").unlink(), "ledger.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "a manifest that is nested without end": (put("manifest.json", b"[" * NESTED), "manifest.json is not JSON"),
    "a manifest of another release": (
        values("manifest.json", version=2, release="\x1b[31m9.9"),
        r"was written by mossquant \x1b[31m9.9; use that release",
    ),
    "a manifest that names other folders": (
        values("manifest.json", files={"../../x": {"sha256": "0" * 64, "bytes": 1}}),
        "manifest.json is not a manifest",
    ),
    "a ledger with another format": (entry(format="int4_g128"), "has a role, shape, format or size that it cannot"),
    "a ledger with an unknown format": (entry(format="int5"), "has a role, shape, format or size that it cannot"),
    "a ledger with 10^12 rows": (entry(rows=10**12), "has a role, shape, format or size that it cannot have"),
    "a ledger of a smaller original": (entry(stored_bytes=63), "has a role, shape, format or size that it cannot"),
    "a ledger with an unknown solver": (entry(solver="guess"), "has a role, shape, format or size that it cannot"),
    "a ledger with a negative error": (entry(relative_error=-1.0), "has a role, shape, format or size that it cannot"),
    "a ledger with a negative size": (entry(predicted_bytes=-5), "has a role, shape, format or size that it cannot"),
    "a ledger with no parameters": (listed_anew(values("ledger.json", parameters=0)), "ledger.json says 0 parameters"),
    "a ledger nested without end": (
        listed_anew(put("ledger.json", b'{"version": 1, "tensors": ' + b"[" * NESTED)),
        "ledger.json is not JSON",
    ),
    "a ledger nested deeply": (
        listed_anew(put("ledger.json", b'{"version": 1, "tensors": ' + b"[" * 900 + b"]" * 900 + b"}")),
        "ledger.json is not JSON (it is nested deeper than 32)",
    ),
    "negative scales": (
        listed_anew(tensors(lambda found: first(found, "_scale").fill_(-1))),
        "holds values that are not positive and finite",
    ),
    "a wrong padded shape": (
        listed_anew(tensors(lambda found: first(found, "_shape").fill_(3))),
        "does not hold the padded shape",
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
    for words in [*reading(model, checkpoint_folder, text, place / "out"), ["verify", model, artifact_folder]]:
        assert message in refused(place, *words), words
    for words in making(model, place / "out"):
        assert "is of kind 'quantized checkpoint', but" in refused(place, *words), words


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


def shape(**change: object) -> Break:
    """Another shape in the metadata's config."""
    return lambda folder: metadata(config=config_of(folder) | change)(folder)


def config_of(folder: Path) -> dict[str, object]:
    proto = onnx.load(folder / "model.onnx")
    stored = json.loads(next(prop.value for prop in proto.metadata_props if prop.key == "mossquant"))
    found: dict[str, object] = stored["config"]
    return found


def alone(break_it: Break) -> Break:
    return lambda folder: (break_it(folder), (folder / "manifest.json").unlink())


def another_graph(proto: onnx.ModelProto) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    proto.graph.CopyFrom(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:]))


def no_metadata(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def outside(proto: onnx.ModelProto) -> None:
    """The largest weights are said to lie in another file."""
    tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    length = str(len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../secret"), ("offset", "0"), ("length", length)):
        tensor.external_data.add(key=key, value=value)


# The message of the verbs that run it, of `info` where it differs, and whether `verify --weights-only` refuses it too.
BAD_ARTIFACTS: dict[str, tuple[Break, str]] = {
    "truncated": (rewrite("model.onnx", lambda data: data[: len(data) // 2]), "is not a readable ONNX file"),
    "one byte short": (rewrite("model.onnx", lambda data: data[:-1]), "is not a readable ONNX file"),
    "empty": (put("model.onnx", b""), "holds no mossquant metadata"),
    "garbage": (put("model.onnx", bytes(range(256)) * 20), "is not a readable ONNX file"),
    "a text": (put("model.onnx", b"hello, world\n"), "is not a readable ONNX file"),
    "of another program": (program(no_metadata), "holds no mossquant metadata: it was cut short, or another program"),
    "metadata nested without end": (
        program(lambda proto: [setattr(prop, "value", "[" * NESTED) for prop in proto.metadata_props]),
        "its metadata cannot be read",
    ),
    "metadata of another release": (metadata(version=2), "another release of mossquant wrote it"),
    "no parameters": (metadata(parameters=0), "parameters: input should be greater than 0"),
    "a negative size": (metadata(weight_bytes=-1), "weight_bytes: input should be greater than 0"),
    "no config": (metadata(config={}), "model_type is None, not 'mossnet'"),
    "weights that are not there": (
        metadata(data={"name": "x.data", "sha256": "0" * 64, "bytes": 3}),
        "x.data is missing, and the weights of model.onnx lie in it",
    ),
    "weights in another folder": (
        metadata(data={"name": "../x", "sha256": "0" * 64, "bytes": 3}),
        "its metadata cannot be read (data.name",
    ),
    "two programs": (lambda folder: shutil.copy(folder / "model.onnx", folder / "b.onnx"), "holds 2 programs"),
    "a folder for a program": (
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").mkdir()),
        "model.onnx is not a file",
    ),
    "a program that leads to itself": (
        lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").symlink_to("model.onnx")),
        "model.onnx is not a file",
    ),
}
# What only running it, or holding it against its manifest, brings out: `verify` says what differs instead.
CHANGED_ARTIFACTS: dict[str, tuple[Break, str]] = {
    "another release in the metadata": (
        lambda folder: program(lambda proto: setattr(proto, "producer_version", "9"))(folder),
        "is not what its manifest.json says: model.onnx has another SHA-256",
    ),
    "another graph": (program(another_graph), "is not what its manifest.json says"),
    "a manifest that is none": (put("manifest.json", b"[" * NESTED), "manifest.json is not JSON"),
}
CHANGED_ALONE: dict[str, tuple[Break, str]] = {
    "another graph": (
        alone(program(another_graph)),
        "is not the program that its config lowers to: backbone.embeddings.weight is not in it",
    ),
    "another vocabulary": (shape(vocab_size=300), "(MatMulNBits backbone.embeddings.weight) is another one"),
    "another width": (shape(state_size=8), "is not the program that its config lowers to: node"),
    "weights in another file": (alone(program(outside)), "reads weights from other files than its own"),
}


@pytest.mark.parametrize("name", BAD_ARTIFACTS)
def test_bad_artifacts(
    name: str,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    break_it, message = BAD_ARTIFACTS[name]
    artifact = shutil.copytree(artifact_folder, tmp_path / "artifact")
    break_it(artifact)
    for words in [*reading(artifact, checkpoint_folder, text, place / "out"), ["verify", quantized_folder, artifact]]:
        if words[0] != "export":
            assert message in refused(place, *words), words
    for words in [["export", artifact, "-o", place / "out"], *making(artifact, place / "out")]:
        refused(place, *words)


@pytest.mark.parametrize("name", [*CHANGED_ARTIFACTS, *(f"{name}, alone" for name in CHANGED_ALONE)])
def test_changed_artifacts(
    name: str, checkpoint_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    break_it, message = CHANGED_ARTIFACTS[name] if name in CHANGED_ARTIFACTS else CHANGED_ALONE[name[:-7]]
    artifact = shutil.copytree(artifact_folder, tmp_path / "artifact")
    break_it(artifact)
    for words in reading(artifact, checkpoint_folder, text, place / "out"):
        if words[0] != "export":
            assert message in refused(place, *words), words


def test_a_tokenizer_that_is_none(checkpoint_folder: Path, text: Path, tmp_path: Path, place: Path) -> None:
    model = shutil.copytree(checkpoint_folder, tmp_path / "model")
    for data in (b"", b"{", b"[" * NESTED, b"\x80\x04", b'{"version": "1.0"}', b"null"):
        (model / "tokenizer.json").write_bytes(data)
        for words in reading(model, checkpoint_folder, text, place / "out"):
            if words[0] not in ("info", "export"):
                assert "tokenizer.json is not" in refused(place, *words), words
        assert "tokenizer.json is not" in refused(place, "import", model, "-o", place / "out")


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


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch.save"])
def test_a_pickle_is_never_run(
    plain: bool,
    checkpoint_folder: Path,
    quantized_folder: Path,
    artifact_folder: Path,
    text: Path,
    tmp_path: Path,
    place: Path,
) -> None:
    mark = tmp_path / "was run"
    if plain:
        harmful = pickle.dumps(Harmful(mark))
    else:
        buffer = io.BytesIO()
        torch.save({"backbone.embeddings.weight": Harmful(mark)}, buffer)
        harmful = buffer.getvalue()
    for folder, names in (
        (checkpoint_folder, ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"]),
        (quantized_folder, ["model.safetensors", "config.json", "ledger.json", "manifest.json", "tokenizer.json"]),
        (artifact_folder, ["model.onnx", "manifest.json"]),
    ):
        for name in names:
            model = shutil.copytree(folder, tmp_path / "model")
            (model / name).write_bytes(harmful)
            for words in reading(model, checkpoint_folder, text, place / "out"):
                if name != "tokenizer.json" or words[0] not in ("info", "export"):
                    refused(place, *words)
            for words in making(model, place / "out"):
                if name != "tokenizer.json" or words[0] == "import":
                    refused(place, *words)
            shutil.rmtree(model)
    mamba = tmp_path / "mamba"
    mamba.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 256}
    (mamba / "config.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    (mamba / "pytorch_model.bin").write_bytes(harmful)
    assert "pytorch_model.bin" in refused(place, "import", mamba, "-o", place / "out")
    (tmp_path / "recipe.yaml").write_bytes(harmful)
    refused(place, "quantize", checkpoint_folder, "-o", place / "out", "-r", tmp_path / "recipe.yaml")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "snapshot.safetensors").write_bytes(harmful)
    options = ["--tokenizer", "bytes", "--steps", 1, "--batch", 2, "--window", 8, "--work", tmp_path / "work"]
    found = command("--quiet", "train", "--text", text, "-o", place / "out", *options)
    assert (found.status, found.err.count("\n")) == (2, 1)
    assert "snapshot.safetensors is not a training snapshot" in found.err
    assert not mark.exists()


def test_the_wrong_kind(
    checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, text: Path, place: Path
) -> None:
    program, out = artifact_folder / "model.onnx", place / "out"
    for words, message in (
        (
            ["quantize", quantized_folder, "-o", out],
            "is of kind 'quantized checkpoint', but quantize needs: checkpoint",
        ),
        (["quantize", program, "-o", out], "is of kind 'onnx', but quantize needs: checkpoint"),
        (["quantize", artifact_folder, "--dry-run"], "is of kind 'onnx', but quantize needs: checkpoint"),
        (["import", quantized_folder, "-o", out], "is of kind 'quantized checkpoint', but import needs: checkpoint"),
        (["import", program, "-o", out], "is of kind 'onnx', but import needs: checkpoint"),
        (["export", program, "-o", out], "is of kind 'onnx', but export needs: checkpoint or quantized checkpoint"),
        (["verify", program, artifact_folder], "is of kind 'onnx', but verify needs: checkpoint or quantized"),
        (["verify", quantized_folder, checkpoint_folder], "is of kind 'checkpoint', but verify needs: onnx"),
        (["verify", quantized_folder, quantized_folder], "is of kind 'quantized checkpoint', but verify needs: onnx"),
        (["export", checkpoint_folder, "-o", out, "--activations", "int8"], "is not quantized, and int8 activations"),
        (
            ["perplexity", checkpoint_folder, "--text", text, "--activations", "planned"],
            "is not quantized, so it has no",
        ),
        (["perplexity", program, "--text", text, "--activations", "fp32"], "was exported with int8_block activations"),
    ):
        assert message in refused(place, *words), words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "an empty path was given"),
        ("nowhere", "does not exist"),
        ("loop", "does not exist"),
        ("photos", "holds neither config.json nor a program"),
        ("file.txt", "is a file that mossquant does not know"),
        ("file.txt/below", "does not exist"),
        ("n" * 300, "cannot be opened (File name too long)"),
        ("odd\n\x1b[31m", r"odd\n\x1b[31m does not exist"),
        ("\udcff", r"\udcff does not exist"),
    ],
)
def test_paths_of_nothing(
    given: str,
    message: str,
    checkpoint_folder: Path,
    artifact_folder: Path,
    text: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    (place / "loop").symlink_to("loop")
    (place / "photos").mkdir()
    (place / "photos" / "cat.jpg").write_bytes(b"cat")
    (place / "file.txt").write_bytes(b"text")
    model = Path(given) if given else given
    for words in [
        *reading(model, checkpoint_folder, text, place / "out"),  # type: ignore[arg-type]
        *making(model, place / "out"),  # type: ignore[arg-type]
        ["verify", model, artifact_folder],
        ["verify", checkpoint_folder, model],
        ["bench", checkpoint_folder, model],
    ]:
        assert message in refused(place, *words), words


RECIPE = Recipe.named("int4").text
BAD_RECIPES: dict[str, tuple[bytes | None, str]] = {
    "nowhere": (None, "does not exist; give a YAML file"),
    "empty": (b"\n", "is empty; give a YAML file"),
    "not UTF-8": (b"\xff\xfe", "is not UTF-8 text"),
    "a misspelled key": (
        RECIPE.replace("format:", "fromat:", 1).encode(),
        "unknown key 'fromat' (did you mean 'format'?)",
    ),
    "a misspelled section": (RECIPE.replace("weights:", "weihgts:").encode(), "unknown key 'weihgts' (did you mean"),
    "an unknown format": (RECIPE.replace("int4_g32", "int5_g32").encode(), "unknown number format 'int5_g32'"),
    "an unknown target": (RECIPE.replace("onnx", "abacus").encode(), "unknown target 'abacus'"),
    "a rule that matches nothing": (
        RECIPE.replace("weights:", 'weights:\n  - {match: "*.nothing.*", format: int8}').encode(),
        "the rule with match '*.nothing.*' matches nothing",
    ),
    "a tensor without a rule": (
        RECIPE.replace("role: embedding", "role: head").replace('role: "embedding"', 'role: "head"').encode(),
        "no rule under weights matches backbone.embeddings.weight",
    ),
    "of another release": (RECIPE.replace("version: 1", "version: 2").encode(), "version: input should be 1, not 2"),
    "aliases without end": (b"a: &a [*a, *a]\n", "anchors and aliases are not supported"),
    "nested without end": (b"[" * NESTED, "nested deeper than 8"),
    "code": (b"!!python/object/apply:os.mkdir ['was run']\n", "tags are not supported"),
    "a character beyond the last": (b'"\\U00110000": 1\n', "is not YAML (a character or number in it is out of range)"),
    "a character far beyond": (b'"\\UFFFFFFFF": 1\n', "is not YAML (a character or number in it is out of range)"),
    "a version of thousands of digits": (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1\n", "is out of range"),
    "not YAML": (b"a: b: c\n", "mapping values are not allowed here"),
    "a list": (b"- a\n- b\n", "a recipe is a mapping"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes(name: str, checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    data, message = BAD_RECIPES[name]
    path = tmp_path / "recipe.yaml"
    if data is not None:
        path.write_bytes(data)
    for words in (["-o", place / "out"], ["--dry-run"]):
        assert message in refused(place, "quantize", checkpoint_folder, *words, "--recipe", path)
    assert not (Path.cwd() / "was run").exists()


def test_an_unknown_recipe_preset_or_target(checkpoint_folder: Path, text: Path, place: Path) -> None:
    out = place / "out"
    message = refused(place, "quantize", checkpoint_folder, "-o", out, "-r", "int5")
    assert "unknown recipe 'int5'; known recipes: int8, int4" in message
    message = refused(place, "train", "--preset", "huge", "--text", text, "-o", out)
    assert "unknown preset 'huge'; known presets: tiny, 8x30m, 8x200m, 8x1.5b" in message
    message = refused(place, "export", checkpoint_folder, "-o", out, "--target", "abacus")
    assert "unknown target 'abacus'; known targets: onnx" in message


NO_FILE: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", NO_FILE)
@pytest.mark.parametrize("program", ["model.onnx", "model.pte"])
def test_a_program_that_is_no_file(
    name: str, program: str, checkpoint_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    NO_FILE[name](artifact / program)
    for words in [
        *reading(artifact, checkpoint_folder, text, place / "out"),
        ["verify", checkpoint_folder, artifact],
        ["bench", artifact],
    ]:
        assert f"{program} is not a file; give an artifact that" in refused(place, *words), words
    for words in reading(artifact / program, checkpoint_folder, text, place / "out"):
        refused(place, *words)


def test_pipes_for_files(checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    """Nobody writes to them, so that reading would wait without end."""
    os.mkfifo(tmp_path / "recipe.yaml")
    for words in (
        ["quantize", checkpoint_folder, "--dry-run", "-r", tmp_path / "recipe.yaml"],
        ["generate", checkpoint_folder, "--prompt-file", tmp_path / "recipe.yaml"],
        ["generate", checkpoint_folder, "--prompt-file", "/dev/zero"],
        ["perplexity", checkpoint_folder, "--text", tmp_path / "recipe.yaml"],
    ):
        assert "cannot be read (it is a device, pipe or socket)" in refused(place, *words), words


HALF_THERE: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a dangling link": lambda path: path.symlink_to("../blobs/0123"),
}
"""What may stand in the place of a file that may be left out; the last is a model's cache that was copied by half."""


@pytest.mark.parametrize("what", HALF_THERE)
@pytest.mark.parametrize("name", ["tokenizer.json", "training.json", "manifest.json", "model.safetensors.index.json"])
def test_what_may_be_left_out_is_a_file_or_not_there(
    what: str, name: str, checkpoint_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    """To go on without it would drop a tokenizer, the texts that were seen, or every hash, and say nothing."""
    source = artifact_folder if name == "manifest.json" else checkpoint_folder
    model = Path(shutil.copytree(source, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    HALF_THERE[what](model / name)
    message = "is a link that leads nowhere" if what == "a dangling link" else "is no file"
    verbs = [*reading(model, checkpoint_folder, text, place / "out")]
    if source == artifact_folder:
        verbs = [words for words in verbs if words[0] != "export"]
    else:
        verbs += making(model, place / "out")
    for words in verbs:
        assert f"{name} {message}; put the file there, or take it away" in refused(place, *words), words


def test_an_artifact_whose_tokenizer_is_there_by_half(
    artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    model = Path(shutil.copytree(artifact_folder, tmp_path / "model"))
    (model / "tokenizer.json").symlink_to("elsewhere")
    for words in (["info", model], ["perplexity", model, "--text", text]):
        assert "tokenizer.json is a link that leads nowhere" in refused(place, *words)


def test_a_text_of_twenty_gigabytes(checkpoint_folder: Path, tmp_path: Path, place: Path) -> None:
    text = tmp_path / "text"
    with text.open("wb") as file:
        file.truncate(20 << 30)
    for most, words in (
        (8, ["perplexity", checkpoint_folder, "--text", text]),
        (256, ["train", "--preset", "tiny", "--text", text, "-o", place / "out"]),
    ):
        assert f"text is larger than {most} MB: give a shorter text" in refused(place, *words), words


def test_a_tokenizer_of_twenty_gigabytes(
    checkpoint_folder: Path, artifact_folder: Path, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
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
    for words in (
        ["generate", model, "x"],
        ["quantize", model, "-o", place / "out"],
        ["export", model, "-o", place / "out"],
        ["export", model, "--dry-run"],
        ["import", model, "-o", place / "out"],
    ):
        assert "tokenizer.json is larger than 32 MB" in refused(place, *words), words


def test_names_that_the_runtimes_cannot_take(
    checkpoint_folder: Path, artifact_folder: Path, text: Path, tmp_path: Path, place: Path
) -> None:
    """Names of bytes that are no UTF-8."""
    for folder in (checkpoint_folder, artifact_folder):
        given = shutil.copytree(folder, tmp_path / f"{folder.name}\udcff")
        for path in [given, *given.glob("*.onnx")]:
            for words in reading(path, checkpoint_folder, text, place / "out"):
                assert "is not a name in UTF-8, which the runtimes need; rename it" in refused(place, *words), words
            refused(place, "info", path, "--json", place / "out.json")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "\udcff.pte").write_bytes(b"")
    assert "is not a name in UTF-8" in refused(place, "generate", tmp_path / "artifact", "x")
    state = tmp_path / "\udcff"
    state.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "is not a name in UTF-8; rename it" in refused(
        place, "generate", checkpoint_folder, "x", "--load-state", state
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "ledger.json", "manifest.json", "model.onnx"])
def test_random_damage(
    file: str, checkpoint_folder: Path, quantized_folder: Path, artifact_folder: Path, tmp_path: Path, place: Path
) -> None:
    """Anything may be refused, or do no harm; nothing is an error of ours. Of an .onnx nothing but the file is left."""
    source = {"model.onnx": artifact_folder, "ledger.json": quantized_folder, "manifest.json": quantized_folder}
    model = shutil.copytree(source.get(file, checkpoint_folder), tmp_path / "model")
    data, repair = (model / file).read_bytes(), listed_anew(lambda folder: None)
    if file == "model.onnx":
        (model / "manifest.json").unlink()
    random.seed(file)
    for _ in range(60):
        changed = bytearray(data)
        at, length = random.randrange(len(data)), random.randrange(1, 40)
        kind = random.choice(["flip", "flip", "cut", "insert", "clear"])
        if kind == "flip":
            changed[at] ^= 1 << random.randrange(8)
        else:
            new = {"cut": b"", "insert": changed[at : at + 1] + random.randbytes(length), "clear": bytes(length)}[kind]
            changed[at : at + (1 if kind == "insert" else length)] = new
        (model / file).write_bytes(changed)
        if file == "ledger.json":
            repair(model)
        for words in (["info", model], ["generate", model, "x", "--max-tokens", 1]):
            found = command(*words)
            assert found.status in (0, 2), (at, kind, found)
            assert (found.err.count("\n"), found.out == "") == ((1, True) if found.status == 2 else (0, False))
        if file == "model.onnx":
            assert command("verify", quantized_folder, model, "--weights-only").status in (0, 1, 2)
    assert list(place.iterdir()) == []


def test_outcomes_are_told_apart() -> None:
    """The helper that all of these rest on can fail."""
    with pytest.raises(AssertionError):
        refused(Path(__file__).parents[2], "recipes")
    assert isinstance(command("recipes"), Outcome)
