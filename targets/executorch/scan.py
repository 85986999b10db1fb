# SPDX-License-Identifier: Apache-2.0
"""The selective scan as ExecuTorch runs it (`mossquant.targets.program.Scan`).

    h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) ⊗ B_t;   y_t = h_t C_t

`step` is one token. `loop` is any number: what does not depend on the state is computed for all tokens at once inside
the delegate, and a loop in the program carries the state: one multiplication and one addition a token. Other forms were
measured (`bench/executorch_scan.py`): beyond a few tokens this is the fastest, and its program does not grow with T.
"""

import torch
from torch import Tensor


def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token."""
    E, N = A.shape
    h = torch.exp(dt.view(E, 1) * A) * h + (dt * x).view(E, 1) * B.view(1, N)
    return torch.bmm(h.view(1, E, N), C.reshape(1, N, 1)).view(1, E), h


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """T tokens, T at run time."""
    # Imported here: the operator loads PyTorch's compiler.
    from torch._higher_order_ops.scan import scan

    E, N = A.shape
    decay = torch.exp(dt.view(-1, E, 1) * A)
    added = (dt * x).view(-1, E, 1) * B.reshape(-1, 1, N)

    def body(carried: Tensor, token: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        after = token[0] * carried + token[1]
        return after, after.clone()  # an output of the loop may not be the carried tensor itself

    last, every = scan(body, h, (decay, added))
    return torch.bmm(every, C.reshape(-1, N, 1)).view(-1, E), last
