# SPDX-License-Identifier: Apache-2.0
"""The operators for PyTorch: what a graph says of them. They are computed by libmoss alone (`operators.cc`).

    embedding   tokens [1, T] → x [T, D]
    ssm_moe     x [T, D], window [1, W−1, E], h [1, strips, N, 16] → x + block(norm(x)), window and h after it
    mlp_moe     x [T, D] → x + block(norm(x))
    head        x [T, D] → logits [1, T, V], or of the last position [1, 1, V]

Matrices are bytes, packed as in a .moss, or fp32 values; `formats` says what each is in and `layout` what they are
packed for, as numbers (`mossquant.targets.native.blocks.calls`). Small tensors have the form in which kernels read them
(`moss_blocks.h`). Letters as in `mossquant.model`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

NAMESPACE = "mossquant"

_PACKED = "int layout, int[] formats"
_SCHEMAS = {
    "embedding": (f"Tensor tokens, Tensor table, int vocabulary, int hidden, {_PACKED}", ("x",)),
    "ssm_moe": (
        "Tensor x, Tensor window, Tensor h, Tensor in_proj, Tensor[] x_proj, Tensor[] dt_proj, Tensor out_proj, "
        "Tensor norm, Tensor? router, Tensor conv, Tensor conv_bias, Tensor dt_bias, Tensor rate, Tensor D, "
        f"float eps, int rank, int chosen, {_PACKED}",
        ("x_after", "window_after", "h_after"),
    ),
    "mlp_moe": (
        "Tensor x, Tensor[] w1, Tensor[] w3, Tensor[] w2, Tensor norm, Tensor? router, "
        f"float eps, int mlp_hidden, int chosen, {_PACKED}",
        ("x_after",),
    ),
    "head": (f"Tensor x, Tensor matrix, Tensor norm, float eps, int vocabulary, bool last, {_PACKED}", ("logits",)),
}
"""Operator → arguments, outputs."""

_library: Any = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, arguments: str, outputs: tuple[str, ...]) -> None:
    """The operator, and the variant with its outputs given, which ExecuTorch calls."""
    returned = ["Tensor"] * len(outputs)
    given = [f"Tensor({mark}!)" for mark in "abc"[: len(outputs)]]
    out = ", ".join(f"{kind} {output}" for kind, output in zip(given, outputs, strict=True))
    _library.define(f"{name}({arguments}) -> ({', '.join(returned)})")
    _library.define(f"{name}.out({arguments}, *, {out}) -> ({', '.join(given)})")


for _name, (_arguments, _outputs) in _SCHEMAS.items():
    _define(_name, _arguments, _outputs)


def _embedding(tokens: Tensor, table: Tensor, vocabulary: int, hidden: int, *packed: Any) -> Tensor:
    return torch.empty((tokens.shape[1], hidden), device=tokens.device)


def _ssm_moe(x: Tensor, window: Tensor, h: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(window), torch.empty_like(h)


def _mlp_moe(x: Tensor, *constants: Any) -> Tensor:
    return torch.empty_like(x)


def _head(x: Tensor, matrix: Tensor, norm: Tensor, eps: float, vocabulary: int, last: bool, *packed: Any) -> Tensor:
    return x.new_empty((1, 1 if last else x.shape[0], vocabulary))


for _name, _shapes in (("embedding", _embedding), ("ssm_moe", _ssm_moe), ("mlp_moe", _mlp_moe), ("head", _head)):
    register_fake(f"{NAMESPACE}::{_name}", _shapes, lib=_library)
