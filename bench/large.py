# SPDX-License-Identifier: Apache-2.0
"""Measures what a large checkpoint needs: memory, time and bytes of quantizing, exporting, opening and verifying it.

    python bench/large.py [--preset 8x1.5b] [--gigabytes 3] [--folder DIR] [--threads 1] [--json FILE]

A checkpoint of the preset's shape with random weights, cut to as many layers as fit, is written tensor by tensor;
then each step runs in a process of its own. That process imports what the step needs and says so; from then until it
ends, this one reads its `RssAnon` and `RssShmem` (/proc/PID/status, Linux) every two milliseconds. Printed is the
highest reading above the first one, so the interpreter, its imports and mapped files are left out; what lasts less than
two milliseconds may be missed. The bar is 2 × the largest tensor of the checkpoint + 300 MB.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.eval.machine import machine
from mossquant.model.config import MossNetConfig, preset
from mossquant.model.mossnet import parameter_count, tensor_specs
from mossquant.model.tensors import TensorSpec

DTYPE = torch.bfloat16
SLACK_BYTES = 300 * 10**6
SAMPLE_SECONDS = 0.002

# What a step imports before it is watched, and what it then runs with the paths that it is given.
IMPORTS = """
import os, sys
import torch
import mossquant.calibration.quantize, mossquant.eval.info, mossquant.eval.verify, mossquant.targets.export
import mossquant.targets.onnx.export, mossquant.targets.onnx.info, mossquant.targets.onnx.read_back
torch.set_num_threads(int(sys.argv[1]))
"""
STEPS = {
    "quantize": "mossquant.calibration.quantize.quantize(sys.argv[2], sys.argv[3], recipe=sys.argv[4])",
    "info": "mossquant.eval.info.info(sys.argv[2])",
    "export": "mossquant.targets.export.export(sys.argv[2], sys.argv[3])",
    "verify": "assert mossquant.eval.verify.verify(sys.argv[2], [sys.argv[3]], weights_only=True).passed",
}
HANDSHAKE = "print(flush=True); sys.stdin.readline()\n"


def cut(config: MossNetConfig, total_bytes: float) -> MossNetConfig:
    """As many layers of a model as come nearest to so many bytes; at least one."""
    whole = parameter_count(config)
    layer = (whole - parameter_count(replace(config, num_hidden_layers=1))) / (config.num_hidden_layers - 1)
    rest = whole - layer * config.num_hidden_layers
    return replace(config, num_hidden_layers=max(1, round((total_bytes / DTYPE.itemsize - rest) / layer)))


def random_tensor(spec: TensorSpec, number: int) -> Tensor:
    """Seeded by its place in the model: normal, of a size that keeps sums near one."""
    generator = torch.Generator().manual_seed(number)
    tensor = torch.empty(spec.shape, dtype=DTYPE).normal_(0, spec.matrix_shape[1] ** -0.5, generator=generator)
    return tensor.add_(1) if "norm" in spec.role else tensor


def generate(folder: Path, config: MossNetConfig) -> int:
    """Write the checkpoint, unless it is there already; the bytes of its largest tensor."""
    specs = tensor_specs(config)
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True)
        write_checkpoint(folder, config, lambda spec: random_tensor(spec, numbers[spec.name]), dtype=DTYPE)
    return max(spec.count for spec in specs) * DTYPE.itemsize


def anonymous_bytes(pid: int) -> int | None:
    """Resident memory of a process that no file backs; None once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * sum(map(int, found)) if found else None


def watch(process: "subprocess.Popen[Any]", start: Callable[[], object]) -> dict[str, Any]:
    """Start a process that waits after its imports, until it ends: its highest anonymous memory above that, seconds."""
    idle = anonymous_bytes(process.pid)
    if idle is None:
        sys.exit("a step did not get past its imports")
    start()
    began, peak = time.perf_counter(), idle
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid) or 0)
        time.sleep(SAMPLE_SECONDS)
    return {"peak_bytes": peak - idle, "idle_bytes": idle, "seconds": time.perf_counter() - began}


def measure(step: str, threads: int, *arguments: str | Path) -> dict[str, Any]:
    """Run one step in a process of its own: seconds, and its highest anonymous memory above that after its imports."""
    command = [sys.executable, "-P", "-c", IMPORTS + HANDSHAKE + STEPS[step], str(threads), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        found = watch(process, process.stdin.close)
    if process.returncode != 0:
        sys.exit(f"{step} ended with status {process.returncode}")
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def steps(source: Path, folder: Path) -> Iterator[tuple[str, str, list[str | Path], Path | None]]:
    """(name shown, step, its arguments, what it writes) in order."""
    yield "info bf16", "info", [source], None
    yield "export bf16 to ONNX", "export", [source, folder / "bf16-onnx"], folder / "bf16-onnx"
    for recipe in ("int8-uniform", "int4-uniform"):
        quantized, artifact = folder / recipe, folder / f"{recipe}-onnx"
        yield f"quantize {recipe}", "quantize", [source, quantized, recipe], quantized
        yield f"info {recipe}", "info", [quantized], None
        yield f"export {recipe} to ONNX", "export", [quantized, artifact], artifact
        yield f"info {recipe} .onnx", "info", [artifact], None
        yield f"verify {recipe} .onnx, weights only", "verify", [quantized, artifact], None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="8x1.5b", help="shape that is cut")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint, in 10⁹ bytes of bf16")
    parser.add_argument("--folder", type=Path, help="where all is written and left; a temporary one if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    config = cut(preset(asked.preset), asked.gigabytes * 1e9)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        source = folder / "bf16"
        largest = generate(source, config)
        bound = 2 * largest + SLACK_BYTES
        print(
            f"{asked.preset} cut to {config.num_hidden_layers} layers: {parameter_count(config):,} parameters, "
            f"{folder_bytes(source):,} bytes of bf16, largest tensor {largest / 1e6:.0f} MB; bar {bound / 1e6:.0f} MB\n"
        )
        print("| step | peak anonymous memory, MB | seconds | bytes written |\n| --- | ---: | ---: | ---: |")
        rows = []
        for name, step, arguments, written in steps(source, folder):
            found = measure(step, asked.threads, *arguments)
            row = {"step": name, **found, "bytes": None if written is None else folder_bytes(written)}
            rows.append(row)
            wrote = "" if row["bytes"] is None else f"{row['bytes']:,}"
            print(f"| {name} | {row['peak_bytes'] / 1e6:.0f} | {row['seconds']:.0f} | {wrote} |", flush=True)
    on = machine()
    print(f"\n{asked.threads} thread(s), {on['cpu']}, {on['system']}, Python {on['python']}, torch {on['torch']}")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"version": 1, "bound_bytes": bound, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
