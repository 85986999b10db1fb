# SPDX-License-Identifier: Apache-2.0
"""The selective scan. The kernels and their formula: `scan.h`; their registration with PyTorch: `autograd.py`."""

from mossquant.kernels.scan.autograd import selective_scan

__all__ = ["selective_scan"]
