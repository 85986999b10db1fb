# SPDX-License-Identifier: Apache-2.0
"""What recovery costs and wins, with gradients in fp32 and, where the machine multiplies bf16, in bf16.

    python bench/recovery.py [MODEL] [--text FILE…] [--recipes int4-uniform int8-uniform] [--tokens 200000]

Each recipe is rounded by its own solver and recovered on the text less its end, on which KL(original ‖ recovered) is
measured in windows. Differences are paired, with 95 % of a normal distribution; seconds are of the CPU.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.calibration import products
from mossquant.calibration.meter import WINDOW, Meter, interval
from mossquant.calibration.quantize import JUDGED_TOKENS, quantize
from mossquant.calibration.recover import recover
from mossquant.calibration.student import Planned
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import Weights, value
from mossquant.eval.machine import machine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny", help="a checkpoint folder, or tiny")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="in place of the bundled calibration text")
    parser.add_argument("--recipes", nargs="+", default=["int4-uniform", "int8-uniform"])
    parser.add_argument("--tokens", type=int, default=200_000, help="of recovery")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    weights = open_weights(asked.model, verb="bench/recovery.py")
    learned, judged = CalibrationText.of(weights, asked.text).split(JUDGED_TOKENS)
    meter = Meter(weights, judged.windows(max(1, len(judged) // WINDOW), WINDOW))
    arithmetic = {"fp32": False} | ({"bf16": True} if products.MULTIPLIES_BF16 else {})
    print("| recipe | gradients | KL rounded | KL recovered | less fp32's | CPU s | CPU s a million tokens |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for recipe in asked.recipes:
        with TemporaryDirectory() as temporary:
            quantize(asked.model, Path(temporary) / "rounded", recipe=recipe)
            rounded = QuantizedCheckpoint.open(Path(temporary) / "rounded")
            plan = rounded.plan
            solved = {entry.name: rounded.quantized(entry.name) for entry in plan.tensors if entry.format is not None}
            before = kl(meter, Planned(weights, plan, solved)).mean()
            exact = None
            for name, products.MULTIPLIES_BF16 in arithmetic.items():
                began = time.process_time()
                stored = recover(weights, plan, solved, learned, tokens=asked.tokens)
                seconds = time.process_time() - began
                losses = kl(meter, Planned(weights, plan, stored))
                exact = losses if exact is None else exact
                low, high = interval(losses - exact) or (0.0, 0.0)
                less = "" if losses is exact else f"[{low:+.1e}, {high:+.1e}]"
                print(
                    f"| `{recipe}` | {name} | {before:.3e} | {losses.mean():.3e} | {less} | {seconds:.0f} | "
                    f"{1e6 * seconds / asked.tokens:.0f} |",
                    flush=True,
                )
    on = machine()
    print(
        f"\n{asked.model}, {asked.tokens:,} tokens of {learned.name}, judged on {meter.windows.numel():,}; "
        f"{asked.threads} thread(s), {on['cpu']}, torch {on['torch']}"
    )


def kl(meter: Meter, stored: Weights) -> NDArray[np.float64]:
    """KL(original ‖ stored) of each window."""
    return meter.kl({spec: value(stored, name) for name, spec in stored.specs.items()})


if __name__ == "__main__":
    main()
