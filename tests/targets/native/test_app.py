# SPDX-License-Identifier: Apache-2.0
"""libmoss as an app has it: a C program that uses only what `native_path` holds; and on other processors than this."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lowered import Lowered, Workshop
from shared import once

from mossquant import native_path
from mossquant.checkpoint.open import open_weights
from mossquant.runner import Runner
from mossquant.targets.export import export
from mossquant.targets.native.runner import NativeRunner

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "targets" / "native" / "runtime" / "example.c"
PROMPT, COUNT = (5, 6, 7), 64
LARGEST = 1_000_000
"""Bytes of the stripped library."""
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
QEMU_X86 = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
CROSS = shutil.which("aarch64-linux-gnu-g++")
NEEDED = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


@pytest.fixture(scope="module")
def lowered(workshop: Workshop) -> Lowered:
    return workshop("wide", "int4", target="native")


def greedy(runner: Runner) -> list[int]:
    tokens, state, found = np.array([PROMPT], np.int64), runner.initial_state(1), []
    for _ in range(COUNT):
        logits, state = runner(tokens, state)
        found.append(int(np.argmax(logits[0, -1])))
        tokens = np.array([[found[-1]]], np.int64)
    return found


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def said(program: Path, model: Path, *emulated: str) -> list[int]:
    done = run(*emulated, program, model, str(COUNT), *map(str, PROMPT))
    assert (done.returncode, done.stderr) == (0, "")
    return [int(word) for word in done.stdout.split()]


def compiled(source: Path, program: Path) -> Path:
    """With nothing but the installed header and library."""
    compiler, folder = shutil.which("cc") or shutil.which("gcc"), native_path()
    assert compiler is not None
    built = run(
        *(compiler, "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", source, f"-I{folder / 'include'}"),
        *(f"-L{folder / 'lib'}", "-lmoss", f"-Wl,-rpath,{folder / 'lib'}", "-o", program),
    )
    assert (built.returncode, built.stderr) == (0, "")
    return program


def test_the_program_in_the_docs_says_what_the_runner_says(lowered: Lowered, tmp_path: Path) -> None:
    """That of docs/native.md, as it stands there."""
    _, _, code = (ROOT / "docs" / "native.md").read_text("utf-8").partition("```c\n")
    source = tmp_path / "example.c"
    source.write_text(code.partition("```")[0])
    done = run(compiled(source, tmp_path / "example"), lowered.program)
    assert (done.returncode, done.stderr) == (0, "")
    assert [int(word) for word in done.stdout.split()] == greedy(lowered.runner)[:20]


def test_a_c_program_says_what_the_runner_says(lowered: Lowered, tmp_path: Path) -> None:
    program = compiled(EXAMPLE, tmp_path / "example")
    assert said(program, lowered.program) == greedy(lowered.runner)
    refused = run(program, lowered.program, "3", "999999999")
    assert refused.returncode == 1
    assert refused.stderr.startswith("token 999999999 is outside the vocabulary")
    whole = lowered.program.read_bytes()
    (tmp_path / "cut.moss").write_bytes(whole[: len(whole) // 2])
    refused = run(program, tmp_path / "cut.moss", "3", "1")
    assert refused.returncode == 1
    assert "cut.moss cannot be opened: " in refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_library_is_small_and_needs_nothing(tmp_path: Path) -> None:
    """Exports no symbol but the headers', links no more than the C and C++ runtimes."""
    library = native_path() / "lib" / "libmoss.so"
    shutil.copy(library, tmp_path / "libmoss.so")
    assert run("strip", tmp_path / "libmoss.so").returncode == 0
    assert (tmp_path / "libmoss.so").stat().st_size < LARGEST
    needed = {
        line.split("[")[1].rstrip("]") for line in run("readelf", "-d", library).stdout.splitlines() if "NEEDED" in line
    }
    assert needed <= NEEDED
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()]
    headers = "".join(path.read_text() for path in (native_path() / "include").iterdir())
    assert symbols
    assert all(f"{symbol}(" in headers for symbol in symbols)


def build(folder: Path, *options: str, programs: tuple[str, ...] = ("moss-example", "moss-costs")) -> Path:
    """The runtime and programs that use it, from the sources; → their folder."""
    cmake = Path(sys.executable).with_name("cmake")
    made = run(cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, "-DMOSS_PYTHON=OFF", "-DMOSS_TESTS=ON", *options)
    assert made.returncode == 0, made.stderr[-2000:]
    made = run(cmake, "--build", folder, "--target", *programs)
    assert made.returncode == 0, made.stdout[-2000:]
    return programs_in(folder)


def programs_in(folder: Path) -> Path:
    return folder / "targets" / "native" / "runtime"


@pytest.fixture(scope="module")
def sanitized(shared: Path) -> Path:
    """The programs with the address and undefined-behaviour sanitizers."""
    programs = ("moss-example", "moss-blocks-test")
    return programs_in(
        once(shared / "sanitized", lambda folder: build(folder, "-DMOSS_SANITIZE=ON", programs=programs))
    )


@pytest.mark.slow
def test_sanitizers_find_nothing_in_right_and_damaged_files(
    sanitized: Path, workshop: Workshop, tmp_path: Path
) -> None:
    """Two right ones, and 150 that are damaged."""
    random = np.random.default_rng(0)
    for shape in ("wide", "experts"):
        lowered = workshop(shape, "int4", target="native")
        assert said(sanitized / "moss-example", lowered.program) == greedy(lowered.runner)
        data = np.frombuffer(lowered.program.read_bytes(), np.uint8)
        header = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for number in range(75):
            damaged = data.copy()
            # Most of the header, where sizes and offsets are; some of the weights, where any value may stand.
            place = random.integers(0, header if number % 3 else len(data), 1 + number % 4)
            damaged[place] = random.integers(0, 256, len(place))
            path = tmp_path / "damaged.moss"
            path.write_bytes(
                damaged[: random.integers(8, len(data))].tobytes() if number % 5 == 0 else damaged.tobytes()
            )
            done = run(sanitized / "moss-example", path, "4", *map(str, PROMPT))
            assert done.returncode in (0, 1), done.stderr[-3000:]
            assert "Sanitizer" not in done.stderr
            assert done.returncode == 0 or len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_sanitizers_find_nothing_in_blocks(sanitized: Path) -> None:
    """moss_blocks.h as a host calls it: rightly, by mistake, and with any values (`blocks_test.cc`)."""
    done = run(sanitized / "moss-blocks-test")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not (QEMU and CROSS), reason="needs g++-aarch64-linux-gnu and qemu-user-static, to emulate Arm")
def test_an_emulated_arm_says_the_same(tmp_path: Path) -> None:
    """The bundled model: 64 tokens as on x86, with i8mm, with dotprod alone, with neither; its own and x86's layout."""
    from mossquant.calibration.quantize import quantize

    options = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS}")
    compiler = str(CROSS).replace("g++", "gcc")
    own = build(tmp_path / "build", *options, f"-DCMAKE_C_COMPILER={compiler}")
    quantize("tiny", tmp_path / "int4", recipe="int4")
    weights = open_weights(tmp_path / "int4", verb="test")
    expected: list[int] | None = None
    for isa in ("arm", "x86"):
        export(weights, tmp_path / isa, target="native", isa=isa)
        program = tmp_path / isa / "model.moss"
        runner = NativeRunner(program, threads=1)
        expected = expected or greedy(runner)
        for processor in ("max", "neoverse-n1", "cortex-a53"):
            emulated = (str(QEMU), "-cpu", processor, "-L", "/usr/aarch64-linux-gnu")
            assert said(own / "moss-example", program, *emulated) == expected


@pytest.mark.slow
@pytest.mark.skipif(not QEMU_X86 or platform.machine() != "x86_64", reason="needs qemu-user-static, to emulate x86-64")
@pytest.mark.parametrize("processor", ["max", "qemu64"])
def test_an_older_x86_says_the_same(processor: str, lowered: Lowered, tmp_path: Path) -> None:
    """With AVX2 and without AVX-512; with neither."""
    own = build(tmp_path / "build")
    found = said(own / "moss-example", lowered.program, str(QEMU_X86), "-cpu", processor)
    assert found == greedy(NativeRunner(lowered.artifact, threads=1, isa="avx2" if processor == "max" else "baseline"))
    assert found == greedy(lowered.runner)
