# SPDX-License-Identifier: Apache-2.0
"""Training a MossNet from text: cross entropy plus the routers' balance loss, resumable to the bit.

    loss = CE + 0.01 · mean over routers of X Σ_e f_e P_e        (Fedus et al. 2021)

AdamW (β 0.9, 0.95; weight decay 0.1 on matrices only), linear warm-up, cosine to 2 %, gradients clipped at norm 1.
Half of every batch are streams that carry their state from one window to the next, as the model is used; the other
half are random windows that start from zeros. Which tokens a step sees depends on seed and step alone, so that a run
that was killed goes on exactly where its last snapshot stood.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from mossquant.checkpoint.tensorfiles import TensorFile, save_tensors
from mossquant.errors import InputError
from mossquant.files.json import parse_json
from mossquant.files.outputs import new_file
from mossquant.kernels.conv.autograd import causal_conv as conv_kernel
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.routing import Routing, balance_loss

BALANCE = 0.01
"""Weight of the balance loss."""
LOSS_ROWS = 512
"""Rows of logits that exist at once while the loss is computed."""

# Stored with two axes or more, but no matrices of a linear: weight decay is for those.
_UNDECAYED = ("A_log", "dt_bias", "conv")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch: windows a step; half of them (rounded down) carry state.
        window: tokens a window.
        peak_lr: learning rate after the warm-up.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        clip: largest gradient norm.
        seed: decides initial weights and the order of the windows.
    """

    steps: int
    batch: int = 16
    window: int = 256
    peak_lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    @property
    def least_tokens(self) -> int:
        """Tokens that a text must have: enough that the windows of a step need not be the same."""
        return 2 * (self.window + 1) * self.batch


@dataclass(frozen=True)
class TrainingStep:
    """What is shown after a step: the loss in nats a token (without the balance term), and tokens seen so far."""

    step: int
    steps: int
    loss: float
    balance: float
    tokens: int
    tokens_per_second: float


def learning_rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < schedule.warmup:
        return schedule.peak_lr * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Trainer:
    """Model, optimizer and carried state at some step.

    Args:
        config: shape of the model.
        tokens: the training text, [n] of any integer type.
        schedule: how to train.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, config: MossNetConfig, tokens: NDArray[np.integer[Any]], schedule: Schedule, *, device: str = "cpu"
    ) -> None:
        if len(tokens) < schedule.least_tokens:
            raise InputError(
                f"the training text has {len(tokens)} tokens, {schedule.least_tokens} are needed for one step; "
                "give more text"
            )
        self.schedule, self.tokens, self.device = schedule, tokens, device
        self.model = MossNet(config)
        self.model.reset_parameters(schedule.seed)
        self.model.to(device)
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            small = parameter.dim() <= 1 or name.rpartition(".")[2] in _UNDECAYED
            (others if small else matrices).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=schedule.peak_lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.step = 0
        self.losses: list[float] = []
        self.carrying = schedule.batch // 2
        self.state = self.model.initial_state(self.carrying)
        self._routings: list[Routing] = []

    def windows(self, step: int) -> Tensor:
        """The tokens of a step, [batch, window + 1]; the carrying streams first."""
        schedule, size = self.schedule, self.schedule.window
        length = len(self.tokens) - size - 1
        span = length // max(1, self.carrying)
        starts = [row * span + (step * size) % (span - span % size or span) for row in range(self.carrying)]
        random = np.random.default_rng([schedule.seed, step])
        starts += random.integers(0, length, schedule.batch - self.carrying).tolist()
        rows = np.stack([self.tokens[start : start + size + 1] for start in starts])
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    def _forward(self) -> Forward:
        on_cpu = self.device == "cpu"
        return Forward(
            scan="kernel" if on_cpu else "chunked",
            matmul_dtype=torch.bfloat16 if not on_cpu or _fast_bf16() else None,
            dense_ssm=True,
            conv=conv_kernel if on_cpu else None,
            reroute=self._remember,
        )

    def _remember(self, name: str, routing: Routing) -> Routing:
        if routing.logits is not None:
            self._routings.append(routing)
        return routing

    def advance(self) -> tuple[float, float]:
        """One optimizer step. Returns the cross entropy (nats a token) and the mean balance loss."""
        schedule = self.schedule
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, self.step)
        windows = self.windows(self.step)
        fresh = self.model.initial_state(schedule.batch - self.carrying)
        state = {name: torch.cat([self.state[name], fresh[name]]) for name in fresh}
        self._routings = []
        run = self._forward()
        hidden, after = self.model.hidden(windows[:, :-1], state, run)
        weight = self.model.embeddings if self.model.lm_head is None else self.model.lm_head
        dtype = run.matmul_dtype or torch.float32
        loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), weight, windows[:, 1:].flatten(), dtype
        )
        balance = torch.zeros((), device=self.device)
        if self._routings:
            balance = torch.stack([balance_loss(routing) for routing in self._routings]).mean()
        if not bool(torch.isfinite(loss)):
            raise InputError(
                f"training diverged at step {self.step}: the loss is not finite; lower the learning rate, remove the "
                "snapshot and start again"
            )
        self.optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), schedule.clip)
        self.optimizer.step()
        self.state = {name: value[: self.carrying].detach() for name, value in after.items()}
        self.step += 1
        self.losses.append(loss.item())
        return loss.item(), balance.item()

    def run(
        self, *, snapshot: Path | None = None, every: int = 200, shown: Callable[[TrainingStep], None] | None = None
    ) -> None:
        """Train to the end of the schedule, writing a snapshot every so many steps."""
        tokens_a_step = self.schedule.batch * self.schedule.window
        last = time.perf_counter()
        while self.step < self.schedule.steps:
            loss, balance = self.advance()
            now = time.perf_counter()
            if shown is not None:
                rate = tokens_a_step / (now - last)
                shown(TrainingStep(self.step, self.schedule.steps, loss, balance, self.step * tokens_a_step, rate))
            last = now
            if snapshot is not None and (self.step % every == 0 or self.step == self.schedule.steps):
                self.save(snapshot)

    def save(self, path: Path) -> None:
        """Write model, optimizer and carried state to one safetensors file, aside and renamed."""
        arrays: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            arrays[f"model.{name}"] = parameter.detach().cpu()
            for key, value in self.optimizer.state[parameter].items():
                arrays[f"optimizer.{name}.{key}"] = value.detach().cpu()
        arrays |= {f"state.{name}": value.detach().cpu().contiguous() for name, value in self.state.items()}
        arrays["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        with new_file(path, force=True) as partial:
            save_tensors(arrays, partial, metadata={"run": json.dumps(self.identity())})

    def identity(self) -> dict[str, Any]:
        """What must be equal for a snapshot to be continued."""
        return {
            "config": self.model.config.to_json(torch_dtype="float32"),
            "schedule": asdict(self.schedule),
            "tokens": len(self.tokens),
            "tokens_sha256": self._tokens_sha256,
        }

    @cached_property
    def _tokens_sha256(self) -> str:
        # Every snapshot asks for it, and a text has millions of tokens.
        return hashlib.sha256(self.tokens.astype(np.int32).tobytes()).hexdigest()

    def restore(self, path: Path) -> None:
        """Continue from a snapshot.

        Raises:
            InputError: the snapshot is none, or of another config, schedule or text.
        """
        try:
            opened = TensorFile(path)
            run = parse_json(opened.metadata["run"])
        except (SafetensorError, OSError, KeyError, ValueError):
            raise InputError(f"{path} is not a training snapshot; remove it to start again") from None
        if run != json.loads(json.dumps(self.identity())):
            raise InputError(f"{path} belongs to another config, schedule or text; remove it to start again")
        arrays = {name: opened.tensor(name) for name in opened.shapes}
        for name, parameter in self.model.named_parameters():
            with torch.no_grad():
                parameter.copy_(arrays[f"model.{name}"])
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(self.device) for key, value in moments.items()
            }
        self.state = {name: arrays[f"state.{name}"].to(self.device) for name in self.state}
        self.losses = arrays["losses"].tolist()
        self.step = len(self.losses)


class _HeadLoss(torch.autograd.Function):
    """Mean cross entropy of softmax(hidden · weightᵀ), a few rows at a time, so that the logits of a batch never exist
    at once: the gradients of hidden and weight are made while the rows' probabilities are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        table = weight.detach().to(dtype)
        source = hidden.detach().to(dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(source), LOSS_ROWS):
            rows = source[start : start + LOSS_ROWS]
            logits = (rows @ table.T).float()
            aim = targets[start : start + LOSS_ROWS, None]
            log_p = torch.log_softmax(logits, -1)
            total -= log_p.gather(1, aim).sum()
            p = log_p.exp_()
            p.scatter_add_(1, aim, torch.full_like(aim, -1, dtype=p.dtype))
            p = p.to(dtype)
            d_hidden[start : start + LOSS_ROWS] = p @ table
            d_weight += p.T @ rows
        ctx.save_for_backward(d_hidden / len(source), d_weight / len(source))
        return total / len(source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], d_weight * grads[0], None, None


def _fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (otherwise PyTorch emulates it slower than fp32)."""
    capability: Mapping[str, Any] = torch.cpu.get_capabilities()
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))
