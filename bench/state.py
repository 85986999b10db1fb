# SPDX-License-Identifier: Apache-2.0
"""What a saved state saves: the bundled model at int4 reads 2,000 tokens, or takes their state from a file.

    python bench/state.py [--tokens 2000] [--rounds 10]

Prints a Markdown table with one row a runtime: the PyTorch model of the checkpoint, and the artifact of every target.
Wall time, one thread; all runtimes take turns, and the median and the range of all rounds but the first are printed.
The file was written just before, so that it lies in memory. Every round checks that the restored state gives the next
token the same logits, bit for bit.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from mossquant.calibration.quantize import quantize
from mossquant.eval.machine import machine
from mossquant.eval.open import open_model
from mossquant.eval.scores import advance
from mossquant.runner import Runner, Tokens
from mossquant.state_file import SavedState, load_state, save_state
from mossquant.targets.export import export
from mossquant.targets.target import program_targets
from mossquant.text.text import Tokenizer, bundled_text

Found = TypeVar("Found")
NEXT = np.array([[0]], np.int64)
"""The token that is read after both."""


class Timed:
    """A Runner, and how long it took in every round."""

    def __init__(self, path: Path, state: Path) -> None:
        opened = open_model(path, threads=1)
        self.runner: Runner = opened.runner
        self.tokenizer: Tokenizer = opened.tokenizer
        self.state = state
        self.milliseconds: dict[str, list[float]] = {"prefill": [], "save": [], "restore": []}

    def round(self, ids: Tokens) -> None:
        """Read tokens [1, T], save where they end, restore it, and compare what both make of the next token."""
        logits, state = self._time("prefill", lambda: advance(self.runner, ids, self.runner.initial_state(1)))
        read = SavedState(state, logits, ids.shape[1])
        self._time("save", lambda: save_state(self.state, self.runner, read, tokenizer=self.tokenizer, force=True))
        restored = self._time("restore", lambda: load_state(self.state, self.runner, tokenizer=self.tokenizer))
        expected, found = self.runner(NEXT, read.state)[0], self.runner(NEXT, restored.state)[0]
        assert np.array_equal(restored.logits, read.logits)
        assert np.array_equal(found, expected)

    def _time(self, what: str, work: Callable[[], Found]) -> Found:
        start = time.perf_counter()
        found = work()
        self.milliseconds[what].append(1e3 * (time.perf_counter() - start))
        return found

    def row(self) -> str:
        """Its line of the table."""
        counted = {what: values[1:] for what, values in self.milliseconds.items()}
        cells = [f"{np.median(v):,.2f} ({min(v):,.2f}–{max(v):,.2f})" for v in counted.values()]
        ratio = np.median(counted["prefill"]) / np.median(counted["restore"])
        info = self.runner.info
        return f"| {info.kind}, {info.weights} | {' | '.join(cells)} | {ratio:,.0f} × | {self.state.stat().st_size:,} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        quantize("tiny", folder / "torch", recipe="int4-uniform")
        for target in program_targets():
            export(folder / "torch", folder / target, target=target)
        timed = [Timed(folder / name, folder / f"{name}.state") for name in ("torch", *program_targets())]
        ids = timed[0].tokenizer.encode(bundled_text("heldout").data)[None, : asked.tokens]
        for _ in range(asked.rounds + 1):
            for runtime in timed:
                runtime.round(ids)
        print(f"| ms, median (range) | prefill of {asked.tokens:,} tokens | save | restore | | bytes of the file |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |", *(runtime.row() for runtime in timed), sep="\n")
    print("\n" + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
