# SPDX-License-Identifier: Apache-2.0
"""A .pte is read from its bytes; whatever bytes they are, the answer is what it holds or one line."""

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kept import KEPT, KEPT_PTE
from small import SMALL, random_model, write_model

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.targets.executorch.delegate import sizes
from mossquant.targets.executorch.flatbuffer import DamagedError, root
from mossquant.targets.executorch.open import open_program, read_metadata, weight_bytes
from mossquant.targets.executorch.program_file import CONSTANTS, WEIGHTS, ProgramFile, read
from mossquant.targets.export import export


@pytest.fixture(scope="module")
def file() -> ProgramFile:
    return ProgramFile(KEPT_PTE)


def test_sections_are_the_file(file: ProgramFile) -> None:
    assert sum(file.sections.values()) == KEPT_PTE.stat().st_size
    assert all(size >= 0 for size in file.sections.values())
    assert set(file.sections) == {"methods", "delegates' graphs", WEIGHTS, CONSTANTS, "alignment"}


def test_weights_take_the_bytes_of_the_checkpoint() -> None:
    """Beside it: small tensors as fp32, and rows without the checkpoint's padding to whole words."""
    payload = QuantizedCheckpoint.open(KEPT / "int4").origin.payload_bytes
    assert payload <= weight_bytes(open_program(KEPT_PTE)) <= 1.5 * payload


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int4", "int8", None], ids=str)
def test_a_tied_table_counts_once_whatever_else_has_its_shape(tmp_path: Path, recipe: str | None) -> None:
    """A is [E, N], the table [V, D] and its scales [V, groups]; here E = N = V = D."""
    config = replace(SMALL, vocab_size=24, hidden_size=24, expand=1, state_size=24, num_mlp_experts=0)
    config = replace(config, num_ssm_experts=1, mlp_intermediate_size=0)
    source = write_model(tmp_path / "model", random_model(config, dtype=torch.float32), dtype=torch.bfloat16)
    if recipe is not None:
        quantize(source, tmp_path / "quantized", recipe=recipe)
        source = tmp_path / "quantized"
    opened = open_program(export(source, tmp_path / "out", target="executorch").program("executorch"))
    linears = [linear for part in opened.file.methods["decode"].delegates for linear in part.linears]
    values = sum(math.prod(linear.shape) * (linear.bits or 32) // 8 + linear.stored_scales.nbytes for linear in linears)
    # A, the taps, their bias, D, the bias of Δ and a norm of every block; and the last norm. All have 24 rows.
    small = 4 * 24 * (config.num_hidden_layers * (24 + config.conv_kernel + 4) + 1)
    assert abs(weight_bytes(opened) - values - small) <= 0.05 * values + 200


def test_a_vector_that_says_one_thing_many_times(tmp_path: Path) -> None:
    """Thousands of operators that share one name of a megabyte take all memory, but in the child process."""
    count, name = 3000, b"n" * (1 << 20)
    # 40 vtable | 48 root: methods at 56 | 64 vtable | 84 method: operators at 92 | vtable | operator | name
    body = struct.pack("<4H2i2I", 8, 8, 0, 4, 8, 4, 1, 84 - 60) + struct.pack("<9H2x", 18, 8, *[0] * 6, 4)
    operator = 96 + 4 * count + 8
    body += struct.pack("<2iI", 20, 4, count) + (operator - np.arange(96, 96 + 4 * count, 4)).astype("<u4").tobytes()
    body += struct.pack("<3H2x2iI", 6, 8, 4, 8, 4, len(name)) + name
    size = 40 + len(body)
    path = tmp_path / "model.pte"
    path.write_bytes(struct.pack("<I4s4sI3Q", 48, b"ET12", b"eh00", 32, size, size, 0) + body)
    with pytest.raises(InputError, match=r"model\.pte cannot be run \(MemoryError"):
        open_program(path)


@pytest.mark.parametrize("kept", [0, 7, 40, 5000, 94_000, 188_000])
def test_a_file_that_was_cut_short(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(KEPT_PTE.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.pte is (empty|not a \.pte that can be read)"):
        ProgramFile(path)


@pytest.mark.parametrize("content", [b"plain text, not a program\n" * 20, bytes(5000), b"\xff" * 5000])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a \.pte that can be read"):
        ProgramFile(path)


@pytest.mark.parametrize("kind", ["flips", "extremes", "zeros", "cut"])
def test_any_damage_is_an_answer(file: ProgramFile, tmp_path: Path, kind: str) -> None:
    """Read as something, or refused in one line; never another exception. Mostly in the flatbuffer, which points."""
    whole, path, refused = KEPT_PTE.read_bytes(), tmp_path / "model.pte", []
    for seed in range(15):
        random, data = np.random.default_rng(seed), bytearray(whole)
        within = len(data) if seed % 4 == 0 else file.program_bytes
        if kind == "flips":
            for at in random.integers(0, within, 3):
                data[at] ^= int(random.integers(1, 256))
        elif kind == "extremes":  # offsets, counts and sizes that point far away, or back
            for at in 4 * random.integers(0, within // 4, 3):
                struct.pack_into("<I", data, at, random.choice([0, 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 16, within]))
        elif kind == "zeros":  # a piece that was never written
            at = random.integers(0, within - 64)
            data[at : at + 64] = bytes(64)
        else:  # the header says the right size
            at = random.integers(40, within)
            del data[at : at + random.integers(1, 64)]
            sizes_said = struct.unpack_from("<2Q", data, 16)
            struct.pack_into("<Q", data, 24, max(0, len(data) - sizes_said[1]))
        path.write_bytes(data)
        try:
            read(path)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= 2, "the damage was not where it is looked for"
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


@pytest.mark.parametrize("given", [[-1, 4], [1, 1, 1, 1, 1]])
def test_sizes_that_no_array_has(given: list[int]) -> None:
    with pytest.raises(DamagedError, match="sizes that mossquant does not write"):
        sizes(np.array(given))


def test_a_table_of_one_row(tmp_path: Path) -> None:
    """The runtime would look behind it."""
    data, path, changed = bytearray(KEPT_PTE.read_bytes()), tmp_path / "model.pte", 0
    for plan in root(memoryview(bytes(data)), b"ET12").tables(1):
        for value in plan.tables(2):
            kind, tensor = value.union(1)
            shape = tensor.numbers(2, "<i4") if kind == 5 and tensor is not None else np.empty(0)
            if len(shape) == 2 and shape[0] == 288 and tensor is not None and tensor.number(5):
                place = tensor._at(2)
                assert place is not None
                struct.pack_into("<i", data, place + struct.unpack_from("<I", data, place)[0] + 4, 1)
                changed += 1
    assert changed == 3 * 2, "codes and scales, in three methods"
    path.write_bytes(data)
    with pytest.raises(InputError, match="decode has no table of 288 rows"):
        open_program(path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"mossquant\0", b"somebody1\0", "was not written by mossquant"),
        (b'"version": 1', b'"version": 2', r"version: .*another release of mossquant wrote it"),
    ],
)
def test_metadata_of_another(tmp_path: Path, before: bytes, after: bytes, message: str) -> None:
    data, path = KEPT_PTE.read_bytes(), tmp_path / "model.pte"
    assert before in data
    path.write_bytes(data.replace(before, after))
    with pytest.raises(InputError, match=message):
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


def _everything(data: bytes | bytearray) -> tuple[int, str, list[int]]:
    table = root(memoryview(data), b"TEST")
    return table.number(0), table.string(1), table.numbers(2).tolist()


def test_a_flatbuffer_by_hand() -> None:
    assert _everything(_flatbuffer()) == (7, "abc", [4, 5])
    table = root(memoryview(_flatbuffer()), b"TEST")
    assert (table.number(9, default=3), table.string(9), list(table.tables(9)), table.table(9)) == (3, "", [], None)


@pytest.mark.parametrize("kind", [1, 2, 4], ids=["operator", "delegate", "jump"])
def test_an_instruction_that_calls_what_is_not_there(file: ProgramFile, tmp_path: Path, kind: int) -> None:
    """One such byte passed the run in a child process, and brought the process down that had loaded the program."""
    data = bytearray(file.path.read_bytes())
    # A flatbuffer begins with its header here, so that positions in it are positions in the file.
    program = root(memoryview(data), b"ET12")
    chains = [chain for plan in program.tables(1) for chain in plan.tables(5)]
    calls = [instruction.union(1) for chain in chains for instruction in chain.tables(2)]
    place = next(at for said, call in calls if said == kind and call and (at := call._at(1 if kind == 4 else 0)))
    data[place : place + 4] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "model.pte").write_bytes(data)
    with pytest.raises(InputError, match="calls or jumps to what is not there"):
        _ = ProgramFile(tmp_path / "model.pte").methods
