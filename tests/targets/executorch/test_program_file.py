# SPDX-License-Identifier: Apache-2.0
"""A .pte is read from its bytes; whatever bytes they are, the answer is what it holds or one line."""

import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lowered import Lowered
from lowered import read_back as verify
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.model.mossnet import state_specs
from mossquant.targets.executorch import program_file
from mossquant.targets.executorch.delegate import Delegate, Linear, read_delegate
from mossquant.targets.executorch.flatbuffer import Budget, DamagedError, root
from mossquant.targets.executorch.lower import CHUNK
from mossquant.targets.executorch.metadata import open_program, read_metadata, weight_bytes
from mossquant.targets.executorch.program_file import CONSTANTS, WEIGHTS, ProgramFile
from mossquant.targets.export import export
from mossquant.targets.program import METHODS

MUTATIONS = 100


@pytest.fixture(scope="module")
def file(int4: Lowered) -> ProgramFile:
    return ProgramFile(int4.program)


def test_sections_are_the_file(int4: Lowered, file: ProgramFile) -> None:
    assert sum(file.sections.values()) == int4.program.stat().st_size
    assert all(size >= 0 for size in file.sections.values())
    assert set(file.sections) == {"methods", "delegates' graphs", WEIGHTS, CONSTANTS, "alignment"}


def test_weights_take_the_bytes_of_the_checkpoint(int4: Lowered) -> None:
    """Beside it: small tensors as fp32, and rows without the checkpoint's padding to whole words."""
    payload = QuantizedCheckpoint.open(int4.checkpoint).origin.payload_bytes
    assert payload <= weight_bytes(open_program(int4.program)) <= 1.5 * payload


def test_methods(int4: Lowered, file: ProgramFile) -> None:
    config = int4.config
    states = [("<f4", (1, *spec.shape)) for spec in state_specs(config)]
    assert set(file.methods) == set(METHODS)
    for name, method in file.methods.items():
        length = 1 if name == "decode" else CHUNK
        assert method.name == name
        assert list(method.inputs) == [("<i8", (1, length)), *states]
        assert list(method.outputs) == [("<f4", (1, length if name == "score" else 1, config.vocab_size)), *states]
        assert method.planned_bytes > 0
        assert any("embedding_4bit" in operator for operator in method.operators)
        assert not any(re.search(r"::(mm|addmm|linear)\b", operator) for operator in method.operators)


def test_linears(file: ProgramFile) -> None:
    for method in file.methods.values():
        linears = [linear for delegate in method.delegates for linear in delegate.linears]
        # A block: in_proj, x_proj, dt_proj, out_proj, w1, w3, w2 in codes; two routers and the mixer of biases in fp32.
        assert sum(linear.bits == 4 for linear in linears) == 2 * 7 + 1
        assert sum(linear.bits is None for linear in linears) == 2 * 3
        for linear in linears:
            assert linear.rounds_input == (linear.bits is not None)
            if linear.bits == 4:
                assert linear.group == 32
                assert linear.codes.shape == (len(linear.scales), 32 * linear.scales.shape[1])
                assert -8 <= linear.codes.min() <= linear.codes.max() <= 7


def test_a_vector_holds_a_table_once_and_names_are_short() -> None:
    """A root whose first field is a vector of two tables with a name each."""

    def buffer(second: int, length: int) -> bytes:
        vtable = struct.pack("<HHH", 6, 8, 4)
        # 0 root at 16 | 4 identifier | 8 vtable | 16 root | 24 vector | 36 table | 44 table | 52 name
        data = struct.pack("<I4s", 16, b"TEST") + vtable.ljust(8, b"\0") + struct.pack("<iI", 8, 4)
        data += struct.pack("<III", 2, 36 - 28, second - 32)
        data += struct.pack("<iI", 36 - 8, 52 - 40) + struct.pack("<iI", 44 - 8, 52 - 48)
        return data + struct.pack("<I", length) + b"n" * length

    assert [table.string(0) for table in root(memoryview(buffer(44, 256)), b"TEST", Budget()).tables(0)] == [
        "n" * 256
    ] * 2
    with pytest.raises(DamagedError, match="holds one table twice"):
        list(root(memoryview(buffer(36, 5)), b"TEST", Budget()).tables(0))
    with pytest.raises(DamagedError, match="a name has 257 bytes"):
        next(root(memoryview(buffer(44, 257)), b"TEST", Budget()).tables(0)).string(0)


def test_a_method_holds_no_more_than_the_file(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, or constants, named again and again; equal blocks are fine."""

    def equal(found: Delegate) -> Delegate:
        return replace(found, linears=found.linears * 20)

    def linears(found: Delegate) -> Delegate:
        return replace(found, linears=found.linears * 1000)

    def constants(found: Delegate) -> Delegate:
        return replace(found, constants=(np.zeros(1 << 18, np.float32),) * 1000)

    with monkeypatch.context() as patch:
        _change_delegates(patch, equal)
        assert ProgramFile(int4.program).methods.keys() == set(METHODS)
    for change in (linears, constants):
        with monkeypatch.context() as patch:
            _change_delegates(patch, change)
            with pytest.raises(InputError, match=r"a method has \d+ times the weights that the file has bytes for"):
                _ = ProgramFile(int4.program).methods


def test_weights_of_no_bytes_are_counted_too(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Delegates that share one payload, each with all of its linears."""

    def empty(found: Delegate) -> Delegate:
        none = np.empty(0, np.float32)
        return replace(found, linears=(Linear(None, 0, False, (0, 0), memoryview(b""), none),) * 50_000)

    _change_delegates(monkeypatch, empty)
    with pytest.raises(InputError, match=r"its parts have more than 262,144 entries together"):
        _ = ProgramFile(int4.program).methods


def _change_delegates(patch: pytest.MonkeyPatch, change: Callable[[Delegate], Delegate]) -> None:
    def changed(*args: object) -> Delegate:
        return change(read_delegate(*args))  # type: ignore[arg-type]

    patch.setattr(program_file, "read_delegate", changed)


def test_what_is_read_of_a_file_is_counted(int4: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry, of its methods and of its delegates' graphs; a file that was lowered needs few of them."""
    given: list[int] = []

    class Counted(Budget):
        def spend(self, count: int) -> None:
            given.append(count)
            super().spend(count)

    monkeypatch.setattr(program_file, "Budget", Counted)
    methods = ProgramFile(int4.program).methods
    linears = sum(len(part.linears) for method in methods.values() for part in method.delegates)
    assert linears < sum(given) < 1500 * int4.config.num_hidden_layers + 1000
    monkeypatch.setattr(program_file, "Budget", lambda: Budget(sum(given) - 1))
    with pytest.raises(InputError, match=f"its parts have more than {sum(given) - 1:,} entries together"):
        _ = ProgramFile(int4.program).methods


def test_a_vector_that_is_too_long_costs_nothing() -> None:
    """Its length is known before anything is made of it."""
    count = 1 << 24
    vtable = struct.pack("<HHH", 6, 8, 4)
    data = struct.pack("<I4s", 16, b"TEST") + vtable.ljust(8, b"\0") + struct.pack("<iI", 8, 4)
    data += struct.pack("<I", count) + struct.pack("<I", 4) * count
    tracemalloc.start()
    with pytest.raises(DamagedError, match="more than 262,144 entries"):
        next(root(memoryview(data), b"TEST", Budget()).tables(0))
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


@pytest.mark.slow
def test_equal_blocks_are_stored_once_and_read_as_many(tmp_path: Path) -> None:
    """A model that was made deeper by repeating a block: its linears are more than the file's bytes."""
    config = replace(SMALL, num_hidden_layers=4, num_ssm_experts=1, num_mlp_experts=0, mlp_intermediate_size=0)
    model = random_model(config, dtype=torch.float32)
    for block in model.layers[1:]:
        block.load_state_dict(model.layers[0].state_dict())
    source = write_model(tmp_path / "model", model, dtype=torch.bfloat16)
    quantize(source, tmp_path / "int4", recipe="int4")
    artifact = export(tmp_path / "int4", tmp_path / "out", target="executorch")
    report = verify(tmp_path / "int4", locate(artifact.folder))
    assert report.passed
    weights = ProgramFile(artifact.program("executorch"))
    linears = sum(one.stored_bytes for part in weights.methods["decode"].delegates for one in part.linears)
    assert linears > 2 * weights.sections[WEIGHTS]


@pytest.mark.parametrize(
    "recipe", ["int4", *(pytest.param(each, marks=pytest.mark.slow) for each in ("int8", None))], ids=str
)
def test_a_tied_table_counts_once_whatever_else_has_its_shape(tmp_path: Path, recipe: str | None) -> None:
    """A is [E, N], the table [V, D] and its scales [V, groups]; here E = N = V = D."""
    config = replace(SMALL, vocab_size=24, hidden_size=24, expand=1, state_size=24, num_mlp_experts=0)
    config = replace(config, num_ssm_experts=1, mlp_intermediate_size=0)
    source = write_model(tmp_path / "model", random_model(config, dtype=torch.float32), dtype=torch.bfloat16)
    if recipe is not None:
        quantize(source, tmp_path / "quantized", recipe=recipe)
        source = tmp_path / "quantized"
    opened = open_program(export(source, tmp_path / "out", target="executorch").program("executorch"))
    values = sum(one.stored_bytes for part in opened.file.methods["decode"].delegates for one in part.linears)
    # A, the taps, their bias, D, the bias of Δ and a norm of every block; and the last norm. All have 24 rows.
    small = 4 * 24 * (config.num_hidden_layers * (24 + config.conv_kernel + 4) + 1)
    assert abs(weight_bytes(opened) - values - small) <= 0.05 * values + 200


@pytest.mark.parametrize("kept", [0, 1, 7, 40, 100, 5000, 0.5, 0.999])
def test_a_file_that_was_cut_short(int4: Lowered, tmp_path: Path, kept: float) -> None:
    data, path = int4.program.read_bytes(), tmp_path / "model.pte"
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"model\.pte is (empty|not a \.pte that can be read)"):
        ProgramFile(path)


@pytest.mark.parametrize(
    "content", [b"plain text, not a program\n" * 20, b"PK\x03\x04 pickle", bytes(5000), b"\xff" * 5000]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a \.pte that can be read"):
        ProgramFile(path)


def _flips(data: bytearray, random: np.random.Generator, size: int) -> None:
    """Other bytes at a few places."""
    for at in random.integers(0, size, random.integers(1, 4)):
        data[at] ^= int(random.integers(1, 256))


def _extremes(data: bytearray, random: np.random.Generator, size: int) -> None:
    """Offsets, counts and sizes that point far away, or back."""
    for at in 4 * random.integers(0, size // 4, random.integers(1, 4)):
        value = int(random.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, size, size // 2]))
        data[at : at + 4] = value.to_bytes(4, "little")


def _zeros(data: bytearray, random: np.random.Generator, size: int) -> None:
    """A piece that was never written."""
    at = int(random.integers(0, size - 64))
    data[at : at + 64] = bytes(64)


@pytest.mark.parametrize("mutate", [_flips, _extremes, _zeros])
@pytest.mark.parametrize("part", ["methods", "graphs"])
def test_any_damage_is_an_answer(
    int4: Lowered,
    file: ProgramFile,
    tmp_path: Path,
    part: str,
    mutate: Callable[[bytearray, np.random.Generator, int], None],
) -> None:
    """In the outer flatbuffer, and anywhere: read as something, or refused in one line; never another exception."""
    whole, path = int4.program.read_bytes(), tmp_path / "model.pte"
    size = file.program_bytes if part == "methods" else len(whole)
    refused = []
    for seed in range(MUTATIONS):
        data = bytearray(whole)
        mutate(data, np.random.default_rng(seed), size)
        path.write_bytes(data)
        try:
            found = ProgramFile(path)
            assert read_metadata(found).target == "executorch"
            assert found.methods.keys()
            assert sum(found.sections.values()) == len(data)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= MUTATIONS / 20, "the damage was not where it is looked for"
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


def test_sizes_that_no_array_has(int4: Lowered, file: ProgramFile, tmp_path: Path) -> None:
    """Sizes of a constant are looked at before an array is made of them."""
    data, path = bytearray(int4.program.read_bytes()), tmp_path / "model.pte"
    table = int4.config.vocab_size.to_bytes(4, "little") + (32).to_bytes(4, "little")
    places = [found.start() for found in re.finditer(re.escape(table), bytes(data[: file.program_bytes]))]
    assert places
    for count, first in ((2, 1 << 31), (129, 1), (2, (1 << 31) - 1)):
        changed = bytearray(data)
        for at in places:
            changed[at - 4 : at + 4] = count.to_bytes(4, "little") + first.to_bytes(4, "little")
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"is not a \.pte that can be read"):
            assert ProgramFile(path).methods


def test_a_program_of_another_project(int4: Lowered, tmp_path: Path) -> None:
    data, path = int4.program.read_bytes(), tmp_path / "model.pte"
    assert data.count(b"mossquant\0") >= 1
    path.write_bytes(data.replace(b"mossquant\0", b"somebody1\0"))
    with pytest.raises(InputError, match="was not written by mossquant"):
        read_metadata(ProgramFile(path))


def test_metadata_of_another_release(int4: Lowered, tmp_path: Path) -> None:
    data, path = int4.program.read_bytes(), tmp_path / "model.pte"
    path.write_bytes(data.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(InputError, match=r"version: .*another release of mossquant wrote it"):
        read_metadata(ProgramFile(path))


def _flatbuffer() -> bytes:
    """A table with a number, a string and a vector of numbers, built by hand; every distance counts from its place."""
    parts = [
        np.array([20], "<u4").tobytes() + b"TEST",  # 0: where the table is, and what it is
        np.array([10, 16, 4, 8, 12, 0], "<u2").tobytes(),  # 8: vtable: its size, the table's, three slots, padding
        np.array([12, 7, 8, 12], "<i4").tobytes(),  # 20: table: back to the vtable, 7, to 36, to 44
        np.array([3], "<u4").tobytes() + b"abc\0",  # 36: string
        np.array([2, 4, 5], "<u4").tobytes(),  # 44: vector
    ]
    return b"".join(parts)


def _everything(data: memoryview) -> tuple[int, str, list[int]]:
    table = root(data, b"TEST", Budget())
    return table.number(0), table.string(1), table.numbers(2).tolist()


def test_a_flatbuffer_by_hand() -> None:
    table = root(memoryview(_flatbuffer()), b"TEST", Budget())
    assert _everything(memoryview(_flatbuffer())) == (7, "abc", [4, 5])
    assert (table.number(9, default=3), table.string(9), list(table.tables(9)), table.table(9)) == (3, "", [], None)


@pytest.mark.parametrize("length", range(0, 56, 2))
def test_a_flatbuffer_that_ends_early(length: int) -> None:
    data = memoryview(_flatbuffer()[:length])
    with pytest.raises(DamagedError):
        _everything(data)


def test_a_flatbuffer_that_points_outside() -> None:
    for place in (20, 28, 32):
        for value in (0x7FFFFFFF, 0xFFFFFFFF, 0x80000000):
            data = bytearray(_flatbuffer())
            data[place : place + 4] = value.to_bytes(4, "little")
            with pytest.raises(DamagedError):
                _everything(memoryview(data))
