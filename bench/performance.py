# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/performance.md`: decode and prefill of every runtime at int4, side by side, and where the time goes.

    python bench/performance.py [--repeats 7] [--folder FOLDER]        about 25 minutes on two idle cores

Lowering takes most of the time; with --folder what was made is kept there and used again.

Models: the bundled one, and a random Mamba of 24 × 768 (speed does not depend on the values). One thread; each runtime
in a process of its own, all take turns (`mossquant bench`). The time by part is that of the slowest: of PyTorch, whose
operators are timed inside the model, and of the .pte, whose parts are lowered each for itself and timed alone.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mossquant import bench, export, quantize
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.bench import BenchReport
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.plan.capabilities import get_capabilities
from mossquant.release import release
from mossquant.targets.executorch.lower import lower_module
from mossquant.targets.executorch.matrices import XnnpackMatrices
from mossquant.targets.executorch.packages import load_method, load_program, set_threads
from mossquant.targets.executorch.scan import loop
from mossquant.targets.program import Model
from mossquant.targets.taken import Taken
from mossquant.targets.torch.runner import TorchRunner

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
MAMBA = MossNetConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, time_step_rank=48)
PROMPTS = (128, 512)
PIECE = 128


def checkpoints(folder: Path) -> dict[str, Path]:
    """The models at int4, and an artifact of each with both programs beside it; what is there already is kept."""
    made = {"tiny": folder / "tiny", "Mamba 24 × 768": folder / "mamba"}
    if not made["tiny"].exists():
        quantize("tiny", made["tiny"], recipe="int4-uniform")
    if not made["Mamba 24 × 768"].exists():
        model = MossNet(MAMBA)
        model.reset_parameters(0)
        (folder / "full").mkdir()
        write_checkpoint(
            folder / "full", MAMBA, lambda spec: model.parameter_of(spec).view(spec.shape), dtype=torch.bfloat16
        )
        quantize(folder / "full", made["Mamba 24 × 768"], recipe="int4-uniform")
    for path in made.values():
        app = path.with_name(f"{path.name}-app")
        if not app.exists():
            export(path, app, target=["onnx", "executorch"])
    return made


def timed(path: Path, repeats: int) -> dict[int, BenchReport]:
    """Checkpoint, .onnx and .pte against one another, for each length of prompt."""
    app = path.with_name(f"{path.name}-app")
    paths = [path, app / "model.onnx", app / "model.pte"]
    return {prompt: bench(paths, threads=1, prompt=prompt, decode=32, repeats=repeats) for prompt in PROMPTS}


def torch_parts(path: Path, steps: int = 64) -> list[tuple[str, float]]:
    """µs of a decode step in PyTorch by part, the largest first."""
    torch.set_num_threads(1)
    runner = TorchRunner.open(path)
    roles = {spec.name: spec.role for spec in QuantizedCheckpoint.open(path).specs.values()}
    spent: dict[str, float] = defaultdict(float)
    plain = Forward.linear

    def linear(self: Forward, x: Tensor, weight: Tensor, name: str) -> Tensor:
        start = time.perf_counter()
        found = plain(self, x, weight, name)
        role = roles.get(name, name)
        spent["head" if role == "embedding" else role] += time.perf_counter() - start
        return found

    state = runner.initial_state(1)
    _, state = runner(np.zeros((1, 64), np.int64), state)
    Forward.linear = linear  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        for step in range(steps):
            _, state = runner(np.array([[step]], np.int64), state)
        total = time.perf_counter() - start
    finally:
        Forward.linear = plain  # type: ignore[method-assign]
    spent["everything else: scan, convolution, routing, norms, Python"] = total - sum(spent.values())
    return sorted(((name, 1e6 * value / steps) for name, value in spent.items()), key=lambda row: -row[1])


class _Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, u: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        out, after = self.block(u, list(states), loop)
        return (out, *after)


class _Scan(nn.Module):
    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return loop(x, dt, A, B, C, h)


def pte_parts(path: Path, repeats: int) -> list[tuple[str, float]]:
    """µs a token of a prefill in the .pte by part, the largest first: one layer's part times the number of layers."""
    source = QuantizedCheckpoint.open(path)
    config = source.config
    D, E, N, W = config.hidden_size, config.d_inner, config.state_size, config.conv_kernel
    tensors = Taken(source, get_capabilities("executorch"))
    model = Model(config, list(source.specs.values()), XnnpackMatrices(tensors)).eval()
    u, wide, states = torch.randn(PIECE, D), torch.randn(PIECE, E), torch.randn(PIECE, N)
    mixer = (_Block(model.mixers["0"]), (u, torch.zeros(1, E, W - 1), torch.zeros(1, E, N)))
    scan = (_Scan(), (wide, wide.abs() * 0.01, -torch.rand(E, N), states, states, torch.zeros(E, N)))
    layers = config.num_hidden_layers
    parts: dict[str, tuple[nn.Module, tuple[Tensor, ...], int]] = {
        "mixer": (*mixer, layers),
        "of which the scan": (*scan, layers),
        "norm": (model.norm_f, (u,), layers + len(model.mlps) + 1),
        "head, for the last position": (model.head, (u[:1],), 1),
    }
    if len(model.mlps):
        parts["MLP"] = (_Block(model.mlps["0"]), (u,), len(model.mlps))
    set_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as place:
        for name, (module, inputs, count) in parts.items():
            file = Path(place) / "part.pte"
            lower_module(module, inputs, file)
            program = load_program(file)
            method: Callable[[list[Tensor]], list[Tensor]] = load_method(program, "forward")
            seconds = []
            for _ in range(4 * repeats):
                start = time.perf_counter()
                method(list(inputs))
                seconds.append(time.perf_counter() - start)
            found.append((name, 1e6 * count * statistics.median(seconds) / PIECE))
    return sorted(found, key=lambda row: -row[1])


def file_bytes(path: Path) -> int:
    """Of a program, or of a checkpoint's tensors."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def speed(value: Any) -> str:
    return f"{value.median:,.0f} ({value.min:,.0f}–{value.max:,.0f})"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    lines = ["| model, int4-uniform | runtime | decode, tokens/s | prefill of 128 | prefill of 512 | file, MB |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    parts: dict[str, list[tuple[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, path in checkpoints(asked.folder or Path(place)).items():
            reports = timed(path, asked.repeats)
            for i, first in enumerate(reports[512].artifacts):
                prefill = [speed(reports[prompt].artifacts[i].prefill_tok_s) for prompt in PROMPTS]
                size = f"{file_bytes(Path(first.path)) / 1e6:,.1f}"
                kind = {"quantized checkpoint": "PyTorch, fp32 activations", "onnx": ".onnx", "executorch": ".pte"}
                lines.append(
                    f"| {name} | {kind[first.kind]} | {speed(first.decode_tok_s)} | {' | '.join(prefill)} | {size} |"
                )
            parts[f"{name}: µs of a decode step in PyTorch"] = torch_parts(path)
            parts[f"{name}: µs a token of a prefill of {PIECE} in the .pte, parts lowered alone"] = pte_parts(
                path, asked.repeats
            )
        described = reports[512].machine
    text = [
        "# Performance",
        "",
        f"Written by `python bench/performance.py` with mossquant {release()} on {described['cpu']}, 1 of "
        f"{described['cores']} cores; torch {described['torch']}, onnxruntime {described['onnxruntime']}, executorch "
        f"{described['executorch']}. One run: the runtimes of a model take turns, each in a process of its own; median "
        f"and range of {asked.repeats} turns. There is no goal yet: kernels of our own start from these "
        "figures. Ratios hold for this machine alone; no phone was measured.",
        "",
        *lines,
        "",
        "## Where the time goes",
        "",
        "PyTorch computes in fp32 and knows nothing of codes; the .pte computes all experts.",
    ]
    for title, rows in parts.items():
        text += ["", f"| {title} | |", "| --- | ---: |", *(f"| {name} | {value:,.1f} |" for name, value in rows)]
    # What `bench/peers.py` wrote stays.
    _, heading, peers = (OUTPUT.read_text() if OUTPUT.exists() else "").partition("\n## Against llama.cpp\n")
    OUTPUT.write_text("\n".join(text) + "\n" + heading + peers)
    print("\n".join(text))


if __name__ == "__main__":
    main()
