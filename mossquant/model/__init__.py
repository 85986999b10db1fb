# SPDX-License-Identifier: Apache-2.0
"""The model: its shape, its tensors, its blocks, and how one pass through it is computed.

Glossary (used by every file):
    B batch, T time, D d_model (hidden_size), E d_inner, N d_state (state_size), R dt_rank (time_step_rank),
    X experts, K chosen experts, G group size, V vocabulary, F MLP width (mlp_intermediate_size), W convolution width.
"""
