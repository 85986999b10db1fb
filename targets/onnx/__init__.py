# SPDX-License-Identifier: Apache-2.0
"""The ONNX target: lowering to one graph for stock onnxruntime, running it, and reading its weights back."""

import os

# A tool that is run on one's own models reports to nobody, keeps no device ID and does not complain where it cannot.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
