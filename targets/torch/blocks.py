# SPDX-License-Identifier: Apache-2.0
"""A model of quantized weights with `int8_block` inputs, computed block by block by libmoss, from the codes of both.

    tokens → x, a row of the table each → blocks, x + block(norm(x)) → head(norm(x))

What PyTorch computes is computed: the same codes by the same rule. Sums, norms, gates and scans are rounded in fp32 in
another order. Letters as in `mossquant.model`.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.weights import Weights
from mossquant.kernels import selected
from mossquant.model.blocks import blocks_of
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import activation_sites, state_specs
from mossquant.targets.native.blocks.calls import FORMATS, LAYOUTS, Call, Constant, Matrix, Small, calls, has_calls
from mossquant.targets.native.blocks.constants import held
from mossquant.targets.native.blocks.interface import MatrixData, MlpData, Shape, SsmData, call, pointer
from mossquant.targets.native.blocks.states import from_held, to_held
from mossquant.targets.native.export import host_layout

FORMAT = "int8_block"
"""Of the inputs that our kernels take."""


def fast_kernels() -> bool:
    """Whether this machine has kernels that beat a matmul of the values: scalar ones do not."""
    return not selected("linear", numbers=f"f32_{FORMAT}_int4_g32").endswith("_scalar")


class Blocks:
    """The two halves of a pass, as `MossNet` has them, with the same states; what lies between them is not normed yet.

    Args:
        weights: what `computes` says yes to.
        table: the table that rows are looked up in, fp32 [V, D].
    """

    def __init__(self, weights: Weights, table: Tensor) -> None:
        self._config, self._table, self._constants = weights.config, table, _Constants(weights)
        _, *blocks, head = calls(self._config, last=False)
        states = iter(state_specs(self._config))
        self._blocks = [
            (_BLOCKS[own.operator](self._config, own, self._constants), list(islice(states, own.states)))
            for own in blocks
        ]
        matrix, norm = head.constants
        self._matrix, self._norm = self._constants.matrix(matrix), self._constants.pointer(norm)

    @staticmethod
    def computes(weights: Weights, activations: str) -> bool:
        """Whether libmoss computes what a plan says, and fast.

        Args:
            weights: says formats and codes.
            activations: "planned", or the activation format that is used at every site.
        """
        config = weights.config
        read = [site.name for site in activation_sites(config) if any(map(weights.format, site.tensors))]
        seen = set(map(weights.activation, read)) if activations == "planned" else {activations}
        carried = {weights.state(spec.name) for spec in state_specs(config)}
        known = all(has_calls(kind) for _, kind in blocks_of(config))
        return known and seen == {FORMAT} and carried <= {"fp32"} and fast_kernels()

    def hidden(self, tokens: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T] int64 → the residual stream after the last block [B, T, D], and the new state."""
        x = self._table[tokens]  # a copy, to which every block adds
        after = dict(state)
        for run, specs in self._blocks:
            arrays = [np.array(to_held(spec, state[spec.name].numpy())) for spec in specs]  # copies: they are advanced
            run(x, *arrays)
            for spec, array in zip(specs, arrays, strict=True):
                after[spec.name] = torch.from_numpy(from_held(spec, array))
        return x, after

    def head(self, hidden: Tensor) -> Tensor:
        """The residual stream [B, T, D] → logits [B, T, V]."""
        x, V = hidden.contiguous(), self._config.vocab_size
        (*rows, D), logits = x.shape, torch.empty((*x.shape[:-1], V))
        sizes = V, D, self._norm, self._config.rms_norm_eps, math.prod(rows)
        call("moss_head", ctypes.byref(self._matrix), *sizes, pointer(x), pointer(logits))
        return logits


class _Constants:
    """What libmoss takes for the tensors of a checkpoint, each made once."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._layout = weights, host_layout()
        self._tensors: dict[Matrix | Small, Tensor] = {}

    def pointer(self, constant: Constant) -> int | None:
        """Of a small tensor, where there is one."""
        if constant is None:
            return None
        assert isinstance(constant, Small)
        return pointer(self._tensor(constant))

    def matrix(self, constant: Constant) -> MatrixData:
        assert isinstance(constant, Matrix)
        data, known = self._tensor(constant), self._weights.format(constant.name)
        number = FORMATS.index("float32" if known is None else known.name)
        return MatrixData(data.data_ptr(), data.nbytes, number, LAYOUTS.index(self._layout))

    def matrices(self, constant: Constant) -> Any:
        """Of the experts, one after the other."""
        assert isinstance(constant, tuple)
        return (MatrixData * len(constant))(*map(self.matrix, constant))

    def _tensor(self, constant: Matrix | Small) -> Tensor:
        if constant not in self._tensors:
            self._tensors[constant] = held(self._weights, constant, self._layout)
        return self._tensors[constant]


def _ssm(config: MossNetConfig, own: Call, constants: _Constants) -> Callable[..., None]:
    """The block's run(x [B, T, D], window [B, W−1, E], h [B, strips, N, 16]), in place."""
    in_proj, x_proj, dt_proj, out_proj, norm, router, conv, conv_bias, dt_bias, rate, D = own.constants
    eps, rank, chosen = own.settings
    small = {"norm": norm, "router": router, "conv": conv, "conv_bias": conv_bias, "dt_bias": dt_bias}
    ssm = SsmData(
        chosen=chosen,
        in_proj=constants.matrix(in_proj),
        x_proj=constants.matrices(x_proj),
        dt_proj=constants.matrices(dt_proj),
        out_proj=constants.matrix(out_proj),
        **{name: constants.pointer(value) for name, value in (small | {"rate": rate, "D": D}).items()},
    )
    assert isinstance(x_proj, tuple)
    ssm.experts = len(x_proj)
    shape = Shape(config.hidden_size, config.d_inner, config.state_size, config.conv_kernel, rank, 0, eps)

    def run(x: Tensor, window: NDArray[np.float32], h: NDArray[np.float32]) -> None:
        states = window.ctypes.data, h.ctypes.data
        call("moss_ssm_block", ctypes.byref(shape), ctypes.byref(ssm), *x.shape[:2], pointer(x), *states)

    return run


def _mlp(config: MossNetConfig, own: Call, constants: _Constants) -> Callable[..., None]:
    """The block's run(x [B, T, D]), in place."""
    *matrices, norm, router = own.constants
    eps, mlp_hidden, chosen = own.settings
    w1, w3, w2 = map(constants.matrices, matrices)
    norm_at, router_at = constants.pointer(norm), constants.pointer(router)
    mlp = MlpData(experts=len(w1), chosen=chosen, norm=norm_at, router=router_at, w1=w1, w3=w3, w2=w2)
    shape = Shape(config.hidden_size, 0, 0, 0, 0, mlp_hidden, eps)

    def run(x: Tensor) -> None:
        call("moss_mlp_block", ctypes.byref(shape), ctypes.byref(mlp), x.shape[0] * x.shape[1], pointer(x))

    return run


_BLOCKS = {"ssm_moe": _ssm, "mlp_moe": _mlp}
