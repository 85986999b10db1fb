# SPDX-License-Identifier: Apache-2.0
"""Names of the graph's inputs and outputs.

    inputs   tokens int64 [B, T];  first_logit int64 [1];
             layers.I.mixer.conv fp32 [B, E, W−1] and layers.I.mixer.ssm fp32 [B, E, N] of every layer I
    outputs  logits fp32 [B, positions, V];  each state under its name + ".out"

Logits are computed from position `first_logit` on: 0 gives all, −1 the last alone, so that a prefill need not pay the
head at every position. Letters as in `mossquant.model`.
"""

__all__ = ["FIRST_LOGIT", "LOGITS", "STATE_OUT", "TOKENS"]

TOKENS, FIRST_LOGIT, LOGITS, STATE_OUT = "tokens", "first_logit", "logits", ".out"
