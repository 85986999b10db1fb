# SPDX-License-Identifier: Apache-2.0
"""What each group of tensors costs in each format: KL at the model's output, the group alone, fp32 elsewhere.

Measured: the group's weights are replaced, what enters its layer is taken from the full-precision pass, the rest of the
model is run. Estimated, where measuring each would take too long: to second order in the change δ of the weights,

    KL a token ≈ ½ δᵀ F δ = ½ mean over windows of (g · δ)² / T,      g = ∇_W Σ_t log p(y_t),  y_t drawn from the model

with F the Fisher information (Amari 1998); terms between tokens of a window vanish in the mean, since a drawn token's
score has mean zero given what came before. One backward pass a window serves every group and format, and keeps what
adds up through the scan. Experts that change hands are no part of it; their number grows with |δ|, not with its square.
So the estimate is a · KL + k · r · √KL, with r the share of routers that come after the group, a and k fitted to ten
groups that are measured.

Losses don't add up: two groups may give a token the same other expert, which is then lost once. So some choices along
the frontier are measured as a whole, and what is promised of others lies between these.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from scipy.optimize import least_squares
from torch import Tensor

from mossquant.calibration.allocate import Choice, Option, frontier
from mossquant.calibration.effort import SCALED, Effort, Pace, choosing, choosing_bytes
from mossquant.calibration.meter import WINDOW, Meter, interval
from mossquant.calibration.options import OpenGroup, open_groups, rounded, stored_bytes
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.weights import Weights
from mossquant.device import check_device
from mossquant.errors import InputError
from mossquant.files.json import LARGEST, parse_stored, read_json, validated
from mossquant.files.outputs import check_free, check_outside, json_bytes, new_file
from mossquant.files.space import check_space
from mossquant.kernels.conv.autograd import causal_conv
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet
from mossquant.model.scan import ScanForm
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan.groups import Group
from mossquant.plan.recipe import STORED, Recipe, load_recipe, recipe_files
from mossquant.progress import Progress
from mossquant.release import release
from mossquant.text.text import Text

Method = Literal["measured", "estimated"]

WORK_OF_THE_VERB = 1e14
"""Changes · tokens · parameters that are measured one by one: about half an hour on two cores."""
LOOKED_AT = 8192
"""Tokens on which a change is measured, if not given."""
_DISK_BYTES = 10**6
"""What the file takes, at most."""
_SHORT = 128
"""Tokens of a window of the backward passes; twice as many tokens are read there as where groups are measured, since
the spread of an estimate is √(2 / windows)."""
_EVERY = 8
"""Windows of the backward passes after which the sums are kept."""
_PIECE = 1 << 16
"""Weights of a gradient that are multiplied at once."""
_FIRST = (0.0, -3.5)
"""Logarithms of a and k where the fit begins: about what models of 6M and 11M parameters came to."""
LEVELS, _APART = 6, 3.0
"""Choices that are measured as a whole, and how far apart the sums of their losses are at least."""
_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Loss:
    """One group in one format.

    Attributes:
        storage: the number format, or "stored".
        bytes: of the group in it.
        kl: nats a token, mean.
        ci95: its 95 % interval; None where it is estimated.
    """

    __pydantic_config__ = _STRICT

    storage: str
    bytes: int
    kl: float
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class GroupLosses:
    """One group of so many weights in each format that it may get; `expert` is set where one is looked at alone."""

    __pydantic_config__ = _STRICT

    name: str
    role: str
    layer: int | None
    expert: int | None
    weights: int
    tensors: tuple[str, ...]
    losses: tuple[Loss, ...]

    def kl(self, storage: str) -> float:
        """The loss in a format. Raises `KeyError` where it was not looked at."""
        return {loss.storage: loss.kl for loss in self.losses}[storage]


@dataclass(frozen=True)
class Level:
    """One choice of formats, changed at once: the sum of what its groups lose alone, and KL. Both are positive."""

    __pydantic_config__ = _STRICT

    sum: float
    kl: float


@dataclass(frozen=True)
class Sensitivities:
    """What each group costs in each format.

    Attributes:
        version: of the stored form.
        method: "measured", or "estimated" from gradients.
        model: file name → SHA-256 of the checkpoint.
        text: name of the text.
        text_sha256: of each of its files.
        tokens: tokens that were measured on.
        levels: what losses add up to, from every group in its smallest format on.
        groups: in processing order.
    """

    __pydantic_config__ = _STRICT

    version: Literal[1] = field(default=1, kw_only=True)
    method: Method
    model: Mapping[str, str]
    text: str
    text_sha256: tuple[str, ...]
    tokens: int
    levels: tuple[Level, ...]
    groups: tuple[GroupLosses, ...]

    @property
    def additivity(self) -> float:
        """With every group in its smallest format, KL over the sum of the losses."""
        first = self.levels[0] if self.levels else Level(0.0, 0.0)
        return first.kl / first.sum if first.sum > 0 else 1.0

    def promised(self, total: float) -> float:
        """KL of a choice whose losses have this sum: between levels on a line of logarithms, beyond in proportion."""
        if total <= 0 or not self.levels:
            return max(0.0, total)
        sums, kls = self._curve
        at = np.log(total)
        return float(np.exp(np.interp(at, sums, kls) + min(0.0, at - sums[0]) + max(0.0, at - sums[-1])))

    def within(self, kl: float) -> float:
        """The largest sum of losses of which no more than this KL is promised."""
        if kl <= 0 or not self.levels:
            return max(0.0, kl)
        sums, kls = self._curve
        at = np.log(kl)
        return float(np.exp(np.interp(at, kls, sums) + min(0.0, at - kls[0]) + max(0.0, at - kls[-1])))

    @property
    def _curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logarithms of the levels' sums and KL, both rising: more loss is never promised to be less KL."""
        sums, kls = np.log([(level.sum, level.kl) for level in reversed(self.levels)]).T
        return sums, np.maximum.accumulate(kls) + 1e-9 * np.arange(len(kls))

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any, *, where: str) -> "Sensitivities":
        """Read what `to_json` gave. Raises `InputError` for anything else."""
        return parse_stored(
            values, cls, where=where, noun="sensitivities", advice="Make them again with `mossquant sensitivity`."
        )

    @classmethod
    def read(cls, path: Path) -> "Sensitivities":
        """Read a file that `sensitivity` wrote. Raises `InputError`: not readable, or another file."""
        values = read_json(path, largest=LARGEST, advice="give a file that `mossquant sensitivity` wrote")
        return cls.from_json(values, where=str(path))

    def check(self, weights: Weights) -> None:
        """Raise `InputError`: they are of another model."""
        if dict(self.model) != dict(weights.origin.files):
            raise InputError(f"the sensitivities are of another model than {weights.origin.path}; measure it again")


def sensitivity(
    model: str | Path | Weights,
    output: str | Path,
    *,
    text: Sequence[str | Path | Text] = (),
    recipes: Sequence[str | Path] = ("int4", "int8"),
    tokens: int = LOOKED_AT,
    method: Method | None = None,
    experts: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
    said: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Sensitivities:
    """Measure what each group of tensors costs in each format, and write it as JSON.

    What is measured is kept in `OUTPUT.measuring`; the same call again goes on from there, with the same bytes in the
    end where the number of threads is the same.

    Args:
        model: a full-precision checkpoint folder, or the name "tiny"; or weights of which every tensor is kept.
        output: file to write.
        text: files to measure on; none: the bundled calibration text, for the bundled model.
        recipes: their rules with `choose` say which formats a group may get.
        tokens: how many tokens each group is measured on.
        method: "measured" or "estimated"; None: measured, unless that takes some half an hour or more.
        experts: also each expert's tensors of a group alone.
        device: where the model is run.
        force: replace a file that is at `output`.
        said: called with one line about what will take how long.
        progress: called after each group and format.

    Raises:
        InputError: a bad checkpoint or text, or a quantized checkpoint; recipes that leave nothing open; an output that
            cannot be written; an `OUTPUT.measuring` of another run.
    """
    if method not in (None, *get_args(Method)):
        raise InputError.unknown("method", str(method), get_args(Method))
    if tokens < 2:
        raise InputError(f"{tokens} tokens are too few to measure on; give two or more")
    check_device(device)
    asked, destination = [load_recipe(recipe) for recipe in recipes], Path(output)
    inputs = [path for recipe in recipes for path in recipe_files(recipe)]
    inputs += [Path(item) for item in text if not isinstance(item, Text)]
    if isinstance(model, str | Path):
        inputs.append(locate(model).require("checkpoint", verb="sensitivity"))
    check_free(destination, force=force, as_file=True, inputs=inputs)
    check_outside(destination)
    snapshot = destination.with_name(f"{destination.name}.measuring")
    check_free(snapshot, force=True, as_file=True, inputs=inputs)
    weights = open_weights(model, verb="sensitivity")
    if weights.origin.recipe is not None:
        raise InputError(f"{weights.origin.path} is quantized; give the full-precision model that it was made from")
    found = losses_of(
        weights,
        asked,
        CalibrationText.of(weights, text),
        targets=["torch"],
        tokens=tokens,
        method=method,
        experts=experts,
        device=device,
        snapshot=snapshot,
        said=said,
        progress=progress,
    )
    with new_file(destination, force=force) as partial:
        partial.write_bytes(json_bytes(found.to_json()))
    snapshot.unlink(missing_ok=True)
    return found


def read_sensitivities(given: str | Path | Sensitivities | None, weights: Weights) -> Sensitivities | None:
    """Sensitivities as they were given. Raises `InputError`: not readable, or of another model."""
    if isinstance(given, str | Path):
        given = Sensitivities.read(Path(given))
    if given is not None:
        given.check(weights)
    return given


def losses_of(
    weights: Weights,
    recipes: Sequence[Recipe],
    text: CalibrationText,
    *,
    targets: Sequence[str] | None = None,
    tokens: int = LOOKED_AT,
    method: Method | None = None,
    most_work: float = WORK_OF_THE_VERB,
    experts: bool = False,
    device: str = "cpu",
    snapshot: Path | None = None,
    said: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Sensitivities:
    """Measure or estimate every group in every format that one of these recipes leaves open.

    Args:
        weights: the full-precision model.
        recipes: say which formats a group may get. Measured is what `nearest-mse` makes of it.
        text: where windows are taken from, spread evenly.
        targets: which must hold the formats; None: the recipes' own.
        tokens: how many tokens each group is measured on.
        method: None: measured, unless that is more than `most_work`: changes · tokens · parameters.
        experts: also each expert's tensors of a group alone.
        device: "cpu" or "cuda".
        snapshot: file in which what is measured is kept, and gone on from. It stays at the end.
        said: called with one line about what will take how long, where there is a snapshot; `quantize` tells it itself.
        progress: called after each group and format.

    Raises:
        InputError: a text of fewer than two tokens; recipes that leave nothing open; a file of another run.
    """
    groups: dict[Group, OpenGroup] = {}
    for recipe in recipes:
        for group in open_groups(weights, recipe, tuple(targets or recipe.targets)):
            known = groups.get(group.group, group)
            sizes = known.bytes | group.bytes
            groups[group.group] = replace(known, bytes=dict(sorted(sizes.items(), key=lambda item: item[1])))
    if not groups:
        raise InputError(f"{recipes[0].where} names every format, so there is nothing to measure; add choose")
    alone = [own for group in groups.values() for own in _by_expert(weights, group)] if experts else []
    return _losses(
        weights,
        [*groups.values(), *alone],
        text,
        tokens=tokens,
        method=method,
        most_work=most_work,
        device=device,
        snapshot=snapshot,
        say=said or (lambda line: None),
        progress=progress,
    )


def _losses(
    weights: Weights,
    groups: Sequence[OpenGroup],
    text: CalibrationText,
    *,
    tokens: int,
    method: Method | None,
    most_work: float,
    device: str,
    snapshot: Path | None,
    say: Callable[[str], None],
    progress: Progress | None,
) -> Sensitivities:
    if len(text) < 2:
        raise InputError(f"{text.name} has {len(text)} token; sensitivities need two or more, so give a longer text")
    jobs = [(group, storage) for group in groups for storage in group.bytes if storage != STORED]
    looked_at, windows = windows_of(text, tokens)
    chosen: Method = method or ("estimated" if is_estimated(weights, len(jobs), looked_at, most_work) else "measured")
    run = _Measuring(
        snapshot,
        _identity(weights, jobs, text, looked_at, chosen, device),
        jobs=len(jobs),
        windows=len(windows),
    )
    if snapshot is not None:  # within `quantize` all that it does was told, and room checked for it
        if run.windows or run.losses:
            say(f"going on from {snapshot}")
        estimated = chosen == "estimated"
        left = jobs if estimated else [job for job in jobs if _key(*job) not in run.losses]
        counts = [(group.group.count, storage) for group, storage in left]
        of_gradients = windows[run.windows :] if estimated else None
        pace = Pace(weights, device=device)
        seconds = choosing(pace, counts, looked_at.numel(), windows=of_gradients, levels=LEVELS)
        doing = "estimating from gradients" if estimated else "measuring"
        memory = choosing_bytes(weights, counts, looked_at.numel(), windows=of_gradients)
        effort = Effort({f"{doing} {len(left)} changes of {len(groups)} groups": seconds}, _DISK_BYTES, memory)
        check_space(snapshot, disk_bytes=effort.disk_bytes, memory_bytes=effort.memory_bytes)
        say(effort.said())
    meter = Meter(weights, looked_at, device=device)
    table: dict[tuple[str, str], Loss] = {}

    def changes(group: OpenGroup, storage: str) -> dict[TensorSpec, Tensor]:
        return {spec: rounded(weights, spec, storage) for spec in group.group.specs}

    if chosen == "measured":
        for done, (group, storage) in enumerate(jobs, 1):
            table[group.group.name, storage] = _measured(meter, group, storage, changes, run)
            if progress is not None:
                progress(f"{group.group.name} {storage}", done, len(jobs))
    else:
        table = _estimated(meter, jobs, windows, changes, run, progress)
    found = []
    for group in groups:
        own = [
            table.get((group.group.name, storage), Loss(storage, size, 0.0)) for storage, size in group.bytes.items()
        ]
        named = group.group
        found.append(
            GroupLosses(named.name, named.role, named.layer, group.expert, named.count, named.tensors, tuple(own))
        )
    whole = [(group, losses.losses) for group, losses in zip(groups, found, strict=True) if group.expert is None]
    levels = []
    for choice in _levels([[Option(loss.storage, loss.bytes, loss.kl) for loss in losses] for _, losses in whole]):
        picked = [(group, losses[pick].storage) for (group, losses), pick in zip(whole, choice.picks, strict=True)]
        together = meter.kl({spec: values for job in picked for spec, values in changes(*job).items()})
        levels.append(Level(choice.loss, float(together.mean())))
    return Sensitivities(
        method=chosen,
        model=dict(weights.origin.files),
        text=text.name,
        text_sha256=text.sha256,
        tokens=meter.windows.numel(),
        levels=tuple(level for level in levels if level.sum > 0 and level.kl > 0),
        groups=tuple(found),
    )


def is_estimated(weights: Weights, jobs: int, windows: Tensor, most_work: float) -> bool:
    """Whether measuring so many changes on these windows is too much work.

    By what is to be computed and not by a clock: the same input chooses the same formats on every machine.
    """
    return jobs * windows.numel() * weights.origin.parameters > most_work


def windows_of(text: CalibrationText, tokens: int) -> tuple[Tensor, Tensor]:
    """(windows that a change is measured on, those of the passes for gradients): int64 [W, T]."""
    measured = text.windows(max(1, tokens // WINDOW), WINDOW)
    return measured, text.windows(max(1, 2 * measured.numel() // _SHORT), _SHORT)


def _by_expert(weights: Weights, group: OpenGroup) -> list[OpenGroup]:
    """The tensors of each expert of a group, each expert a group of its own."""
    members: dict[int, list[TensorSpec]] = {}
    for spec in group.group.specs:
        if spec.expert is not None:
            members.setdefault(spec.expert, []).append(spec)
    found = []
    for expert, specs in members.items():
        own = Group(f"{group.group.name} expert {expert}", tuple(specs))
        sizes = {storage: sum(stored_bytes(weights, spec, storage) for spec in specs) for storage in group.bytes}
        found.append(OpenGroup(own, group.rule, sizes, expert))
    return found


def _levels(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """The choices of the frontier whose losses are a `_APART`th of one another, from every smallest format on."""
    choices = frontier(groups)
    found = [choices[0]]
    for choice in choices:
        if 0 < choice.loss <= found[-1].loss / _APART and len(found) < LEVELS:
            found.append(choice)
    return found


Changes = Callable[[OpenGroup, str], dict[TensorSpec, Tensor]]
"""(group, storage) → the values of its tensors in it."""


@dataclass(frozen=True)
class _Snapshot:
    """A run as it is stored.

    Attributes:
        run: what it is of (`_identity`).
        losses: what is measured, by group and format.
        windows: whose gradients are taken.
        squares: Σ (g · δ)² over them, of each change; empty before the first.
    """

    __pydantic_config__ = _STRICT

    run: str
    losses: Mapping[str, Loss]
    windows: int
    squares: tuple[float, ...]


class _Measuring:
    """What is measured, and the file from which a run that was killed goes on.

    Args:
        path: the file; None: nothing is kept.
        identity: what must be equal for a run to be gone on with.
        jobs: how many changes it has.
        windows: how many windows of backward passes.

    Raises:
        InputError: a file that is none of ours, or of another run.
    """

    def __init__(self, path: Path | None, identity: str, *, jobs: int, windows: int) -> None:
        self._path, self._identity = path, identity
        self.losses: dict[str, Loss] = {}
        self.windows, self.squares = 0, tuple[float, ...]()
        if path is None or not path.exists():
            return
        advice = "remove it to start again"
        values = read_json(path, largest=LARGEST, advice=advice)
        found = validated(
            values, _Snapshot, where=str(path), noun="a run of sensitivity", advice=f"{advice.capitalize()}."
        )
        if found.run != identity:
            raise InputError(f"{path} belongs to another model, text, release or options; {advice}")
        if not 0 <= found.windows <= windows or len(found.squares) != (jobs if found.windows else 0):
            raise InputError(f"{path} is damaged; {advice}")
        self.losses, self.windows, self.squares = dict(found.losses), found.windows, found.squares

    def save(self) -> None:
        """Write it, aside and renamed."""
        if self._path is not None:
            snapshot = _Snapshot(self._identity, self.losses, self.windows, self.squares)
            with new_file(self._path, force=True) as partial:
                partial.write_bytes(json_bytes(asdict(snapshot)))


def _identity(
    weights: Weights,
    jobs: Sequence[tuple[OpenGroup, str]],
    text: CalibrationText,
    windows: Tensor,
    method: Method,
    device: str,
) -> str:
    """SHA-256 of all that decides what is measured."""
    changes = [(group.group.name, storage) for group, storage in jobs]
    run = [release(), dict(weights.origin.files), changes, windows.tolist(), method, device, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(run).encode() + text.tokens.astype(np.int64).tobytes()).hexdigest()


def _key(group: OpenGroup, storage: str) -> str:
    return f"{group.group.name} {storage}"


def _measured(meter: Meter, group: OpenGroup, storage: str, changes: Changes, run: _Measuring) -> Loss:
    name = _key(group, storage)
    if name not in run.losses:
        losses = meter.kl(changes(group, storage))
        run.losses[name] = Loss(storage, group.bytes[storage], max(0.0, float(losses.mean())), interval(losses))
        run.save()
    return run.losses[name]


def _estimated(
    meter: Meter,
    jobs: Sequence[tuple[OpenGroup, str]],
    windows: Tensor,
    changes: Changes,
    run: _Measuring,
    progress: Progress | None,
) -> dict[tuple[str, str], Loss]:
    model = meter.model
    # bf16 is enough for a change of which the second digit matters, and every format of every tensor is held.
    deltas = [
        [
            (spec, (values.to(meter.windows.device) - model.parameter_of(spec)).bfloat16())
            for spec, values in changes(group, storage).items()
        ]
        for group, storage in jobs
    ]
    squares = np.array(run.squares) if run.windows else np.zeros(len(jobs))
    for number, window in enumerate(windows[run.windows :], run.windows + 1):
        gradients = _score(model, window[None].to(meter.windows.device), number)
        for job, of in enumerate(deltas):
            squares[job] += sum(_inner(gradients[spec.name], delta) for spec, delta in of) ** 2
        if number % _EVERY == 0:
            run.windows, run.squares = number, tuple(squares.tolist())
            run.save()
        if progress is not None:
            progress("gradients", number, len(windows))
    fisher = squares / len(windows) / windows.shape[1] / 2
    routed = np.array([_routers_after(model, group) for group, _ in jobs]) * np.sqrt(fisher)
    # Of the larger two thirds: what loses least is decided by a token or two, and by nothing in a sum.
    order = np.argsort(fisher)
    places = np.unique(np.linspace(len(jobs) // 3, len(jobs) - 1, SCALED).round().astype(int))
    tried = [(int(job), *jobs[job]) for job in order[places]]
    pairs = [(job, _measured(meter, group, storage, changes, run).kl) for job, group, storage in tried]
    known = np.array([job for job, kl in pairs if kl > 0 and fisher[job] > 0], np.int64)
    measured = np.array([kl for job, kl in pairs if kl > 0 and fisher[job] > 0])
    values = fisher
    if len(known):
        squared, linear = fisher[known], routed[known]

        def apart(logs: NDArray[np.float64]) -> NDArray[np.float64]:
            found: NDArray[np.float64] = np.log(np.exp(logs[0]) * squared + np.exp(logs[1]) * linear) - np.log(measured)
            return found

        # Logarithms, and no weight to an outlier: losses lie decades apart.
        a, k = np.exp(least_squares(apart, _FIRST, loss="soft_l1", f_scale=0.3).x)
        values = a * fisher + k * routed
    return {
        (group.group.name, storage): Loss(storage, group.bytes[storage], float(kl))
        for (group, storage), kl in zip(jobs, values, strict=True)
    }


def _inner(gradient: Tensor, delta: Tensor) -> float:
    """Σ g · δ, in pieces that stay near the core."""
    pieces = zip(torch.split(gradient.flatten(), _PIECE), torch.split(delta.flatten(), _PIECE), strict=True)
    return sum(float(torch.dot(g, d.float())) for g, d in pieces)


def _routers_after(model: MossNet, group: OpenGroup) -> float:
    """The share of the model's routers that a change of this group reaches: those of later blocks."""
    specs = [block.own_specs(model.config, block.layer) for block in model.blocks]
    routers = [any(Use.ROUTER in spec.use for spec in own) for own in specs]
    first = next((i for i, block in enumerate(model.blocks) if block.holds(group.group.specs[0])), -1)
    if group.group.layer is None and Use.TABLE not in group.group.specs[0].use:
        return 0.0
    return sum(routers[first + 1 :]) / max(1, sum(routers))


def _score(model: MossNet, window: Tensor, number: int) -> dict[str, Tensor]:
    """∇_W Σ_t log p(y_t) on one window [1, T], y_t drawn from the model: tensor's name → its gradient."""
    leaves: dict[str, Tensor] = {}

    def weight(name: str, value: Tensor) -> Tensor:
        if name not in leaves:
            leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    on_cpu = window.device.type == "cpu"
    scan: ScanForm = "kernel" if on_cpu else "chunked"
    run = Forward(scan=scan, dense_ssm=True, conv=causal_conv if on_cpu else None, weight=weight)
    logits, _ = model(window, run=run)
    log_p = torch.log_softmax(logits[0], -1)
    generator = torch.Generator(window.device).manual_seed(number)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))
