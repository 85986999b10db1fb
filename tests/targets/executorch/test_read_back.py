# SPDX-License-Identifier: Apache-2.0
"""Reading back: it passes on what was exported, and names the first difference of what was changed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lowered import Lowered, Workshop
from lowered import read_back as verify
from numpy.typing import NDArray
from small import CONFIGS, write_model

from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import value
from mossquant.errors import InputError
from mossquant.model.mossnet import MossNet
from mossquant.plan.capabilities import get_capabilities
from mossquant.targets.executorch.delegate import Linear
from mossquant.targets.executorch.program_file import PlanMethod, ProgramFile
from mossquant.targets.executorch.read_back import check_linears
from mossquant.targets.export import export
from mossquant.targets.taken import Taken

AT = "backbone.layers"


@pytest.fixture(scope="module")
def source(int4: Lowered) -> Taken:
    return Taken(QuantizedCheckpoint.open(int4.checkpoint), get_capabilities("executorch"))


def test_int4_passes(int4: Lowered) -> None:
    report = verify(int4.checkpoint, int4.artifact)
    assert report.differences == ()
    assert report.passed
    assert report.weights == int4.runner.info.parameters


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("mamba", None),
        pytest.param("wide", "by expert", marks=pytest.mark.slow),
        pytest.param("pruned", "int8", marks=pytest.mark.slow),
        pytest.param("wide", "int8", marks=pytest.mark.slow),
        pytest.param("wide", "g128", marks=pytest.mark.slow),
        pytest.param("experts", None, marks=pytest.mark.slow),
        pytest.param("untied", "int4", marks=pytest.mark.slow),
        pytest.param("no window", "int4", marks=pytest.mark.slow),
        pytest.param("mamba48", "int4", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_model_passes(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = workshop(model, recipe, target="executorch")
    report = verify(lowered.checkpoint, lowered.artifact)
    assert report.differences == ()
    assert report.weights == lowered.runner.info.parameters


@pytest.mark.slow
def test_equal_tensors_are_all_found(tmp_path: Path) -> None:
    """Norms and D of a model that was not trained are all ones, which a program stores once."""
    model = MossNet(CONFIGS["mamba"])
    model.reset_parameters(0)
    checkpoint = write_model(tmp_path / "model", model.requires_grad_(False))
    export(checkpoint, tmp_path / "artifact", target="executorch")
    assert verify(checkpoint, tmp_path / "artifact").differences == ()


def _packed(codes: NDArray[np.int8], *, first_high: bool = False) -> bytes:
    """4-bit codes two to a byte: as XNNPACK's weights, the first in the low half, or as a table, in the high one."""
    unsigned = (codes.astype(np.int16) + 8).astype(np.uint8)
    first, second = unsigned[:, 0::2], unsigned[:, 1::2]
    return (first << 4 | second if first_high else second << 4 | first).tobytes()


def _bf16(scales: NDArray[np.float32]) -> bytes:
    return (scales.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _matrix(source: Taken, names: list[str], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    tensors = [source.quantized(name) for name in names]
    return (
        np.concatenate([tensor.codes.numpy() for tensor in tensors], axis),
        np.concatenate([tensor.scales.float().numpy() for tensor in tensors], axis),
    )


def _changed(program: Path, folder: Path, array: bytes, change: Callable[[bytearray], None]) -> Path:
    """A copy of a program in which an array, which lies there once, is changed."""
    data = bytearray(program.read_bytes())
    assert data.count(array) == 1
    start = data.find(array)
    part = bytearray(array)
    change(part)
    assert part != array
    data[start : start + len(array)] = part
    path = folder / "model.pte"
    path.write_bytes(data)
    return path


def _flip(at: int, bits: int) -> Callable[[bytearray], None]:
    def change(part: bytearray) -> None:
        part[at] ^= bits

    return change


def _differences(lowered: Lowered, path: Path) -> tuple[str, ...]:
    """What `verify` says, once: the same of every method."""
    report = verify(lowered.checkpoint, path)
    assert not report.passed
    found: dict[str, list[str]] = {}
    for line in report.differences:
        method, _, what = line.partition(": ")
        found.setdefault(method, []).append(what)
    assert set(found) == {"prefill", "score", "decode"}
    first, *others = found.values()
    assert all(other == first for other in others)
    return tuple(first)


ROLES = {
    # Inputs 64: a row has 32 bytes. Byte 32 · 7 + 3 holds columns 6 (low half) and 7 of row 7.
    "in_proj": (["0.mixer.in_proj"], 0, 32 * 7 + 3, r"code [7, 7] is"),
    # Four experts of 12 + 2 · 16 rows of 128; byte 64 · 46 is row 2 of expert 1.
    "x_proj": ([f"0.mixer.experts.{e}.x_proj" for e in range(4)], 0, 64 * 46, "code [46, 1] is"),
    # Four experts of 32 columns, 16 bytes, 12 of which are filled: byte 64 + 33 is row 1, expert 2, column 3.
    "dt_proj": ([f"0.mixer.experts.{e}.dt_proj" for e in range(4)], 1, 64 + 33, "code [1, 67] is"),
    "w2": ([f"1.mlp.experts.{e}.w2" for e in range(4)], 1, 5, "code [0, 11] is"),
}


@pytest.mark.parametrize("role", ROLES)
def test_a_flipped_nibble_is_named(int4: Lowered, source: Taken, tmp_path: Path, role: str) -> None:
    short, axis, place, message = ROLES[role]
    names = [f"{AT}.{name}.weight" for name in short]
    codes, _ = _matrix(source, names, axis)
    (what,) = _differences(int4, _changed(int4.program, tmp_path, _packed(codes), _flip(place, 0x10)))
    assert what.startswith(f"{names[0]}{f' … {names[-1]}' if names[1:] else ''}: {message}")
    assert what.endswith("(1 differ)")


def test_a_changed_scale_is_named(int4: Lowered, source: Taken, tmp_path: Path) -> None:
    name = f"{AT}.1.mixer.out_proj.weight"
    _, scales = _matrix(source, [name], 0)
    (what,) = _differences(int4, _changed(int4.program, tmp_path, _bf16(scales), _flip(2 * 5, 1)))
    assert what.startswith(f"{name}: scale [1, 1] is")


def test_a_changed_table_is_named(int4: Lowered, source: Taken, tmp_path: Path) -> None:
    """The table of the embedding; the head, which has the same codes, has its own copy."""
    codes, scales = _matrix(source, ["backbone.embeddings.weight"], 0)
    table = _packed(codes, first_high=True)
    (what,) = _differences(int4, _changed(int4.program, tmp_path, table, _flip(32 * 3 + 4, 0x10)))
    assert what.startswith("backbone.embeddings.weight: value [3, 4] is")
    (what,) = _differences(int4, _changed(int4.program, tmp_path, scales.tobytes(), _flip(4 * 9 + 2, 1)))
    assert what.startswith("backbone.embeddings.weight, scales: value [4, 1] is")


SMALL = {
    "0.norm.weight": (lambda value: value, "0.norm.weight: value [5] is"),
    "1.mixer.conv1d.weight": (lambda value: value[:, 0, 2], "1.mixer.conv1d.weight, tap 2: value [5] is"),
    "0.mixer.router.weight": (lambda value: value, "0.mixer.router.weight: value [0, 5] is"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_changed_small_tensor_is_named(int4: Lowered, tmp_path: Path, name: str) -> None:
    part, message = SMALL[name]
    values = value(QuantizedCheckpoint.open(int4.checkpoint), f"{AT}.{name}").view(_shape(int4, name))
    array = np.ascontiguousarray(part(values).numpy()).tobytes()
    (what,) = _differences(int4, _changed(int4.program, tmp_path, array, _flip(4 * 5, 1)))
    assert what.startswith(f"{AT}.{message}")


def _shape(lowered: Lowered, name: str) -> tuple[int, ...]:
    return QuantizedCheckpoint.open(lowered.checkpoint).specs[f"{AT}.{name}"].shape


def test_a_changed_decay_is_named(int4: Lowered, tmp_path: Path) -> None:
    file = ProgramFile(int4.program)
    decay = next(one for one in file.methods["decode"].constants if one.shape == (128, 16))
    (what,) = _differences(int4, _changed(int4.program, tmp_path, decay.tobytes(), _flip(4 * 17 + 1, 0x10)))
    assert what.startswith(f"{AT}.0.mixer.A_log: value [")


def _exchanged(program: Path, folder: Path, one: bytes, other: bytes) -> Path:
    data = bytearray(program.read_bytes())
    assert len(one) == len(other)
    assert data.count(one) == data.count(other) == 1
    first, second = data.find(one), data.find(other)
    data[first : first + len(one)], data[second : second + len(one)] = other, one
    path = folder / "model.pte"
    path.write_bytes(data)
    return path


def test_whole_tensors_exchanged_are_seen(int4: Lowered, source: Taken, tmp_path: Path) -> None:
    """w1 and w3 have one shape: each is whole, and neither is in its place."""
    both = [[f"{AT}.0.mlp.experts.{e}.{role}.weight" for e in range(4)] for role in ("w1", "w3")]
    (one, scales), (other, others) = (_matrix(source, names, 0) for names in both)
    path = _exchanged(int4.program, tmp_path, _packed(one), _packed(other))
    first, second = _differences(int4, path)
    assert first.startswith(f"{both[0][0]} … {both[0][-1]}: code [0, ")
    assert second.startswith(f"{both[1][0]} … {both[1][-1]}: code [0, ")
    folder = tmp_path / "scales"
    folder.mkdir()
    first, second = _differences(int4, _exchanged(path, folder, _bf16(scales), _bf16(others)))
    titles = [f"{names[0]} … {names[-1]}" for names in both]
    assert first == f"{titles[0]}: {titles[1]} is in its place"
    assert second == f"{titles[1]}: {titles[0]} is in its place"


def test_a_program_is_held_against_the_manifest_beside_it(int4: Lowered, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int4.artifact, tmp_path / "artifact"))
    norm = next(one for one in ProgramFile(int4.program).methods["decode"].constants if one.shape == (64,))
    _changed(int4.program, folder, norm.tobytes(), _flip(5, 1))
    with pytest.raises(InputError, match=r"is not what its manifest\.json says: model\.pte has another SHA-256"):
        verify(int4.checkpoint, folder)
    (folder / "manifest.json").unlink()
    assert len(_differences(int4, folder)) == 1


def test_every_array_matters(int4: Lowered, tmp_path: Path) -> None:
    """Whatever array of a method is changed anywhere, reading back sees it."""
    random, data = np.random.default_rng(0), bytearray(int4.program.read_bytes())
    method = ProgramFile(int4.program).methods["decode"]
    arrays = [one.tobytes() for one in method.constants if one.size > 16]
    for linear in (one for part in method.delegates for one in part.linears):
        arrays.append(_packed(linear.codes) if linear.bits == 4 else linear.codes.tobytes())
    assert len(arrays) == 21 + 21
    for array in arrays:
        assert data.count(array) == 1
        data[data.find(array) + int(random.integers(len(array)))] ^= 0x40
    (tmp_path / "model.pte").write_bytes(data)
    assert len(_differences(int4, tmp_path / "model.pte")) == len(arrays)


def _with_linears(file: ProgramFile, change: Callable[[list[Linear]], list[Linear]]) -> ProgramFile:
    """A file whose decode has other linears, as far as `check_linears` looks."""
    methods: dict[str, PlanMethod] = dict(file.methods)
    decode = methods["decode"]
    linears = [linear for part in decode.delegates for linear in part.linears]
    part = replace(decode.delegates[0], linears=tuple(change(linears)))
    methods["decode"] = replace(decode, delegates=(part,))
    return SimpleNamespace(methods=methods)  # type: ignore[return-value]


def test_what_the_lowering_lost_is_named(int4: Lowered, source: Taken) -> None:
    file, specs = ProgramFile(int4.program), list(QuantizedCheckpoint.open(int4.checkpoint).specs.values())
    check_linears(file, source, specs)
    check_linears(_with_linears(file, lambda linears: linears), source, specs)

    def left_in_fp32(linears: list[Linear]) -> list[Linear]:
        quantized = next(i for i, one in enumerate(linears) if one.bits == 4)
        one = linears[quantized]
        plain = replace(one, bits=None, group=0, rounds_input=False)
        return [*linears[:quantized], plain, *linears[quantized + 1 :]]

    faults: dict[str, Callable[[list[Linear]], list[Linear]]] = {
        r"decode: .* is not in the file as 4-bit": lambda linears: [x for x in linears if x.bits is None],
        r"decode: .*router\.weight.* is not in the file as fp32": lambda linears: [
            x for x in linears if x.bits is not None
        ],
        r"decode: .*weight is not in the file as 4-bit .*; fp32 .* belongs to no tensor": left_in_fp32,
        r"decode: 4-bit .* is in the file and belongs to no tensor": lambda linears: [
            *linears,
            next(x for x in linears if x.bits == 4),
        ],
        r"decode: .*its input .*rounded is in the file": lambda linears: [
            replace(linears[0], rounds_input=not linears[0].rounds_input),
            *linears[1:],
        ],
    }
    for message, change in faults.items():
        with pytest.raises(RuntimeError, match=message):
            check_linears(_with_linears(file, change), source, specs)
    outside = dict(file.methods)
    outside["score"] = replace(outside["score"], operators=("aten::mm.out",))
    with pytest.raises(RuntimeError, match=r"score: linears were left outside the delegate: aten::mm\.out"):
        check_linears(SimpleNamespace(methods=outside), source, specs)  # type: ignore[arg-type]


def test_an_artifact_of_another_recipe(workshop: Workshop) -> None:
    lowered = workshop("mamba", target="executorch")
    report = verify(workshop.checkpoint("mamba", "int4"), lowered.artifact)
    assert not report.passed
    assert "is not in the file as 4-bit" in report.summary
    assert report.summary.endswith("it says that it was lowered from another checkpoint than this")


def test_an_artifact_of_another_model(workshop: Workshop, int4: Lowered) -> None:
    with pytest.raises(InputError, match="is a model of another shape than"):
        verify(int4.checkpoint, workshop("mamba", target="executorch").artifact)
