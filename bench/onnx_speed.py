# SPDX-License-Identifier: Apache-2.0
"""Times .onnx artifacts of random models of three shapes in full precision, int8 and int4, side by side.

    python bench/onnx_speed.py [--models tiny,experts8,mamba130m] [--rounds 12]

Speed does not depend on the weights' values. One thread; CPU time of the process, which a busy machine disturbs less
than wall time; rounds interleaved over the artifacts; the lowest and the median round are printed. `mossquant bench`
is what times an artifact of yours.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.model.config import PRESETS, MossNetConfig
from mossquant.model.mossnet import MossNet
from mossquant.targets.export import export
from mossquant.targets.onnx.runner import OnnxRunner

MODELS = {
    "tiny": PRESETS["tiny"],
    "experts8": MossNetConfig(
        vocab_size=4096,
        hidden_size=384,
        num_hidden_layers=4,
        time_step_rank=24,
        num_ssm_experts=8,
        num_ssm_experts_per_tok=2,
        num_mlp_experts=8,
        num_mlp_experts_per_tok=2,
        mlp_intermediate_size=768,
    ),
    "mamba130m": MossNetConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, time_step_rank=48),
}
PREFILL, STEPS = 128, 16


def artifacts(name: str, config: MossNetConfig, folder: Path) -> dict[str, Path]:
    """Full precision, int8 and int4 of a random model."""
    model, checkpoint = MossNet(config), folder / name
    model.reset_parameters(0)
    checkpoint.mkdir()
    write_checkpoint(checkpoint, config, lambda spec: model.parameter_of(spec).view(spec.shape), dtype=torch.float32)
    found = {"fp32": export(checkpoint, folder / f"{name}-onnx").folder}
    for recipe in ("int8", "int4"):
        quantize(checkpoint, folder / f"{name}-{recipe}", recipe=f"{recipe}-uniform")
        found[recipe] = export(folder / f"{name}-{recipe}", folder / f"{name}-{recipe}-onnx").folder
    return found


def main() -> None:
    """Print one line an artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    for name in asked.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            paths = artifacts(name, MODELS[name], Path(folder))
            runners = {kind: OnnxRunner(path, threads=1) for kind, path in paths.items()}
            tokens = np.random.default_rng(0).integers(0, MODELS[name].vocab_size, (1, PREFILL))
            prefill: dict[str, list[float]] = {kind: [] for kind in runners}
            decode: dict[str, list[float]] = {kind: [] for kind in runners}
            for _ in range(asked.rounds):
                for kind, runner in runners.items():
                    start = time.process_time()
                    _, state = runner(tokens, runner.initial_state(1))
                    prefill[kind].append((time.process_time() - start) / PREFILL)
                    start = time.process_time()
                    for step in range(STEPS):
                        _, state = runner(tokens[:, step : step + 1], state)
                    decode[kind].append((time.process_time() - start) / STEPS)
            for kind, runner in runners.items():
                times = " ".join(
                    f"{what} {1e6 * min(values):8.0f} (median {1e6 * float(np.median(values)):8.0f}) us a token,"
                    for what, values in (("prefill", prefill[kind]), ("decode", decode[kind]))
                )
                print(f"{name:10s} {kind:5s} {times} {runner.info.file_bytes} bytes", flush=True)


if __name__ == "__main__":
    main()
