# SPDX-License-Identifier: Apache-2.0
"""What scales of matmuls cost in an .onnx, folded and as fp32 initializers; and a step in sessions of every kind.

    python bench/onnx_scales.py [--models tiny,mamba130m] [--steps 5]

Codes are zeros and scales ones: neither sizes nor speed depend on them. One thread; CPU time of the process, lowest of
the steps; every session in a process of its own, and the peak of its resident size less Python with its imports.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import View, Weights
from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.model.config import PRESETS, MossNetConfig
from mossquant.model.mossnet import MossNet
from mossquant.plan.plan import Plan
from mossquant.targets.export import export

MODELS = {
    "tiny": PRESETS["tiny"],
    "mamba130m": MossNetConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, time_step_rank=48),
}
FORMATS = ("int4_g32", "int4_g128", "int8", "int8_g32")
SESSIONS = {
    "default": {},
    "no folding": {"disabled_optimizers": ["ConstantFolding"]},
    "no prepacking": {"prepacking": False},
}
RECIPE = """version: 1
name: {name}
targets: [torch, onnx]
weights:
  - {{role: "*norm*", keep: fp32, why: "few bytes"}}
  - {{role: "*.router", keep: fp32, why: "few bytes", optional: true}}
  - {{role: ssm.A_log, format: int8}}
  - {{role: "ssm.conv*", format: int8_g32}}
  - {{role: ssm.expert.dt_bias, format: int8_g32}}
  - {{role: ssm.D, format: int8_g32}}
  - {{role: "*", format: {format}}}
activations:
  - {{role: "*", format: int8_block}}
state:
  - {{role: "*", format: fp32}}
"""


class Planned(View):
    """Weights as a plan will have them, codes 0 and scales 1."""

    def __init__(self, weights: Weights, plan: Plan) -> None:
        super().__init__(weights)
        self._plan = plan

    @cached_property
    def _formats(self) -> dict[str, NumberFormat | None]:
        found = {name: entry.format for name, entry in self._plan.by_name.items()}
        return {name: None if made is None else get_format(made) for name, made in found.items()}

    def format(self, name: str) -> NumberFormat | None:
        return self._formats[name]

    def kept(self, name: str) -> torch.Tensor:
        return super().kept(name).float()

    def activation(self, site: str) -> str:
        return self._plan.site(site).format

    def quantized(self, name: str) -> QuantizedTensor:
        made, (rows, columns) = self._formats[name], self.specs[name].matrix_shape
        assert made is not None
        codes = torch.zeros(rows, made.padded_columns(columns), dtype=torch.int8)
        return QuantizedTensor(
            made, codes, torch.ones(rows, made.groups(columns), dtype=made.scale_dtype), rows, columns
        )


def peak() -> float:
    """MB of this process's resident size at its peak."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3


def timed(program: str, steps: int, options: dict[str, object]) -> dict[str, float]:
    """Milliseconds to load and of a step, and MB at the peak."""
    settings, before = ort.SessionOptions(), peak()
    settings.intra_op_num_threads = 1
    if not options.pop("prepacking", True):
        settings.add_session_config_entry("session.disable_prepacking", "1")
    start = time.process_time()
    session = ort.InferenceSession(program, settings, **options)
    load, times = time.process_time() - start, []
    state = {port.name: np.zeros([1, *port.shape[1:]], np.float32) for port in session.get_inputs()[2:]}
    for _ in range(steps):
        start = time.process_time()
        session.run(["logits"], {"tokens": [[5]], "first_logit": [-1], **state})
        times.append(time.process_time() - start)
    return {"load": 1e3 * load, "step": 1e3 * min(times), "peak": peak() - before}


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(timed(*json.loads(arguments.one))))
        return
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            measure(name, Path(temporary), arguments.steps)


def measure(name: str, folder: Path, steps: int) -> None:
    """All formats of one model."""
    config, model = MODELS[name], MossNet(MODELS[name])
    model.reset_parameters(0)
    (folder / "checkpoint").mkdir()
    write_checkpoint(
        folder / "checkpoint", config, lambda spec: model.parameter_of(spec).view(spec.shape), dtype=torch.bfloat16
    )
    for format_name in FORMATS:
        recipe = folder / f"{format_name}.yaml"
        recipe.write_text(RECIPE.format(name=format_name.replace("_", "-"), format=format_name))
        plan = quantize(folder / "checkpoint", folder / "unused", recipe=str(recipe), dry_run=True)
        weights = Planned(open_weights(folder / "checkpoint", verb="export"), plan)
        sizes = {}
        for scales in ("folded", "initializers"):
            made = export(weights, folder / f"{format_name}-{scales}", scales=scales)
            sizes[scales] = made.bytes
            for title, options in SESSIONS.items():
                one = json.dumps([str(made.program("onnx")), steps, options])
                command = [sys.executable, "-P", __file__, "--one", one]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"| {name} | {format_name} | {scales} | {made.bytes:,} | {title} | {found['load']:.0f} | "
                    f"{found['step']:.1f} | {found['peak']:.0f} |",
                    flush=True,
                )
        share = sizes["initializers"] / sizes["folded"] - 1
        print(f"{name}, {format_name}: initializers cost {share:+.1%}", flush=True)


if __name__ == "__main__":
    main()
