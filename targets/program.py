# SPDX-License-Identifier: Apache-2.0
"""The model as a program for targets that compile PyTorch: three methods with explicit state, written once.

    prefill(tokens [1, T], *states) → logits [1, 1, V] of the last position, *states      T ≥ 2, dynamic
    score(tokens [1, T], *states)   → logits [1, T, V], *states                            T ≥ 2, dynamic
    decode(tokens [1, 1], *states)  → logits [1, 1, V], *states

States come and go in the order of `state_specs`, each [1, …]. All experts are computed (no branch, no gather):
w1, w3 and x_proj of all experts stacked along the outputs, gates multiplied into what they give, w2 and
dt_proj summed over the experts. The gate of an expert that was not chosen is 0.

What a matrix becomes is the target's: it provides `Matrices`. How the recurrence runs over a chunk is, too: a `Scan`.
ONNX does not come from here: it branches on the chosen experts, stores codes in its own operators and holds every
shape in one graph, none of which can be said in an exported PyTorch program. Letters as in `mossquant.model`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mossquant.model.block import Block
from mossquant.model.blocks import blocks_of
from mossquant.model.config import MossNetConfig
from mossquant.model.mixer import Mixer
from mossquant.model.mlp import Mlp
from mossquant.model.tensors import TensorSpec, Use, outside_blocks

MethodName = Literal["prefill", "score", "decode"]
METHODS: tuple[MethodName, ...] = ("prefill", "score", "decode")

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""x [T, E], Δ [T, E], A [E, N], B [T, N], C [T, N], h [E, N] → y [T, E] without D ⊙ x, h after the last token."""


class Matrices(Protocol):
    """What a target makes of the tensors of a model; names are those of the checkpoint."""

    def stacked(self, names: Sequence[str]) -> nn.Module:
        """x [T, K] → [T, X · N]: every matrix of `names` on the same input, their outputs side by side."""
        ...

    def summed(self, names: Sequence[str]) -> nn.Module:
        """x [T, X, K] → [T, N]: Σ_e W_e x_e."""
        ...

    def table(self, name: str) -> nn.Module:
        """tokens [T] → their rows [T, D]."""
        ...

    def value(self, name: str) -> Tensor:
        """A small tensor as fp32, in its shape in the checkpoint."""
        ...


class _Norm(nn.Module):
    """x / √(mean(x²) + eps) · weight; the sum of squares as a product of matrices, which every delegate has."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps, self.width = eps, weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        squares = torch.bmm(x.view(-1, 1, self.width), x.view(-1, self.width, 1)).view(-1, 1)
        return x * torch.rsqrt(squares * (1 / self.width) + self.eps) * self.weight


class _Router(nn.Module):
    """Gates [T, X] from u [T, D]: softmax over the chosen logits, 0 for the other experts."""

    def __init__(self, matrices: Matrices, name: str, experts: int, chosen: int) -> None:
        super().__init__()
        self.logits = matrices.stacked([name])
        self.experts, self.chosen = experts, chosen

    def forward(self, u: Tensor) -> Tensor:
        """[T, D] → [T, X]."""
        logits = self.logits(u)
        if self.chosen == self.experts:
            return torch.softmax(logits, -1)
        values, indices = torch.topk(logits, self.chosen, -1)
        return torch.zeros_like(logits).scatter(-1, indices, torch.softmax(values, -1))


def _of_role(specs: Iterable[TensorSpec], role: str) -> list[str]:
    return [spec.name for spec in specs if spec.role == role]


class _Lowered(nn.Module, ABC):
    """A block: made of what the target makes of its tensors, the model's shape, and those tensors without the norm.

    Attributes:
        names: of the norms and of the blocks of this kind in the program, which keeps its constants in their order.
    """

    names: ClassVar[tuple[str, str]]

    @abstractmethod
    def __init__(self, matrices: Matrices, config: MossNetConfig, specs: Sequence[TensorSpec]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, u: Tensor, states: Sequence[Tensor], scan: Scan) -> tuple[Tensor, list[Tensor]]:
        """u [T, D] normed, its own states [1, …] → [T, D], its states after the last token."""


class _Mixer(_Lowered):
    """`mossquant.model.mixer`."""

    names = ("norms", "mixers")
    A: Tensor
    D: Tensor
    conv_bias: Tensor
    bias: Tensor

    def __init__(self, matrices: Matrices, config: MossNetConfig, specs: Sequence[TensorSpec]) -> None:
        super().__init__(matrices, config, specs)
        layer = specs[0].layer
        assert layer is not None
        E, W = config.d_inner, config.conv_kernel
        self.inner, self.states, self.rank, self.taps = E, config.state_size, config.time_step_rank, W
        self.experts = X = config.ssm_experts(layer)

        def names(role: str) -> list[str]:
            return _of_role(specs, f"ssm.{role}")

        def small(role: str) -> Tensor:
            return matrices.value(names(role)[0])

        self.in_proj, self.out_proj = matrices.stacked(names("in_proj")), matrices.stacked(names("out_proj"))
        self.x_proj, self.dt_proj = matrices.stacked(names("expert.x_proj")), matrices.summed(names("expert.dt_proj"))
        taps = small("conv").view(E, W)
        for tap in range(W):
            self.register_buffer(f"tap_{tap}", taps[:, tap].contiguous())
        self.register_buffer("conv_bias", small("conv_bias"))
        self.register_buffer("A", -torch.exp(small("A_log")))
        self.register_buffer("D", small("D"))
        bias = torch.stack([matrices.value(name) for name in names("expert.dt_bias")])
        self.router: nn.Module | None = None
        self.mix_bias: nn.Linear | None = None
        if X > 1:
            self.router = _Router(matrices, names("router")[0], X, config.ssm_chosen(layer))
            self.mix_bias = nn.Linear(X, E, bias=False)
            self.mix_bias.weight = nn.Parameter(bias.T.contiguous(), requires_grad=False)
        else:
            self.register_buffer("bias", bias[0])

    def forward(self, u: Tensor, states: Sequence[Tensor], scan: Scan) -> tuple[Tensor, list[Tensor]]:
        """u [T, D] normed, states [1, E, W−1] and [1, E, N] → [T, D], states."""
        conv, ssm = states
        E, N, R, X, W, T = self.inner, self.states, self.rank, self.experts, self.taps, u.shape[0]
        both = self.in_proj(u)
        x, z = both[:, :E], both[:, E:]
        window = torch.cat([conv.view(E, W - 1).transpose(0, 1), x], 0)
        total = self.conv_bias
        for tap in range(W):
            total = total + window[tap : tap + T] * getattr(self, f"tap_{tap}")
        x = F.silu(total)
        projected = self.x_proj(x).view(-1, X, R + 2 * N)
        if self.router is not None and self.mix_bias is not None:
            gates = self.router(u)
            delta = projected[:, :, :R] * gates.view(-1, X, 1)
            bc = torch.bmm(gates.view(-1, 1, X), projected[:, :, R:]).view(-1, 2 * N)
            dt = self.dt_proj(delta) + self.mix_bias(gates)
        else:
            bc = projected[:, :, R:].reshape(-1, 2 * N)
            dt = self.dt_proj(projected[:, :, :R]) + self.bias
        y, h = scan(x, F.softplus(dt), self.A, bc[:, :N], bc[:, N:], ssm.view(E, N))
        out = self.out_proj((y + self.D * x) * F.silu(z))
        return out, [window[T:].transpose(0, 1).reshape(1, E, W - 1), h.view(1, E, N)]


class _Mlp(_Lowered):
    """`mossquant.model.mlp`."""

    names = ("mlp_norms", "mlps")

    def __init__(self, matrices: Matrices, config: MossNetConfig, specs: Sequence[TensorSpec]) -> None:
        super().__init__(matrices, config, specs)
        layer = specs[0].layer
        assert layer is not None
        self.experts, self.width = config.mlp_experts(layer), config.mlp_intermediate_size
        self.w1, self.w3 = (matrices.stacked(_of_role(specs, f"mlp.expert.{name}")) for name in ("w1", "w3"))
        self.w2 = matrices.summed(_of_role(specs, "mlp.expert.w2"))
        self.router: nn.Module | None = None
        if self.experts > 1:
            router = _of_role(specs, "mlp.router")[0]
            self.router = _Router(matrices, router, self.experts, config.mlp_chosen(layer))

    def forward(self, u: Tensor, states: Sequence[Tensor], scan: Scan) -> tuple[Tensor, list[Tensor]]:
        """u [T, D] normed → [T, D]."""
        hidden = (F.silu(self.w1(u)) * self.w3(u)).view(-1, self.experts, self.width)
        if self.router is not None:
            hidden = hidden * self.router(u).view(-1, self.experts, 1)
        return self.w2(hidden), []


BLOCKS: dict[type[Block], type[_Lowered]] = {Mixer: _Mixer, Mlp: _Mlp}
"""How each kind of block is lowered."""


class Model(nn.Module):
    """What the methods share: every tensor once. A target traces its blocks, and makes the methods of them.

    Args:
        config: the model's shape.
        specs: its tensors, `mossquant.model.mossnet.tensor_specs`.
        matrices: what the target makes of them.

    Attributes:
        order: of each block, as they are computed: where its norm and itself lie, under which key, and how many states
            it has.
    """

    def __init__(self, config: MossNetConfig, specs: Sequence[TensorSpec], matrices: Matrices) -> None:
        super().__init__()
        outer, eps = outside_blocks(specs), config.rms_norm_eps
        self.table = matrices.table(outer[Use.TABLE].name)
        parts: dict[str, nn.ModuleDict] = {}
        self.order: list[tuple[str, str, str, int]] = []
        for lowered in BLOCKS.values():
            for name in lowered.names:
                parts[name] = nn.ModuleDict()
                self.add_module(name, parts[name])
        for layer, kind in blocks_of(config):
            norm, *own = kind.specs(config, layer)
            norms, blocks = BLOCKS[kind].names
            parts[norms][str(layer)] = _Norm(matrices.value(norm.name), eps)
            parts[blocks][str(layer)] = BLOCKS[kind](matrices, config, own)
            self.order.append((norms, blocks, str(layer), len(kind.states(config, layer))))
        self.norm_f = _Norm(matrices.value(outer[Use.NORM].name), eps)
        self.head = matrices.stacked([outer[Use.LINEAR].name])
