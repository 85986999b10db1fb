# SPDX-License-Identifier: Apache-2.0
"""The reference Runner: the PyTorch model of a checkpoint, or of a quantized checkpoint's dequantized weights.

A quantized checkpoint is run with fp32 activations (what the weights alone cost) or with the activation formats of its
plan modelled, so that an artifact can be judged against its own arithmetic. Its states are always carried in the
formats of its plan. Letters as in `mossquant.model`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.inputs import activation_model, expert_input_model, state_model
from mossquant.checkpoint.locate import Located
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.formats.states import STATE_FORMATS, StateFormat
from mossquant.model.forward import Activation, Forward, Reroute
from mossquant.model.mossnet import MossNet, state_specs
from mossquant.model.routing import Routing
from mossquant.model.scan import ScanForm
from mossquant.runner import (
    Arrays,
    Floats,
    LogitsWanted,
    RunnerInfo,
    State,
    Tokens,
    checked_arrays,
    checked_batch,
    checked_tokens,
)
from mossquant.targets.torch.blocks import Blocks
from mossquant.targets.torch.product import product_of

ROWS_AT_ONCE = 2048
"""Rows (B · T) that go through the model in one piece: bounds the memory of a long prefill, and keeps matmuls large."""


class TorchRunner:
    """Runs a MossNet in PyTorch, in float32 or float64; logits come in the type computed in.

    One token is a decode step; more are scanned (`scan`), in pieces of `ROWS_AT_ONCE` rows.
    """

    def __init__(self, model: MossNet, info: RunnerInfo, *, scan: ScanForm | None = None) -> None:
        """Run a model that is in memory already.

        Args:
            model: the model; its parameters' type and device are what is computed with.
            info: what it is.
            scan: form of the scan for more than one token; None: the fused kernel, "chunked" off the CPU.
        """
        self._model, self._info = model, info
        self._dtype, self._device = model.norm_f.dtype, model.norm_f.device
        self._specs = state_specs(model.config)
        self._states = {spec.name: STATE_FORMATS["fp32"] for spec in self._specs}
        self._forward = Forward(scan=scan or ("kernel" if self._device.type == "cpu" else "chunked"))
        self._blocks: Blocks | None = None

    @classmethod
    def open(
        cls,
        source: str | Path | Located | Weights,
        *,
        activations: str = "fp32",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        scan: ScanForm | None = None,
        threads: int | None = None,
        kernels: bool = True,
    ) -> "TorchRunner":
        """Load a checkpoint or a quantized checkpoint.

        Args:
            source: a folder, or the name of the bundled model; or weights.
            activations: "planned" models the activation formats of a quantized checkpoint's plan, the name of a format
                that one at every input of quantized weights; "fp32" models none.
            dtype: float32 or float64; weights are converted, activations and state computed in it.
            device: where to run.
            scan: form of the scan for more than one token; None chooses by device.
            threads: threads of PyTorch's CPU operators, for the whole process; None leaves them.
            kernels: in float32 on the CPU, quantized weights with int8_block inputs are computed from the codes of
                both, by our kernels: whole blocks where states are carried in fp32, else linear by linear, as also
                where routers are watched or a form of the scan is asked for. False: by PyTorch's matmul, of the values
                that the codes mean. All differ by the rounding of fp32 sums, and by the codes that it decides.

        Raises:
            InputError: nothing that can be run is there, an unknown activation format, or one for a checkpoint that is
                not quantized.
        """
        weights = open_weights(source, verb="the PyTorch Runner")
        origin = weights.origin
        if activations != "fp32" and origin.recipe is None:
            raise InputError(f"{origin.path} is not quantized, so it has no {activations} activations; take fp32")
        if threads is not None:
            torch.set_num_threads(threads)
        runner = cls(load_model(weights, dtype=dtype).to(device), _info(weights, activations, dtype), scan=scan)
        runner._forward = replace(runner._forward, state=state_model(weights))
        runner._states = {spec.name: STATE_FORMATS[weights.state(spec.name)] for spec in runner._specs}
        if activations != "fp32":
            activation, way = activation_model(weights, activations), expert_input_model(weights, activations)
            runner._forward = replace(runner._forward, activation=activation, expert_input=way)
            if kernels and dtype == torch.float32 and runner._device.type == "cpu":
                runner._forward = replace(runner._forward, product=product_of(weights, activations))
                if scan is None and Blocks.computes(weights, activations):
                    runner._blocks = Blocks(weights, runner._model.embeddings)
        return runner

    @property
    def info(self) -> RunnerInfo:
        """What this is and what it can take."""
        return self._info

    @property
    def model(self) -> MossNet:
        """The PyTorch model; not to be changed."""
        return self._model

    @property
    def states(self) -> Mapping[str, StateFormat]:
        """The format in which each state array is carried, by name."""
        return self._states

    @property
    def activation(self) -> Activation | None:
        """What it models of the inputs of the linears; None: nothing."""
        return self._forward.activation

    def with_activation(self, activation: Activation | None, *, name: str) -> "TorchRunner":
        """The same weights behind another model of the activations, called `name` in its info."""
        info = replace(self._info, activations=name)
        runner = TorchRunner(self._model, info)
        runner._forward = replace(self._forward, activation=activation, product=None)
        runner._states = self._states
        return runner

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        return State(self._model.initial_state(checked_batch(batch)), batch)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        """Advance by tokens [B, T]; see `mossquant.runner.Runner`."""
        checked_tokens(tokens, state, self._info.vocab_size)
        return self._run(tokens, state, logits, self._forward, self._blocks)

    def run_with_margins(
        self, tokens: Tokens, state: State, *, logits: LogitsWanted = "all"
    ) -> tuple[Floats, State, Floats]:
        """Like a call; also says how near any router was to another choice of experts.

        Returns:
            Logits, the state, and margins [B, T]: over all routers, the smallest distance between the last logit that
            was chosen and the first that was not; infinite where no router leaves an expert out.
        """
        checked_tokens(tokens, state, self._info.vocab_size)
        batch, time = tokens.shape
        margins: dict[str, list[Tensor]] = {}

        def watch(name: str, routing: Routing) -> Routing:
            chosen = routing.chosen.shape[1]
            if routing.logits is not None and chosen < routing.experts:
                top = torch.topk(routing.logits, chosen + 1, dim=-1).values
                margins.setdefault(name, []).append((top[:, -2] - top[:, -1]).view(batch, -1))
            return routing

        values, state = self._run(tokens, state, logits, replace(self._forward, reroute=watch))
        smallest: Floats = np.full((batch, time), np.inf)
        for parts in margins.values():
            smallest = np.minimum(smallest, torch.cat(parts, 1).cpu().numpy())
        return values, state, smallest

    def run_routed(
        self, tokens: Tokens, state: State, reroute: Reroute, *, logits: LogitsWanted = "all"
    ) -> tuple[Floats, State]:
        """Like a call, in which every router's decision is shown to `reroute`, piece by piece of the tokens."""
        checked_tokens(tokens, state, self._info.vocab_size)
        return self._run(tokens, state, logits, replace(self._forward, reroute=reroute))

    def copy(self, state: State) -> State:
        """An independent copy; the model never changes a state array in place, so that sharing them is enough."""
        return State(dict(state.peek()), state.batch, position=state.position)

    def read(self, state: State) -> dict[str, NDArray[np.float32]]:
        """The state as named fp32 arrays [B, …]."""
        payload: Mapping[str, Tensor] = state.peek()
        return {name: value.to("cpu", torch.float32, copy=True).numpy() for name, value in payload.items()}

    def write(self, arrays: Arrays) -> State:
        """The inverse of `read`."""
        batch = checked_arrays(arrays, self._specs)
        names = [spec.name for spec in self._specs]
        state = {name: torch.tensor(arrays[name], dtype=self._dtype, device=self._device) for name in names}
        return State(state, batch)

    def _run(
        self, tokens: Tokens, state: State, wanted: LogitsWanted, forward: Forward, blocks: Blocks | None = None
    ) -> tuple[Floats, State]:
        batch, time = tokens.shape
        carried: Mapping[str, Tensor] = state.take()
        piece = max(1, ROWS_AT_ONCE // batch)
        whole = wanted == "all" and time > piece
        every = np.empty((batch, time, self._info.vocab_size), _numpy_type(self._dtype)) if whole else None
        values = np.empty(0, np.float32)
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(self._device)
            for start in range(0, time, piece):
                part = ids[:, start : start + piece]
                run = replace(forward.step() if part.shape[1] == 1 else forward, position=state.position + start)
                if blocks is None:
                    hidden, carried = self._model.hidden(part, carried, run)
                    head: Callable[[Tensor], Tensor] = partial(self._model.head, run=run)
                else:
                    hidden, carried = blocks.hidden(part, carried)
                    head = blocks.head
                if wanted == "all":
                    values = head(hidden).cpu().numpy()
                    if every is not None:
                        every[:, start : start + piece] = values
                elif start + piece >= time:
                    values = head(hidden[:, -1:]).cpu().numpy()
        return values if every is None else every, State(carried, batch, position=state.position + time)


def _numpy_type(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype == torch.float64 else np.float32


def _state_format(weights: Weights, dtype: torch.dtype) -> str:
    """The formats of all state arrays; what is carried as it is, is carried in the type computed in."""
    own = {weights.state(spec.name) for spec in state_specs(weights.config)} or {"fp32"}
    return ", ".join(sorted("fp64" if name == "fp32" and dtype == torch.float64 else name for name in own))


def _info(weights: Weights, activations: str, dtype: torch.dtype) -> RunnerInfo:
    origin = weights.origin
    return RunnerInfo(
        path=origin.path,
        kind=origin.kind,
        vocab_size=weights.config.vocab_size,
        activations=activations,
        state_format=_state_format(weights, dtype),
        weights=origin.name,
        weight_bytes=origin.payload_bytes,
        file_bytes=origin.file_bytes,
        parameters=origin.parameters,
        config=weights.config.to_json(torch_dtype=origin.torch_dtype),
        source_files=origin.files,
        files=origin.files,
        seen_text=origin.seen_text,
    )
