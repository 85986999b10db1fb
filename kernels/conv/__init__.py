# SPDX-License-Identifier: Apache-2.0
"""The causal convolution. The kernels and their formula: `conv.h`; their registration with PyTorch: `autograd.py`."""

from mossquant.kernels.conv.autograd import causal_conv

__all__ = ["causal_conv"]
