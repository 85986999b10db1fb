# SPDX-License-Identifier: Apache-2.0
"""`recover`: distil what rounding lost back into a solved model, through the recurrence.

    loss = mean over tokens of KL(p ‖ q)  +  λ · mean over routers and tokens of KL(softmax(ρ) ‖ softmax(ρ'))

p and q are the next-token distributions of the full-precision model and of the one that will be stored, ρ and ρ' all
logits of a router in the one and in the other. Everything is computed in fp32, with exactly the codes and scales that
will be stored (`mossquant.calibration.student`). Adam, short warm-up, cosine. Which tokens a step sees depends on the
text and the step alone: every window once, in an order of its own, before any comes again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from mossquant.calibration.meter import head_of, learning_bytes
from mossquant.calibration.products import MULTIPLIES_BF16, gradient, linear, product
from mossquant.calibration.student import Planned, Stored, Student
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.inputs import activation_model, expert_input_model
from mossquant.checkpoint.tensorfiles import TensorFile, save_tensors
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.files.outputs import new_file
from mossquant.formats import QuantizedTensor, get_format
from mossquant.kernels.conv.autograd import causal_conv as conv_kernel
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, tensor_specs
from mossquant.model.routing import Routing
from mossquant.model.tensors import Use, outside_blocks
from mossquant.plan.plan import Plan
from mossquant.plan.recipe import RecoveryActivations
from mossquant.progress import Progress
from mossquant.release import release

Strength = Literal["weights", "scales"]
"""What is trained beside norms, routers and other kept tensors: codes and scales, or scales alone."""

EVERY = 100
"""Steps between snapshots."""
SNAPSHOT = 26
"""Bytes a parameter of snapshots, the new beside the last: a value and two moments in fp32, scales' too."""
LEAST_TOKENS = 4
"""A shorter text says nothing."""
_LOGITS = 1 << 20
"""Logits of a model that exist at once while the loss is computed."""
_TRAINED, _OF_TABLE = 28, 24
"""Bytes a parameter that are held: the model's, what was solved, values with gradients and two moments, and what is
stored of them; and those more of the table's."""


@dataclass(frozen=True)
class Rates:
    """How fast and on how much at once. Found on text that nothing was judged on.

    Attributes:
        batch: windows a step, fewer where few tokens would otherwise give fewer steps than `steps`.
        steps: how many steps are enough.
        window: tokens a window, each from an empty state.
        codes: learning rate of weights, in units of their group's scale.
        small: of quantized tensors that are no matrices, relative to their group's largest value.
        scales: of scales, relative.
        kept: of kept tensors, relative to their root mean square.
        routing: λ.
        warmup: share of the steps with a rate that rises.
        seed: decides the order of the windows.
    """

    batch: int = 8
    steps: int = 192
    window: int = 128
    codes: float = 4e-3
    small: float = 2e-3
    scales: float = 1e-3
    kept: float = 2e-3
    routing: float = 10.0
    warmup: float = 0.05
    seed: int = 0

    @classmethod
    def of(cls, plan: Plan) -> "Rates":
        """The defaults for a plan: what is no code moves by as much less as most weights' codes are finer than 4 bits.

        A step of 1e-3 of a norm or a scale is little beside a 4-bit code and more than an 8-bit one is worth.
        """
        weights: dict[int, int] = {}
        for entry in plan.tensors:
            if entry.format is not None:
                bits = get_format(entry.format).bits
                weights[bits] = weights.get(bits, 0) + entry.count
        share = 2.0 ** (4 - max(weights, key=lambda bits: weights[bits], default=4))
        usual = cls()
        return replace(usual, small=share * usual.small, scales=share * usual.scales, kept=share * usual.kept)


@dataclass(frozen=True)
class RecoveryStep:
    """What is shown after a step: KL at the output and of the routers (means, nats a token), before the step."""

    step: int
    steps: int
    kl: float
    routing: float
    tokens: int


def recover(
    weights: Weights,
    plan: Plan,
    solved: Mapping[str, QuantizedTensor],
    text: CalibrationText,
    *,
    tokens: int,
    strength: Strength = "weights",
    activations: RecoveryActivations = "fp32",
    rates: Rates | None = None,
    device: str = "cpu",
    model: MossNet | None = None,
    left: Mapping[str, Sequence[int]] | None = None,
    snapshot: Path | None = None,
    progress: Progress | None = None,
    shown: Callable[[RecoveryStep], None] | None = None,
) -> dict[str, Stored]:
    """Distil the full-precision model into what a plan stores of it.

    Args:
        weights: the full-precision model, or what pruning left of it.
        plan: its plan.
        solved: tensor name → its quantized matrix view, of every tensor that the plan quantizes.
        text: what is learned from; read more than once where it has fewer than `tokens`.
        tokens: how many to learn from, rounded up to whole steps.
        strength: what is trained.
        activations: what enters the linears.
        rates: how fast; None: the defaults for the plan.
        device: "cpu" or "cuda".
        model: the full-precision model in fp32 on that device, where it is loaded already; it stays as it is. Of a
            pruned model it must be given: the whole one, which teaches.
        left: of a pruned model, router's name in a pass → the experts of the whole model that are left behind it.
        snapshot: file in which the run is kept every `EVERY` steps; one that is there is gone on from, to the bit where
            the number of threads is the same. It stays at the end.
        progress: called after each step, with tokens done and in all.
        shown: called after each step, with the losses.

    Returns:
        Every tensor of the plan, by name: quantized ones in their format, kept ones in the type in which the plan
        keeps them, on the CPU.

    Raises:
        InputError: an unknown strength or way of activations, no tokens asked for, fewer than 4 tokens of text, a loss
            that is not finite, a snapshot of another run.
    """
    _check(strength, Strength, "strength")
    _check(activations, RecoveryActivations, "activation mode")
    if tokens < 1:
        raise InputError(f"recovery from {tokens} tokens; ask for one or more")
    rates = rates or Rates.of(plan)
    schedule = _Windows(text, rates, tokens)
    codes = strength == "weights"
    model = load_model(weights).to(device) if model is None else model
    distillation = _Distillation(
        weights, plan, solved, model, left or {}, codes=codes, activations=activations, device=device
    )
    student = distillation.student
    peaks = {"codes": rates.codes, "small": rates.small, "scales": rates.scales, "kept": rates.kept}
    groups = [{"params": of, "lr": peaks[kind], "peak": peaks[kind]} for kind, of in student.groups.items() if of]
    # Gradients of a mean over thousands of tokens are small: a usual ε would slow the smallest ones down.
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15, fused=True)
    run = _Run(snapshot, optimizer, _identity(weights, plan, solved, text, tokens, strength, activations, rates))
    for step in range(run.restore(), schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share(step, schedule.steps, rates.warmup)
        kl, routing = distillation.loss(schedule.windows(step).to(device))
        if not bool(torch.isfinite(kl) & torch.isfinite(routing)):
            raise InputError(f"recovery diverged at step {step}: the loss is not finite; check the model and the text")
        optimizer.zero_grad(set_to_none=True)
        (kl + rates.routing * routing).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        student.stay_in_range()
        if (step + 1) % EVERY == 0:
            run.save(step + 1)
        done = (step + 1) * schedule.tokens_a_step
        if progress is not None:
            progress("recovering", done, schedule.steps * schedule.tokens_a_step)
        if shown is not None:
            shown(RecoveryStep(step + 1, schedule.steps, kl.item(), routing.item(), done))
    return student.tensors()


class _Distillation:
    """The full-precision model, its student, and what lies between them."""

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        solved: Mapping[str, QuantizedTensor],
        model: MossNet,
        left: Mapping[str, Sequence[int]],
        *,
        codes: bool,
        activations: RecoveryActivations,
        device: str,
    ) -> None:
        self.student = Student(weights, plan, solved, codes=codes, device=device)
        self._model, self._left, self._device = model, left, device
        # Its parameters are given anew each pass: of the learner only the shape counts.
        self._learner = (
            model if weights.config == model.config else MossNet(weights.config).requires_grad_(False).to(device)
        )
        self._inputs = _inputs(Planned(weights, plan, solved), activations)

    def loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """windows int64 [B, T] → KL at the output and of the routers, means."""
        model, learner, student = self._model, self._learner, self.student
        exact, own = dict[str, Tensor](), dict[str, Tensor]()
        with torch.no_grad():
            taught, _ = model.hidden(windows, model.initial_state(len(windows)), self._run(exact))
        student.refresh()
        run = self._run(own, parameter=student.parameter, **self._inputs)
        hidden, _ = learner.hidden(windows, learner.initial_state(len(windows)), run)
        seen, table = _head(learner, hidden, run, student)
        kl: Tensor = HeadDivergence.apply(seen, table, taught.flatten(0, 1), head_of(model))  # type: ignore[no-untyped-call]
        # A router is taught among the experts that are left; one of a single expert is gone.
        taught_to = {
            name: logits if name not in self._left else logits[:, list(self._left[name])]
            for name, logits in exact.items()
            if name in own
        }
        return kl, routers_apart(taught_to, own)

    def _run(self, logits: dict[str, Tensor], **more: Any) -> Forward:
        """The fast form; routers' logits [rows, X] are put into `logits`, by the routers' names."""
        on_cpu = self._device == "cpu"

        def remember(name: str, routing: Routing) -> Routing:
            if routing.logits is not None:
                logits[name] = routing.logits
            return routing

        scan: Literal["kernel", "chunked"] = "kernel" if on_cpu else "chunked"
        conv = conv_kernel if on_cpu else None
        return Forward(scan=scan, dense_ssm=True, multiply=linear, conv=conv, reroute=remember, **more)


def recovery_bytes(weights: Weights) -> int:
    """Anonymous memory of recovery by the usual rates, at most, the full-precision model and what was solved with it.

    Of a tied table the gradients as a head's and as a table's are there before they are added, and their parts.
    """
    usual, table = Rates(), weights.config.vocab_size * weights.config.hidden_size
    return (
        _TRAINED * weights.origin.parameters + _OF_TABLE * table + learning_bytes(weights, usual.batch * usual.window)
    )


def check_snapshot(path: Path) -> TensorFile | None:
    """A snapshot of recovery; None where there is no file. Raises `InputError`: the file is something else."""
    if not path.exists():
        return None
    try:
        opened = TensorFile(path)
    except (SafetensorError, OSError):
        opened = None
    if opened is None or "run" not in opened.metadata:
        raise InputError(f"{path} is not a snapshot of recovery; remove it to start again")
    return opened


class _Run:
    """A run as a file, from which it goes on: the parameters, the optimizer's moments, and how many steps are done.

    Args:
        path: the file; None: nothing is kept.
        optimizer: whose parameters and moments are the run.
        identity: what must be equal for a run to be gone on with.
    """

    def __init__(self, path: Path | None, optimizer: torch.optim.Adam, identity: str) -> None:
        self._path, self._optimizer, self._identity = path, optimizer, identity
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def save(self, step: int) -> None:
        """Write it, aside and renamed."""
        if self._path is None:
            return
        arrays = {"step": torch.tensor(step)}
        for number, parameter in enumerate(self._parameters):
            arrays[f"{number}.value"] = parameter.detach().cpu()
            for key, moment in self._optimizer.state[parameter].items():
                arrays[f"{number}.{key}"] = moment.detach().cpu()
        with new_file(self._path, force=True) as partial:
            save_tensors(arrays, partial, metadata={"run": self._identity})

    def restore(self) -> int:
        """Go on from the file, if there is one; steps that are done. Raises `InputError`: it is of another run."""
        opened = None if self._path is None else check_snapshot(self._path)
        if opened is None:
            return 0
        if opened.metadata.get("run") != self._identity:
            raise InputError(f"{self._path} belongs to another model, recipe, text or length; remove it to start again")
        arrays = {name: opened.tensor(name).clone() for name in opened.shapes}
        for number, parameter in enumerate(self._parameters):
            parameter.detach().copy_(arrays[f"{number}.value"])
            moments = {key: arrays[f"{number}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {
                key: of if key == "step" else of.to(parameter.device) for key, of in moments.items()
            }
        return int(arrays["step"])


def _identity(
    weights: Weights,
    plan: Plan,
    solved: Mapping[str, QuantizedTensor],
    text: CalibrationText,
    tokens: int,
    strength: Strength,
    activations: RecoveryActivations,
    rates: Rates,
) -> str:
    """SHA-256 of all that decides what a run does."""
    found = hashlib.sha256(json.dumps([dict(weights.origin.files), plan.to_json(), asdict(rates)]).encode())
    arithmetic = [release(), torch.get_num_threads(), MULTIPLIES_BF16]
    found.update(json.dumps([tokens, strength, activations, *arithmetic]).encode())
    found.update(text.tokens.astype(np.int64).tobytes())
    for name, one in solved.items():
        found.update(name.encode() + one.codes.numpy().tobytes() + one.scales.float().numpy().tobytes())
    return found.hexdigest()


def routers_apart(exact: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    """Mean over routers and rows of KL(softmax(exact) ‖ softmax(own)), logits [rows, X] by router; 0 without any."""
    if not exact:
        return torch.zeros(())
    apart = [
        F.kl_div(F.log_softmax(own[name], -1), F.log_softmax(logits, -1), log_target=True, reduction="batchmean")
        for name, logits in exact.items()
    ]
    return torch.stack(apart).mean()


class HeadDivergence(torch.autograd.Function):
    """Mean over rows of KL(softmax(taught · taught_tableᵀ) ‖ softmax(hidden · tableᵀ)).

    hidden and taught are [n, D], tables [V, D]. Few logits exist at once: the gradients of hidden and table,
    (q − p) · table and (q − p)ᵀ · hidden, are made while the rows' probabilities are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, taught: Tensor, taught_table: Tensor) -> Tensor:
        learning = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if learning else hidden
        d_table = torch.zeros_like(table) if learning else table
        total = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        for rows in range(0, len(hidden), max(1, _LOGITS // len(table))):
            part = slice(rows, rows + max(1, _LOGITS // len(table)))
            log_p = torch.log_softmax(product(taught[part], taught_table), -1)
            log_q = torch.log_softmax(product(hidden[part], table), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if learning:
                difference = log_q.exp_().sub_(p)
                d_hidden[part] = gradient(difference, table.T)
                d_table += gradient(difference.T, hidden[part].T)
        if learning:
            ctx.save_for_backward(d_hidden.div_(len(hidden)), d_table.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * grads[0], d_table * grads[0], None, None


class _Windows:
    """Which tokens a step sees."""

    def __init__(self, text: CalibrationText, rates: Rates, tokens: int) -> None:
        _check_text(text)
        self._tokens, self._seed = text.tokens, rates.seed
        self._size = min(rates.window, len(text))
        self._count = len(text) // self._size
        enough = max(1, tokens // (self._size * rates.steps))
        self._batch = min(rates.batch, enough, self._count)
        self.tokens_a_step = self._batch * self._size
        self.steps = -(-tokens // self.tokens_a_step)

    def windows(self, step: int) -> Tensor:
        """int64 [batch, window]."""
        return torch.from_numpy(np.stack([self._window(step * self._batch + row) for row in range(self._batch)]))

    def _window(self, index: int) -> np.ndarray[Any, Any]:
        """The text is cut anew each time that it was read, from another first token on."""
        time_read, place = divmod(index, self._count)
        random = np.random.default_rng([self._seed, time_read])
        first = int(random.integers(0, len(self._tokens) - self._count * self._size + 1))
        start = first + int(random.permutation(self._count)[place]) * self._size
        return self._tokens[start : start + self._size].astype(np.int64)


def _share(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0: share of the largest rate."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def _inputs(planned: Planned, activations: RecoveryActivations) -> dict[str, Any]:
    if activations == "fp32":
        return {}
    return {"activation": activation_model(planned), "expert_input": expert_input_model(planned)}


def _head(model: MossNet, hidden: Tensor, run: Forward, student: Student) -> tuple[Tensor, Tensor]:
    """hidden [B, T, D] → [B · T, D] as the head sees it, and the head's matrix [V, D]."""
    name = outside_blocks(tensor_specs(model.config))[Use.LINEAR].name
    rows, table = hidden.flatten(0, 1), head_of(model)
    seen = rows if run.activation is None else run.activation(name, rows)
    return seen, student.parameter([name], table)


def _check(given: str, known: Any, what: str) -> None:
    if given not in get_args(known):
        raise InputError.unknown(what, given, get_args(known))


def _check_text(text: CalibrationText) -> None:
    if len(text) < LEAST_TOKENS:
        raise InputError(f"{text.name} has {len(text)} tokens, {LEAST_TOKENS} are needed; give a longer text")
