# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints on disk: read back by compressed-tensors, by us, and refused where they were tampered with."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from small import input_format

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.inputs import activation_model
from mossquant.checkpoint.packing import is_module_weight, pack
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import value
from mossquant.errors import InputError
from mossquant.eval.verify import verify
from mossquant.formats.activations import int8_block
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.targets.export import export

MIXED = """\
version: 1
name: mixed
targets: [torch, onnx]
weights:
  - {role: "*norm*", keep: stored, why: as it is}
  - {role: "*.router", keep: fp32, why: chooses the experts, optional: true}
  - {match: "*.1.mixer.*in_proj.weight", format: int8}
  - {match: "*.experts.2.*_proj.weight", format: int8_g32}
  - {role: embedding, format: int4_g128}
  - {role: "mlp.*", format: int8_g32}
  - {role: "*", format: int4_g32}
activations:
  - {role: ssm.out_proj.input, format: fp32}
  - {role: "*", format: int8_block}
state:
  - {role: "*", format: fp32}
"""


@pytest.fixture(scope="module")
def quantized_folders(
    checkpoint_folder: Path, quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Recipe name → the small model quantized by it. Not to be changed: copy it first."""
    above = tmp_path_factory.mktemp("quantized")
    (above / "mixed.yaml").write_text(MIXED)
    quantize(checkpoint_folder, above / "int8", recipe="int8-uniform")
    quantize(checkpoint_folder, above / "mixed", recipe=above / "mixed.yaml")
    return {"int4-uniform": quantized_folder, "int8-uniform": above / "int8", "mixed": above / "mixed"}


EVERY = pytest.mark.parametrize("recipe", ["int4-uniform", "int8-uniform", "mixed"])


@EVERY
def test_compressed_tensors_reads_every_linear(quantized_folders: dict[str, Path], recipe: str) -> None:
    """With the real library: its config, name matching, unpacking and dequantization, exactly our values."""
    folder = quantized_folders[recipe]
    ours = QuantizedCheckpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert config.format == "pack-quantized"
    read = 0
    for name, spec in ours.specs.items():
        if not is_module_weight(spec):
            continue
        module = name.removesuffix(".weight")
        schemes = [s for s in config.config_groups.values() if any(match_name(module, t) for t in s.targets)]
        assert len(schemes) == (1 if (ours.format(name) is not None) else 0)
        assert any(match_name(module, ignored) for ignored in config.ignore or []) != (ours.format(name) is not None)
        if not schemes:
            continue
        local = {key: stored[f"{module}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        quantized = ours.quantized(name)
        rows, columns = quantized.rows, quantized.columns
        assert local["weight_shape"].tolist() == [rows, quantized.padded_columns]
        bits = schemes[0].weights.num_bits
        codes = unpack_from_int32(local["weight_packed"], bits, torch.Size(local["weight_shape"].tolist()))
        assert torch.equal(codes, quantized.codes)
        assert torch.equal(pack_to_int32(quantized.codes, bits), local["weight_packed"])
        # It computes in the type of the scales: exactly ours in fp32, and ours rounded once where they are bf16.
        exact = PackedQuantizationCompressor.decompress(
            local | {"weight_scale": local["weight_scale"].float()}, schemes[0]
        )["weight"]
        assert torch.equal(exact[:, :columns], quantized.dequantize())
        assert not exact[:, columns:].any()
        as_stored = PackedQuantizationCompressor.decompress(local, schemes[0])["weight"]
        assert as_stored.dtype == quantized.scales.dtype
        assert torch.equal(as_stored[:, :columns], quantized.dequantize().to(as_stored.dtype))
        read += 1
    assert read >= 31


@EVERY
def test_api(
    quantized_folders: dict[str, Path], checkpoint_folder: Path, tiny_config: MossNetConfig, recipe: str
) -> None:
    folder = quantized_folders[recipe]
    opened, parent = QuantizedCheckpoint.open(folder), Checkpoint.open(checkpoint_folder)
    assert (opened.config, opened.torch_dtype, opened.origin.recipe) == (tiny_config, "bfloat16", recipe)
    assert list(opened.specs) == list(parent.specs)
    assert opened.origin.parameters == parent.origin.parameters
    assert opened.origin.payload_bytes == sum(entry.written_bytes or 0 for entry in opened.plan.tensors)
    assert opened.origin.file_bytes == (folder / "model.safetensors").stat().st_size
    assert opened.manifest.parent.files == parent.origin.files
    assert opened.manifest.parent.bytes == parent.origin.payload_bytes
    assert opened.origin.seen_text == ()
    assert opened.origin.tokenizer is None
    for name, digest in opened.origin.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(opened.origin.files) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    for name, spec in opened.specs.items():
        values = value(opened, name)
        assert (tuple(values.shape), values.dtype, values.is_contiguous()) == (spec.shape, torch.float32, True)
        if opened.format(name) is not None:
            found = opened.quantized(name)
            assert (found.rows, found.columns) == spec.matrix_shape
            assert torch.equal(spec.to_matrix(values), found.dequantize())
            assert torch.equal(opened.packed(name), pack(found.codes, found.format.bits))
            with pytest.raises(ValueError, match="is quantized to"):
                opened.kept(name)
        else:
            assert torch.equal(opened.kept(name).float(), parent.kept(name).float())
            with pytest.raises(ValueError, match="is kept in"):
                opened.quantized(name)


def test_mixed_plan_is_what_the_rules_say(quantized_folders: dict[str, Path]) -> None:
    opened = QuantizedCheckpoint.open(quantized_folders["mixed"])
    storage = {name: entry.storage for name, entry in opened.plan.by_name.items()}
    assert storage["backbone.layers.0.mixer.in_proj.weight"] == "int4_g32"
    assert storage["backbone.layers.1.mixer.in_proj.weight"] == "int8"
    assert storage["backbone.layers.1.mixer.experts.2.x_proj.weight"] == "int8_g32"
    assert storage["backbone.embeddings.weight"] == "int4_g128"
    assert storage["backbone.norm_f.weight"] == "bfloat16"
    assert input_format(opened, "backbone.embeddings.weight") == ("int8_block", 128)
    assert input_format(opened, "backbone.layers.1.mixer.in_proj.weight") == ("int8_block", 32)
    assert input_format(opened, "backbone.layers.1.mixer.out_proj.weight") == ("fp32", 32)


def test_activation_model(quantized_folders: dict[str, Path]) -> None:
    opened = QuantizedCheckpoint.open(quantized_folders["mixed"])
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    planned = activation_model(opened)
    out_proj, x_proj = (f"backbone.layers.0.mixer.{name}.weight" for name in ("out_proj", "experts.1.x_proj"))
    assert planned(out_proj, x) is x
    assert torch.equal(planned(x_proj, x), int8_block(x, 32))
    assert torch.equal(planned("backbone.embeddings.weight", x), int8_block(x, 128))
    every = activation_model(opened, "int8_block")
    assert torch.equal(every(out_proj, x), int8_block(x, 32))
    none = activation_model(opened, "fp32")
    assert none(x_proj, x) is x
    with pytest.raises(InputError, match="unknown activation format 'int7'"):
        activation_model(opened, "int7")


def test_activation_model_runs_in_the_model(quantized_folders: dict[str, Path]) -> None:
    """Every linear's name is known to the plan, in fp32 and float64, and int8 changes the logits a little."""
    opened = QuantizedCheckpoint.open(quantized_folders["int4-uniform"])
    tokens = torch.arange(40).view(2, 20)
    for dtype in (torch.float32, torch.float64):
        model = MossNet(opened.config, dtype=dtype)
        for name, spec in opened.specs.items():
            model.parameter_of(spec).copy_(value(opened, name))
        seen: set[str] = set()
        inner = activation_model(opened)

        def watched(name: str, x: torch.Tensor, *, to: Any = inner, names: set[str] = seen) -> torch.Tensor:
            names.add(name)
            found: torch.Tensor = to(name, x)
            return found

        with torch.no_grad():
            plain, _ = model(tokens, run=Forward(scan="sequential"))
            rounded, _ = model(tokens, run=Forward(scan="sequential", activation=watched))
        assert 1e-4 < ((plain - rounded).norm() / plain.norm()).item() < 0.1
        assert seen == {tensor for site in opened.plan.activations for tensor in site.tensors}


Tensors = dict[str, torch.Tensor]
D = "backbone.layers.1.mixer.D"
DT = "backbone.layers.0.mixer.experts.3.dt_proj.weight"


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sign(folder)


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if name != "manifest.json":
        sign(folder)


def sign(folder: Path) -> None:
    """Make the manifest agree with the files: what a forger would do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def set_pad_code(tensors: Tensors) -> None:
    tensors[f"{DT}_packed"][5, 3] ^= 1 << 28


def set_low_code(tensors: Tensors) -> None:
    tensors[f"{D}_packed"].view(torch.uint8)[0, 9] = 0


def set_bits(values: dict[str, Any]) -> None:
    values["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "scale zero": (
        lambda f: change_tensors(f, lambda t: t[f"{D}_scale"].zero_()),
        f"{D}_scale holds values that are not positive",
    ),
    "code in the padding": (lambda f: change_tensors(f, set_pad_code), f"{DT} holds codes other than 0 in its padding"),
    "code −128": (lambda f: change_tensors(f, set_low_code), f"{D} holds codes below -127"),
    "padded shape": (lambda f: change_tensors(f, lambda t: t[f"{DT}_shape"].fill_(12)), f"{DT}_shape does not hold"),
    "kept NaN": (
        lambda f: change_tensors(f, lambda t: t["backbone.norm_f.weight"].fill_(float("nan"))),
        "backbone.norm_f.weight holds NaN",
    ),
    "format": (
        lambda f: change_json(f, "ledger.json", lambda v: v["tensors"][0].update(format="int5")),
        "a role, shape, format",
    ),
    "fewer tensors": (lambda f: change_json(f, "ledger.json", lambda v: v["tensors"].pop()), "lists other tensors"),
    "site": (
        lambda f: change_json(f, "ledger.json", lambda v: v["activations"][0].update(block=16)),
        "cannot have format",
    ),
    "state": (lambda f: change_json(f, "ledger.json", lambda v: v["state"].pop()), "lists other state arrays"),
    "config": (
        lambda f: change_json(f, "config.json", lambda v: v.update(time_step_rank=11)),
        "ledger.json: backbone.layers.0",
    ),
    "stored type": (
        lambda f: change_json(f, "config.json", lambda v: v.update(torch_dtype="float32")),
        "another recipe, size or type",
    ),
    "bits": (lambda f: change_json(f, "config.json", set_bits), "quantization_config of config.json"),
    "manifest lacks": (
        lambda f: change_json(f, "manifest.json", lambda v: v["files"].pop("model.safetensors")),
        "does not list model",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered(quantized_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(quantized_folders["int4-uniform"], tmp_path / "copy")
    tamper, message = TAMPERED[name]
    tamper(folder)
    with pytest.raises(InputError) as caught:
        QuantizedCheckpoint.open(folder).check_codes()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_are_read_where_they_go_elsewhere(quantized_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(quantized_folders["int4-uniform"], tmp_path / "copy")
    TAMPERED["code −128"][0](folder)
    QuantizedCheckpoint.open(folder)
    with pytest.raises(InputError, match="holds codes below -127"):
        export(folder, tmp_path / "out")
    with pytest.raises(InputError, match="holds codes below -127"):
        verify(folder, [tmp_path])


def test_one_flipped_bit_of_any_file_is_seen(quantized_folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "recipe.yaml", "ledger.json", "model.safetensors"):
        folder = shutil.copytree(quantized_folders["int4-uniform"], tmp_path / name)
        data = bytearray((folder / name).read_bytes())
        data[-len(data) // 3] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=r"damaged|not JSON|not a valid MossNet config|is not quantized"):
            QuantizedCheckpoint.open(folder)
    truncated = shutil.copytree(quantized_folders["int4-uniform"], tmp_path / "truncated")
    data = bytearray((truncated / "model.safetensors").read_bytes())
    (truncated / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(
        InputError, match=rf"model.safetensors has {len(data) - 1} bytes, the manifest says {len(data)}"
    ):
        QuantizedCheckpoint.open(truncated)


def test_full_precision_is_refused(checkpoint_folder: Path) -> None:
    with pytest.raises(InputError, match="is not quantized; quantize it first"):
        QuantizedCheckpoint.open(checkpoint_folder)
