# SPDX-License-Identifier: Apache-2.0
"""What an export writes: the same bytes each time, beside another target's program, or nothing at all."""

from pathlib import Path

import pytest
from lowered import Lowered, Workshop

from mossquant.calibration.quantize import quantize
from mossquant.errors import InputError
from mossquant.files.outputs import file_sha256
from mossquant.model.mossnet import state_specs
from mossquant.targets.artifact import Artifact
from mossquant.targets.executorch import export as exporting
from mossquant.targets.executorch import packages
from mossquant.targets.executorch.lower import _STAGES
from mossquant.targets.executorch.open import read_metadata
from mossquant.targets.executorch.program_file import ProgramFile
from mossquant.targets.export import export


@pytest.fixture
def no_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before any work."""
    monkeypatch.setattr(exporting, "lower", lambda *_, **__: pytest.fail("the work began"))


def test_both_targets_in_one_folder(workshop: Workshop, tmp_path: Path) -> None:
    """And the .pte, lowered a second time, is the same to the byte."""
    seen: list[tuple[str, int, int]] = []
    lowered = workshop("mamba", target="executorch")
    artifact = export(
        lowered.checkpoint,
        tmp_path / "both",
        target=["onnx", "executorch"],
        progress=lambda *now: seen.append(now),
    )
    assert artifact.targets == ("onnx", "executorch")
    assert set(artifact.files) == {"model.onnx", "model.pte"}
    assert artifact.bytes == sum(path.stat().st_size for path in (tmp_path / "both").glob("model.*"))
    assert artifact.program("executorch").read_bytes() == lowered.program.read_bytes()
    assert artifact.program("onnx").read_bytes() == workshop("mamba").program.read_bytes()
    assert Artifact.open(tmp_path / "both").manifest == artifact.manifest
    assert seen[-7:] == [(name, done, 6) for done, name in enumerate(_STAGES)]


def test_a_program_that_cannot_be_read_back_is_our_fault(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user gave a good checkpoint, and is not told to copy a folder again."""
    source = workshop.checkpoint("mamba")
    monkeypatch.setattr(
        exporting, "lower", lambda tensors, specs, metadata, path, progress: path.write_bytes(bytes(99))
    )
    with pytest.raises(RuntimeError, match=r"what was lowered cannot be used: .* is not a \.pte that can be read"):
        export(source, tmp_path / "out", target="executorch")
    assert list(tmp_path.iterdir()) == []


def test_manifest(int4: Lowered) -> None:
    artifact = Artifact.open(int4.artifact)
    record = artifact.manifest.programs["executorch"]
    assert artifact.program("executorch") == int4.program
    assert artifact.files["model.pte"].sha256 == file_sha256(int4.program)
    assert record.model == read_metadata(ProgramFile(int4.program)).model_dump()
    assert record.runtime.minimum == packages.EXECUTORCH
    assert record.runtime.operators["delegates"] == ["XnnpackBackend"]
    assert "embedding_4bit.out" in record.runtime.operators["quantized_decomposed"]
    states = [spec.name for spec in state_specs(int4.config)]
    assert set(record.methods) == {"prefill", "score", "decode"}
    for name, ports in record.methods.items():
        assert [port.name for port in ports.inputs] == ["tokens", *states]
        assert [port.name for port in ports.outputs] == ["logits", *(f"{state}.out" for state in states)]
        assert ports.inputs[0].shape == [1, 1 if name == "decode" else "T"]
        assert ports.outputs[0].shape == [1, "T" if name == "score" else 1, int4.config.vocab_size]


def test_the_format_that_stands_in_is_said(int4: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it was asked for. The program is taken from where it lies already."""

    def copied(source: object, specs: object, metadata: object, path: Path, *_: object) -> None:
        path.write_bytes(int4.program.read_bytes())

    monkeypatch.setattr(exporting, "lower", copied)
    planned = export(int4.checkpoint, tmp_path / "planned", target="executorch")
    assert planned.notes == ("model.pte: inputs are int8_row_asym in place of the planned int8_block",)
    assert export(int4.checkpoint, tmp_path / "asked", target="executorch", activations="int8").notes == ()


def test_a_lowering_that_lost_something_leaves_nothing(
    int4: Lowered, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with other linears than the plan's, as a lowering that skips one would make."""

    def other(source: object, specs: object, metadata: object, path: Path, *_: object) -> None:
        path.write_bytes(int4.program.read_bytes())

    monkeypatch.setattr(exporting, "lower", other)
    with pytest.raises(RuntimeError, match=r"in_proj\.weight.* is not in the file as 8-bit"):
        export(workshop.checkpoint("pruned", "int8"), tmp_path / "artifact", target="executorch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_lowering")
def test_what_the_target_cannot_hold_is_refused_before_any_work(workshop: Workshop, tmp_path: Path) -> None:
    recipe = tmp_path / "blocks.yaml"
    recipe.write_text(
        "version: 1\nname: blocks\ntargets: [torch]\nweights:\n"
        '  - {role: "*norm*", keep: fp32, why: few}\n  - {role: "*.router", keep: fp32, why: few, optional: true}\n'
        '  - {role: ssm.out_proj, format: int8_g32}\n  - {role: "*", format: int8}\n'
        'activations:\n  - {role: "*", format: fp32}\nstate:\n  - {role: "*", format: fp32}\n'
    )
    quantize(workshop.checkpoint("wide"), tmp_path / "blocks", recipe=recipe)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        export(tmp_path / "blocks", tmp_path / "artifact", target=["onnx", "executorch"])
    message = str(caught.value)
    for layer in (0, 1):
        name = f"backbone.layers.{layer}.mixer.out_proj.weight"
        assert f"executorch cannot hold {name} in int8_g32 (it holds int8, int4_g32, int4_g128)" in message
    assert "executorch cannot take fp32 at layers.0.mixer.in_proj.input (it takes int8_row_asym)" in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_lowering")
def test_activations_that_there_are_not(int4: Lowered, workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="executorch has no linears with quantized weights and fp32 activations"):
        export(int4.checkpoint, tmp_path / "artifact", target="executorch", activations="fp32")
    with pytest.raises(InputError, match="is not quantized, and int8 activations meet quantized weights only"):
        export(workshop.checkpoint("wide"), tmp_path / "artifact", target="executorch", activations="int8")
    assert list(tmp_path.iterdir()) == []
