# SPDX-License-Identifier: Apache-2.0
"""What `bench/peers.py` needs of llama.cpp: its library, out of a source package, and GGUFs of our weights.

GGUFs are written in fp32 by the `gguf` package that lies in the same sources, and quantized by llama.cpp itself. They
hold no vocabulary, as our artifacts don't.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.weights import value
from mossquant.targets.child import Child

PACKAGE, VERSION = "llama_cpp_python", "0.3.36"
OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TESTS=OFF"),
    *("-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF"),
)
# -march=native names AMX last, so that it is taken back after all other flags.
_AFTER = "<DEFINES> <INCLUDES> <FLAGS> -mno-amx-tile -mno-amx-int8 -mno-amx-bf16 -o <OBJECT> -c <SOURCE>"
WITHOUT_AMX = tuple(f"-DCMAKE_{name}_COMPILE_OBJECT=<CMAKE_{name}_COMPILER> {_AFTER}" for name in ("C", "CXX"))
BLOCK = 32
"""Columns that share a scale; a matrix of another width stays in f16."""


class Quantization(NamedTuple):
    """A GGUF.

    Attributes:
        ftype: `llama_ftype` of the file.
        table: `ggml_type` of the tied table, -1 where llama.cpp chooses.
        padded: whether ssm_dt is padded to whole blocks.
    """

    ftype: int
    table: int = -1
    padded: bool = False


F32 = "llama.cpp F32"
QUANTIZATIONS = {
    "llama.cpp F16": Quantization(1),
    "llama.cpp Q8_0": Quantization(7, padded=True),
    "llama.cpp Q4_0": Quantization(2),
    "llama.cpp Q4_0, 4-bit head": Quantization(2, table=2, padded=True),
}
_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """What is there is kept; otherwise it is made aside, and renamed when it is complete."""
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        aside = path.with_name(f"partial-{path.name}")
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        make(aside)
        aside.rename(path)
    return path


class LlamaCpp:
    """llama.cpp in a folder: sources, build, and `peers.cc` compiled against it.

    Args:
        folder: where they are, or will be.
        jobs: of building.
        amx: False builds it without AMX, which a system may refuse though the processor has it (SIGILL).
    """

    def __init__(self, folder: Path, jobs: int, *, amx: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unpacked = made(folder / f"{PACKAGE}-{VERSION}", lambda path: _unpack(folder, path))
        source, build = unpacked / "vendor" / "llama.cpp", folder / "build"
        if not (build / "bin" / "libllama.so").exists():
            own = () if amx else WITHOUT_AMX
            cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "cmake"
            subprocess.run([cmake, "-S", str(source), "-B", str(build), *OPTIONS, *own], check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "llama", "-j", str(jobs)], check=True)
        self.library = folder / "libpeers.so"
        words = ["c++", "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-o", str(self.library)]
        places = [f"-I{source}/include", f"-I{source}/ggml/include", f"-L{build}/bin", f"-Wl,-rpath,{build}/bin"]
        code = Path(__file__).with_name("peers.cc")
        subprocess.run([*words, str(code), *places, "-lllama"], check=True)
        sys.path.append(str(source / "gguf-py"))
        self._gguf: Any = import_module("gguf")

    def system(self) -> str:
        """What llama.cpp says of its build and the machine."""
        return str(self._told({"do": "system"})["system"]).strip()

    def ggufs(self, source: Checkpoint, folder: Path) -> dict[str, Path]:
        """GGUFs of a checkpoint by name, the one in fp32 first."""
        rank = source.config.time_step_rank
        full = made(folder / "F32.gguf", lambda path: self._write(source, rank, path))
        found = {F32: full}
        for name, how in QUANTIZATIONS.items():

            def quantize(path: Path, how: Quantization = how) -> None:
                before = full
                if how.padded:
                    before = path.with_name("padded.gguf")
                    self._write(source, -(-rank // BLOCK) * BLOCK, before)
                order = {"from": str(before), "to": str(path), "type": how.ftype, "table": how.table}
                if not self._told({"do": "quantize", **order})["done"]:
                    raise RuntimeError(f"llama.cpp could not write {path}")
                if how.padded:
                    before.unlink()

            file = name.removeprefix("llama.cpp ").replace(", ", "-").replace(" ", "-") + ".gguf"
            found[name] = made(folder / file, quantize)
        return found

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the tensors of a GGUF."""
        return sum(int(tensor.n_bytes) for tensor in self._gguf.GGUFReader(path).tensors)

    def _told(self, order: dict[str, Any]) -> dict[str, Any]:
        child = Child("peers_worker")
        answer = child.ask({"library": str(self.library), **order})
        child.close()
        if answer is None:
            raise RuntimeError(f"llama.cpp ended the process with status {child.status}")
        return answer

    def _write(self, source: Checkpoint, rank: int, path: Path) -> None:
        """A GGUF in fp32, its tensors and keys as `conversion/mamba.py` of llama.cpp has them."""
        config, writer = source.config, self._gguf.GGUFWriter(path, "mamba")
        writer.add_context_length(1 << 20)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.d_inner)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(rank)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_ssm_dt_b_c_rms(False)
        writer.add_file_type(0)
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
        for name, values in _tensors(source, rank):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _unpack(folder: Path, path: Path) -> None:
    archive = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if not archive.exists():
        words = ["download", "--quiet", "--no-binary", PACKAGE, "--no-deps", "--no-build-isolation", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", *words, f"{PACKAGE}=={VERSION}"], check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(path, filter="data")
    inside = path / f"{PACKAGE}-{VERSION}"
    for entry in inside.iterdir():
        entry.rename(path / entry.name)
    inside.rmdir()


def _tensors(source: Checkpoint, rank: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and values in fp32, with delta padded by zeros to `rank`: rows of x_proj, columns of dt_proj."""
    R = source.config.time_step_rank
    for spec in source.specs:
        x, (_, kind, *rest) = value(source, spec), spec.split(".")
        if kind == "layers":
            name = f"blk.{rest[0]}.{_NAMES['.'.join(rest[1:])]}"
        else:
            name = {"embeddings": "token_embd.weight", "norm_f": "output_norm.weight"}[kind]
        if name.endswith("ssm_a"):
            x = -torch.exp(x)
        elif name.endswith("ssm_conv1d.weight"):
            x = x.squeeze(1)
        elif name.endswith("ssm_dt.weight"):
            x = F.pad(x, (0, rank - R))
        elif name.endswith("ssm_x.weight"):
            x = torch.cat([x[:R], x.new_zeros(rank - R, x.shape[1]), x[R:]])
        yield name, x.contiguous().numpy()
