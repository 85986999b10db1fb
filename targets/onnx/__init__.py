# SPDX-License-Identifier: Apache-2.0
"""The ONNX target: lowering to one graph for stock onnxruntime, running it, and reading its weights back."""

from mossquant.targets.onnx.runner import OnnxRunner

__all__ = ["OnnxRunner"]
