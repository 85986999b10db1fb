# SPDX-License-Identifier: Apache-2.0
"""ONNX as a target: one graph for stock onnxruntime. All SSM experts lie in one matmul and are all read."""

from mossquant.targets.target import Target

TARGET = Target("onnx", runtime="onnxruntime", computes_all=("ssm",), options={"scales": ("folded", "initializers")})
