# SPDX-License-Identifier: Apache-2.0
"""Loads an .onnx on stock onnxruntime (CPU), and runs it once in the child process of `mossquant.targets.trial`.

Only a run shows whether a graph runs and what memory it takes: onnxruntime checks little of it before.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mossquant.targets.onnx.ports import FIRST_LOGIT, STATE_OUT, TOKENS

_CALLS = ((1, 1, -1), (2, 3, 0), (1, 64, 0))
"""(B, T, first logit): a step, streams side by side, and enough tokens for what grows with them."""


def open_session(path: Path, threads: int | None) -> ort.InferenceSession:
    """Load a program; threads None: as many as there are cores. Raises whatever onnxruntime does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors are raised, and not printed besides
    # The library prints about falling back to another provider, even where there is none.
    with redirect_stdout(io.StringIO()):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, vocabulary: int, states: Mapping[str, Sequence[int]], growing: Mapping[str, int]) -> None:
    """Load a program and run it on some tokens, the last and the first of the vocabulary among them.

    Args:
        path: the .onnx.
        vocabulary: number of tokens.
        states: name → shape without the batch axis, of each state array.
        growing: name → axis that gets longer with every token, of those that have one; without the batch axis too.

    Raises:
        ValueError: it gives arrays of other shapes than it should; and whatever onnxruntime raises.
    """
    session = open_session(path, 1)
    names = [output.name for output in session.get_outputs()]
    for batch, time, first in _CALLS:
        tokens = np.linspace(vocabulary - 1, 0, batch * time).astype(np.int64).reshape(batch, time)
        before = {name: np.zeros((batch, *shape), np.float32) for name, shape in states.items()}
        shapes = {name: list(array.shape) for name, array in before.items()}
        for name, axis in growing.items():
            shapes[name][axis + 1] += time
        logits, *after = session.run(names, {TOKENS: tokens, FIRST_LOGIT: np.array([first], np.int64), **before})
        expected = [(batch, 1 if first else time, vocabulary), *map(tuple, shapes.values())]
        if names[1:] != [name + STATE_OUT for name in states] or [a.shape for a in (logits, *after)] != expected:
            raise ValueError("it gives arrays of other shapes than it should")
