# SPDX-License-Identifier: Apache-2.0
"""Names of the graph's inputs and outputs.

    inputs   tokens int64 [B, T];  first_logit int64 [1];  each state array of the model under its name, fp32 [B, …]
    outputs  logits fp32 [B, positions, V];  each state under its name + ".out"

Logits are computed from position `first_logit` on: 0 gives all, −1 the last alone, so that a prefill need not pay the
head at every position. Letters as in `mossquant.model`.
"""

from mossquant.model.tensors import StateSpec

TOKENS, FIRST_LOGIT, LOGITS, STATE_OUT = "tokens", "first_logit", "logits", ".out"


def state_shape(spec: StateSpec, *, out: bool) -> list[int | str]:
    """Shape of a state array as the graph takes it or gives it; an axis that grows has a name, another one for each."""
    return ["B", *spec.symbolic(f"{spec.name}.{'after' if out else 'before'}")]
