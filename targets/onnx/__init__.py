# SPDX-License-Identifier: Apache-2.0
"""The ONNX target: lowering to one graph for stock onnxruntime, running it, and reading its weights back."""

import os
from typing import TYPE_CHECKING, Any

# A tool that is run on one's own models reports to nobody, keeps no device ID and does not complain where it cannot.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from mossquant.targets.onnx.runner import OnnxRunner

__all__ = ["OnnxRunner"]


def __getattr__(name: str) -> Any:
    """The Runner, when it is asked for: a child process that only runs a program loads no PyTorch."""
    if name != "OnnxRunner":
        raise AttributeError(name)
    from mossquant.targets.onnx.runner import OnnxRunner

    return OnnxRunner
