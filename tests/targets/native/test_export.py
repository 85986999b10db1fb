# SPDX-License-Identifier: Apache-2.0
"""What an export writes: a safetensors file, packed as docs/native.md says, and the same bytes each time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lowered import MODELS, Workshop
from safetensors import safe_open

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.eval.info import info
from mossquant.files.outputs import file_sha256
from mossquant.kernels import _native
from mossquant.targets.artifact import Artifact
from mossquant.targets.export import export, export_needs
from mossquant.targets.native.export import host_layout
from mossquant.targets.native.open import open_program

LAYOUTS = ("x86", "arm", "rows")
CASES = [(model, recipe) for model in MODELS for recipe in (None, "int4")]
CASES += [("wide", "int8"), ("wide", "g128"), ("wide", "one input")]


@pytest.mark.parametrize(("recipe", "isa"), [(None, "x86"), *(("int4", isa) for isa in LAYOUTS)])
def test_the_same_bytes_each_time(workshop: Workshop, tmp_path: Path, recipe: str | None, isa: str) -> None:
    checkpoint = workshop.checkpoint("wide", recipe)
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    for name, source in (("one", checkpoint), ("two", moved)):
        export(source, tmp_path / name, target="native", isa=isa)
    for file in ("model.moss", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_safetensors_library_opens_it(workshop: Workshop, model: str, recipe: str | None) -> None:
    """And finds every tensor of the checkpoint as a row of bytes; they begin at multiples of 64."""
    lowered = workshop(model, recipe, target="native")
    weights, opened = open_weights(lowered.checkpoint, verb="look"), open_program(lowered.program)
    with safe_open(lowered.program, framework="np") as file:
        assert set(file.metadata()) == {"moss", "mossquant"}
        formats = json.loads(file.metadata()["moss"])["formats"]
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert stored.keys() == formats.keys() == weights.specs.keys()
    for name, data in stored.items():
        assert (data.dtype, data.shape) == (np.uint8, (data.size,))
        assert (opened.spans[name].start % 64, data.size % 64) == (0, 0)
        np.testing.assert_array_equal(opened.stored(name), data)
        number_format = weights.format(name)
        if number_format is not None:
            assert formats[name] == number_format.name
            continue
        values = weights.kept(name)
        assert formats[name] == str(values.dtype).removeprefix("torch.")
        held = torch.from_numpy(data[: values.nbytes]).view(values.dtype).view(values.shape)
        assert torch.equal(held, values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_lie_as_the_page_says(workshop: Workshop, layout: str) -> None:
    """Matrices in the file's layout, in_proj as two of them, small tensors in `rows`."""
    lowered = workshop("wide", "int4", target="native", isa=layout)
    weights, opened = QuantizedCheckpoint.open(lowered.checkpoint), open_program(lowered.program)
    inner, at = lowered.config.d_inner, "backbone.layers.0.mixer"
    expected = {
        "backbone.embeddings.weight": (layout, [slice(0, 80)]),
        f"{at}.in_proj.weight": (layout, [slice(0, inner), slice(inner, 2 * inner)]),
        f"{at}.experts.2.x_proj.weight": (layout, [slice(0, 44)]),
        f"{at}.experts.3.dt_proj.weight": (layout, [slice(0, inner)]),
        f"{at}.conv1d.weight": ("rows", [slice(0, 4)]),
        f"{at}.A_log": ("rows", [slice(0, inner)]),
        f"{at}.D": ("rows", [slice(0, 1)]),
    }
    for name, (own, parts) in expected.items():
        tensor, stored, begin = weights.quantized(name), np.array(opened.stored(name)), 0
        for part in parts:
            codes = np.empty((part.stop - part.start, tensor.columns), np.int8)
            scales = torch.empty_like(tensor.scales[part])
            end = begin + _native.packed_bytes(own, tensor.format.name, *codes.shape)
            bits = scales.numpy() if scales.dtype == torch.float32 else scales.view(torch.uint16).numpy()
            _native.unpack(own, tensor.format.name, stored[begin:end], codes, bits)
            np.testing.assert_array_equal(codes, tensor.codes[part, : tensor.columns])
            assert torch.equal(scales, tensor.scales[part]), name
            begin = end
        assert stored.size - begin in range(64), name
        assert not stored[begin:].any(), name


def test_metadata(workshop: Workshop) -> None:
    lowered = workshop("wide", "int4", target="native")
    source, opened = QuantizedCheckpoint.open(lowered.checkpoint), open_program(lowered.program)
    metadata = opened.metadata
    assert (metadata.version, metadata.target, metadata.weights) == (1, "native", "int4-uniform")
    assert (metadata.activations, metadata.state_format, metadata.layout) == ("int8_block", "fp32", host_layout())
    assert metadata.config == source.config.to_json(torch_dtype="bfloat16")
    assert metadata.source_files == source.origin.files
    assert metadata.payload_bytes == source.origin.payload_bytes
    assert opened.config == MODELS["wide"]
    assert open_program(workshop("wide", target="native").program).metadata.activations == "fp32"


def test_what_libmoss_is_told(workshop: Workshop) -> None:
    """Experts are counted layer by layer, and where fewer are left than are chosen, all of them are chosen."""
    with safe_open(workshop("pruned", "int4", target="native", isa="arm").program, framework="np") as file:
        said = json.loads(file.metadata()["moss"])
    config = said.pop("config")
    assert said.pop("formats")["backbone.layers.1.mixer.x_proj.weight"] == "int4_g32"
    assert said == {"version": 1, "layout": "arm"}
    assert config == {
        **{"vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "d_inner": 40, "state_size": 5},
        **{"conv_kernel": 4, "time_step_rank": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        **{"mlp_intermediate_size": 13, "ssm_experts": [3, 1], "ssm_chosen": [2, 1]},
        **{"mlp_experts": [0, 1], "mlp_chosen": [0, 1]},
    }


def test_manifest(workshop: Workshop) -> None:
    lowered = workshop("wide", "int8", target="native")
    artifact = Artifact.open(lowered.artifact)
    record = artifact.manifest.programs["native"]
    assert artifact.program("native") == lowered.program
    assert artifact.files["model.moss"].sha256 == file_sha256(lowered.program)
    assert record.model == open_program(lowered.program).metadata.model_dump()
    assert (record.runtime.name, record.runtime.minimum) == ("libmoss", "0.1.0")
    names = [port.name for port in record.methods["forward"].inputs]
    assert names == ["tokens", *(f"layers.{i}.mixer.{state}" for i in (0, 1) for state in ("conv", "ssm"))]


@pytest.mark.parametrize("isa", LAYOUTS)
@pytest.mark.parametrize(("model", "recipe"), [("wide", "one input"), ("untied", "g128"), ("no window", None)])
def test_info_accounts_for_every_byte(workshop: Workshop, model: str, recipe: str | None, isa: str) -> None:
    lowered = workshop(model, recipe, target="native", isa=isa)
    report = info(lowered.artifact)
    assert (report.kind, report.program_bytes) == ("native", lowered.program.stat().st_size)
    assert sum(list(report.sections.values())[:-1]) == report.weight_bytes
    assert all(size >= 0 for size in report.sections.values())
    assert dict(report.facts)["packed for"].startswith(isa)
    assert report.active_parameters < report.parameters
    scales = report.sections["scales"]
    assert (scales > 0) == (recipe is not None)


def test_export_says_what_it_needs(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.checkpoint("wide", "int4")
    needs = export_needs(checkpoint, target="native", isa="x86")
    artifact = export(checkpoint, tmp_path / "a", target="native", isa="x86")
    assert needs.targets["native"][0] == artifact.program("native").stat().st_size


def test_progress_reaches_the_end(workshop: Workshop, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    export(workshop.checkpoint("wide"), tmp_path / "a", target="native", progress=lambda *now: seen.append(now))
    total = open_program(tmp_path / "a" / "model.moss").metadata.weight_bytes
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_the_machines_own_layout_is_the_default(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.checkpoint("wide", "int4")
    for name, isa in (("none", None), ("host", "host"), ("named", host_layout())):
        export(checkpoint, tmp_path / name, target="native", isa=isa)
    programs = [(tmp_path / name / "model.moss").read_bytes() for name in ("none", "host", "named")]
    assert programs == [programs[0]] * 3


def test_what_cannot_be_held_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """Before any work. Full-precision weights meet fp32 inputs whatever is asked for."""
    quantized = workshop.checkpoint("wide", "int4")
    cases = [
        (quantized, {"activations": "fp32"}, "native has no linears with quantized weights and fp32 activations"),
        (workshop.checkpoint("wide", "mixed"), {}, r"native cannot take fp32 at layers\.1\.mixer\.out_proj\.input"),
        (quantized, {"isa": "sparc"}, "unknown --isa value 'sparc'; known values: host, x86, arm, rows"),
        (quantized, {"scales": "folded"}, "--scales is for onnx and not for native"),
    ]
    for model, options, message in cases:
        with pytest.raises(InputError, match=message):
            export(model, tmp_path / "artifact", target="native", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--isa is for native and not for onnx"):
        export(quantized, tmp_path / "artifact", isa="x86")
    assert list(tmp_path.iterdir()) == []
    export(workshop.checkpoint("wide"), tmp_path / "artifact", target="native", activations="fp32")


def test_a_plan_for_another_target(workshop: Workshop, tmp_path: Path) -> None:
    """Inputs in a format that libmoss lacks are rounded in its own, which is said."""
    artifact = export(workshop.checkpoint("wide", "by expert"), tmp_path / "artifact", target="native")
    assert artifact.notes == ("model.moss: inputs are int8_block in place of the planned int8_row_asym",)


def test_routers_and_norms_must_be_kept(workshop: Workshop, tmp_path: Path) -> None:
    recipe = tmp_path / "all.yaml"
    recipe.write_text(
        'version: 1\nname: all\ntargets: [torch]\nweights:\n  - {role: "*", format: int8}\n'
        'activations:\n  - {role: "*", format: int8_block}\nstate:\n  - {role: "*", format: fp32}\n'
    )
    quantize(workshop.checkpoint("wide"), tmp_path / "all", recipe=recipe)
    with pytest.raises(InputError, match=r"native holds no codes for .*norm\.weight .*: keep it"):
        export(tmp_path / "all", tmp_path / "artifact", target="native")
