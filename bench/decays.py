# SPDX-License-Identifier: Apache-2.0
"""What quantizing A_log does to the decays that a model applies on a text.

    python bench/decays.py [MODEL] [--recipe int8-uniform] [--text FILE] [--tokens 16384]

Prints a Markdown table with a row for each layer: the range of the time steps Δ on the text, the relative error of
A_log as the ledger has it, and the largest |exp(Δ A) − exp(Δ A')| over the steps that each channel took.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from mossquant.calibration.decays import decay_errors, steps_seen
from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.open import open_weights
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.targets.torch.runner import TorchRunner

WINDOW = 1024
"""Tokens that are read from an initial state."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--recipe", default="int8-uniform")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=16_384)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    original = open_weights(asked.model, verb="bench")
    with tempfile.TemporaryDirectory() as place:
        ledger = quantize(original, Path(place) / "quantized", recipe=asked.recipe)
        tokens = held_out_passage([open_model(asked.model, threads=1)], text=asked.text, tokens=asked.tokens).tokens
        steps = steps_seen(TorchRunner.open(original).model, torch.from_numpy(tokens).split(WINDOW, 1))
        errors = decay_errors(original, open_weights(Path(place) / "quantized", verb="bench"), steps)
    print("| tensor | Δ | ‖error‖ / ‖A_log‖ | largest error of a decay |", "| --- | ---: | ---: | ---: |", sep="\n")
    for name, (low, high) in steps.items():
        error, decay = ledger.by_name[name].relative_error, errors[name].largest
        print(f"| {name} | {float(low.min()):.1e} to {float(high.max()):.1e} | {error:.5f} | {decay:.5f} |")


if __name__ == "__main__":
    main()
