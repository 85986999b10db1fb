# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch: one .pte with prefill, score and decode, its linears delegated to XNNPACK; and a Runner of it."""
