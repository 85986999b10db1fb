# SPDX-License-Identifier: Apache-2.0
"""The linear layer on quantized weights and inputs, as a PyTorch operator."""

from mossquant.kernels.linear.operators import int8_block_linear, pack

__all__ = ["int8_block_linear", "pack"]
