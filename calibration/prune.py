# SPDX-License-Identifier: Apache-2.0
"""`prune`: remove experts, those of the SSM and of the MLP, by what is lost without them.

Experts are chosen in one order over all layers (`mossquant.calibration.removal`), or named. Without an expert the
router decides among the others by its own rule; nothing that comes before the first layer that is changed is computed
again. What went before is distilled back if asked (`mossquant.calibration.recover`), with the whole model as the
teacher and its routers' logits among the experts that are left.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mossquant.calibration.effort import LIBRARIES, REACHED, Effort, Pace, distilling, judging
from mossquant.calibration.meter import WINDOW, Meter, interval, metering_bytes
from mossquant.calibration.options import dtypes_of
from mossquant.calibration.quantize import JUDGED_TOKENS
from mossquant.calibration.recover import SNAPSHOT, check_snapshot, recovery_bytes
from mossquant.calibration.recover import recover as recover_lost
from mossquant.calibration.removal import By, Trials, all_but, counts_of, order_of, room_of
from mossquant.calibration.saliency import Expert, Saliencies, saliencies
from mossquant.calibration.student import Planned
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.checkpoint import load_model, write_checkpoint
from mossquant.checkpoint.locate import locate
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.pruned import Keep, Pruned
from mossquant.checkpoint.weights import Weights
from mossquant.device import check_device
from mossquant.errors import InputError
from mossquant.files.outputs import check_apart, check_free, check_outside, new_folder
from mossquant.files.space import check_space
from mossquant.formats.dtypes import FLOAT_DTYPES
from mossquant.model.mossnet import experts_of, parameter_count
from mossquant.model.tensors import Experts
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import Recipe
from mossquant.progress import Progress
from mossquant.release import release
from mossquant.text.text import Text

Kind = Literal["ssm", "mlp", "both"]

LOOKED_AT = 8192
"""Tokens on which experts are looked at, if not given."""
_TRAINING = "training.json"
_AGAIN = 4
"""How often an expert that goes is measured again, greedily, about."""

_STORED = """\
version: 1
name: pruned
targets: [torch]
weights:
  - {role: "*", keep: stored, why: "experts are removed and nothing is quantized"}
activations:
  - {role: "*", format: fp32}
state:
  - {role: "*", format: fp32}
"""


@dataclass(frozen=True)
class Removed:
    """One expert that is gone.

    Attributes:
        layer: its layer.
        kind: of its block.
        expert: its number in the whole model.
        frequency: share of the choices of its layer.
        reap: gate times the norm of what it gives, mean over the tokens that chose it.
        change: of the direction of the residual stream without it.
        alone: KL without it alone, nats a token.
        alone_ci95: its 95 % interval.
    """

    layer: int
    kind: str
    expert: int
    frequency: float
    reap: float
    change: float
    alone: float
    alone_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Pruning:
    """What was removed, and what is lost.

    Attributes:
        model: path of the whole model.
        by: how experts were chosen; None: they were named.
        text: name of the text.
        text_sha256: of each of its files.
        tokens: on which experts were looked at.
        keep: experts that are left, as `--keep` takes them.
        removed: those that are gone, in the order in which they were chosen.
        experts: of each kind, experts before and after.
        parameters: of the whole model and of what is left.
        judged_tokens: on which the following was measured.
        kl: without what is gone, before recovery, nats a token.
        kl_ci95: its 95 % interval.
        recovered_tokens: that were distilled over.
        recovered_kl: KL of what is stored; None where nothing was recovered.
        recovered_ci95: its interval.
    """

    model: str
    by: str | None
    text: str
    text_sha256: tuple[str, ...]
    tokens: int
    keep: Mapping[str, list[list[int]]]
    removed: tuple[Removed, ...]
    experts: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    judged_tokens: int
    kl: float
    kl_ci95: tuple[float, float] | None
    recovered_tokens: int
    recovered_kl: float | None
    recovered_ci95: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """What is written."""
        return asdict(self)


def prune(
    model: str | Path | Weights,
    output: str | Path,
    *,
    experts: float | None = None,
    keep: str | Path | Keep | None = None,
    kind: Kind | None = None,
    by: By | None = None,
    text: Sequence[str | Path | Text] = (),
    tokens: int = LOOKED_AT,
    recover: int = 0,
    seed: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
    said: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Write a full-precision model without some of its experts: an ordinary checkpoint.

    What is measured is kept in `OUTPUT.pruning.json`, recovery in `OUTPUT.recovering.safetensors`; the same call again
    goes on from there, with the same bytes in the end where the number of threads is the same.

    Args:
        model: a full-precision checkpoint folder, or the name "tiny"; or weights of which every tensor is kept.
        output: folder to write; nothing may be there, unless `force`.
        experts: share of the experts to remove, of each kind that is asked for; more than 0, less than 1.
        keep: in its place: which experts are left, or a JSON file that says so (`Keep.read`).
        kind: which experts may go: "ssm", "mlp" or "both"; "ssm" if not given.
        by: how they are chosen, see `mossquant.calibration.removal`; "greedy" if not given.
        text: files or texts; none: the bundled calibration text, for models with the bundled tokenizer. Its end is what
            the result is judged on; nothing is learned from it.
        tokens: on which experts are looked at, in whole windows of 256.
        recover: tokens of the text to distil over afterwards.
        seed: of the random order, 0 if not given.
        device: where the model is run.
        force: replace what is at `output`.
        said: called with one line about what will take how long, and about what was found.
        progress: called with what is worked on, done and in all.

    Raises:
        InputError: a bad checkpoint or text, or a quantized checkpoint; neither or both of `experts` and `keep`; a way
            of choosing where experts are named, or a seed where nothing is drawn; a share that removes nothing or
            leaves a layer with fewer experts than a token chooses; a model without routers of that kind; an output that
            cannot be written; work files of another run: before any work.
    """
    say, report = said or (lambda line: None), progress or (lambda name, done, total: None)
    request = _request(
        model,
        Path(output),
        experts=experts,
        keep=keep,
        kind=kind,
        by=by,
        text=text,
        tokens=tokens,
        recover=recover,
        seed=seed,
        device=device,
        force=force,
    )
    weights, windows, trials = request.weights, request.windows, request.trials
    effort = _effort(request)
    check_space(request.destination, disk_bytes=effort.disk_bytes, memory_bytes=effort.memory_bytes)
    say(effort.said())
    known = {one.expert: one for one in saliencies(weights, windows, device=device, progress=progress)}
    trials.measure_with(Meter(weights, windows, device=device))
    if request.named is None:
        candidates = [known[expert] for expert in request.candidates]
        order = order_of(
            request.by or "greedy", candidates, request.counts, room_of(weights), trials, seed or 0, report
        )
    else:
        gone = request.named.gone(weights.config)
        order = [expert for expert, one in known.items() if expert.number in gone.get(one.routing, ())]
    removed = tuple(_removed(known[expert], trials) for expert in order)
    trials.measure_with(None)  # its memory is needed now
    keep = request.named or all_but(weights, order)
    judged = request.judged.windows(max(1, len(request.judged) // WINDOW), WINDOW)
    judge = Meter(weights, judged, device=device, from_start=True)
    kl = judge.kl(gone=keep.gone(weights.config))
    say(f"KL without them {kl.mean():.2e} nats a token")
    stored, recovered = _distilled(request, Pruned(weights, keep), judge, keep, float(kl.mean()), say, progress)
    found = Pruning(
        model=weights.origin.path,
        by=request.by,
        text=request.learned.name,
        text_sha256=request.learned.sha256,
        tokens=windows.numel(),
        keep=keep.to_json(weights.config),
        removed=removed,
        experts={of: (before, after) for of, before, after in _totals(weights, keep)},
        parameters=(weights.origin.parameters, parameter_count(stored.config)),
        judged_tokens=judge.windows.numel(),
        kl=float(kl.mean()),
        kl_ci95=interval(kl),
        recovered_tokens=0 if recovered is None else recover,
        recovered_kl=None if recovered is None else float(recovered.mean()),
        recovered_ci95=None if recovered is None else interval(recovered),
    )
    with new_folder(request.destination, force=force) as partial:
        _write(partial, weights, stored, found)
    for file in request.work_files:
        file.unlink(missing_ok=True)
    return found


@dataclass(frozen=True)
class _Request:
    """What is asked, of which model.

    Attributes:
        weights: the whole model.
        destination: folder to write.
        named: which experts are to stay; None: they are chosen.
        by: how; None where they are named.
        candidates: experts that may go.
        counts: kind → how many of them are to go.
        learned: text that is looked at and learned from.
        judged: text that what is left is judged on.
        windows: on which experts are looked at [W, T].
        trials: what was measured.
        tokens: to distil over.
        device: where the model is run.
        work_files: what was measured, and recovery's snapshot; removed at the end.
    """

    weights: Weights
    destination: Path
    named: Keep | None
    by: By | None
    candidates: Sequence[Expert]
    counts: Mapping[str, int]
    learned: CalibrationText
    judged: CalibrationText
    windows: Tensor
    trials: Trials
    tokens: int
    device: str
    work_files: tuple[Path, Path]

    @property
    def snapshot(self) -> Path:
        """Where recovery is kept."""
        return self.work_files[1]


def _request(
    model: str | Path | Weights,
    destination: Path,
    *,
    experts: float | None,
    keep: str | Path | Keep | None,
    kind: Kind | None,
    by: By | None,
    text: Sequence[str | Path | Text],
    tokens: int,
    recover: int,
    seed: int | None,
    device: str,
    force: bool,
) -> _Request:
    """What is asked, opened and checked. Raises `InputError` as `prune`."""
    inputs = [Path(item) for item in text if not isinstance(item, Text)]
    inputs += [Path(keep)] if isinstance(keep, str | Path) else []
    if isinstance(model, str | Path):
        inputs.append(locate(model).require("checkpoint", verb="prune"))
    check_free(destination, force=force, inputs=inputs)
    check_outside(destination)
    check_device(device)
    measured = destination.with_name(f"{destination.name}.pruning.json")
    snapshot = destination.with_name(f"{destination.name}.recovering.safetensors")
    for file in (measured, snapshot):
        check_apart(file, inputs)
        check_free(file, force=True, as_file=True, inputs=inputs)
    _check(experts, keep, kind, by, tokens, recover, seed)
    weights = open_weights(model, verb="prune")
    if weights.origin.recipe is not None:
        raise InputError(f"{weights.origin.path} is quantized; prune the full-precision model that it was made from")
    named = Keep.read(Path(keep)) if isinstance(keep, str | Path) else keep
    candidates: list[Expert] = []
    if named is None:
        assert experts is not None
        candidates = _candidates(weights, kind or "ssm")
        counts = counts_of(candidates, experts, room_of(weights), weights.origin.path)
    else:
        named.check(weights.config)
        counts = {of: before - after for of, before, after in _totals(weights, named)}
        if not any(counts.values()):
            raise InputError(f"every expert of {weights.origin.path} is kept, so there is nothing to prune")
    check_snapshot(snapshot)
    learned, judged = CalibrationText.of(weights, text).split(JUDGED_TOKENS)
    windows = learned.windows(max(1, tokens // WINDOW), WINDOW)
    return _Request(
        weights=weights,
        destination=destination,
        named=named,
        by=(by or "greedy") if named is None else None,
        candidates=candidates,
        counts=counts,
        learned=learned,
        judged=judged,
        windows=windows,
        trials=Trials(measured, _identity(weights, windows, device)),
        tokens=recover,
        device=device,
        work_files=(measured, snapshot),
    )


def _distilled(
    request: _Request,
    left: Pruned,
    judge: Meter,
    keep: Keep,
    lost: float,
    say: Callable[[str], None],
    progress: Progress | None,
) -> tuple[Weights, NDArray[np.float64] | None]:
    """What is stored, and its KL on each window of the judge; what is left as it is where that is not lower than before
    (`lost`), or nothing is asked.
    """
    if not request.tokens:
        return left, None
    whole, learned = judge.model.config, request.learned
    numbers = {experts.routing: keep.of(experts) for experts in experts_of(whole) if experts.routing is not None}
    plan = make_plan(left.config, dtypes_of(left), Recipe.parse(_STORED, where="the recipe of pruning"))
    say(f"distilling over {learned.said(request.tokens)}")
    say(f"a run that is stopped goes on from {request.snapshot}")
    made = recover_lost(
        left,
        plan,
        {},
        learned,
        tokens=request.tokens,
        device=request.device,
        model=judge.model,
        left=numbers,
        snapshot=request.snapshot,
        progress=progress,
    )
    stored = Planned(left, plan, made)
    kl = judge.kl_of(load_model(stored).to(request.device))
    if not kl.mean() < lost:
        say(f"distilling raised KL from {lost:.2e} to {kl.mean():.2e}; it is left out")
        return left, None
    say(f"KL after recovery {kl.mean():.2e} nats a token")
    return stored, kl


def _write(folder: Path, whole: Weights, stored: Weights, found: Pruning) -> None:
    """The checkpoint, with what lies beside the whole model's."""
    write_checkpoint(
        folder,
        stored.config,
        lambda spec: stored.kept(spec.name),
        dtype=FLOAT_DTYPES[whole.origin.torch_dtype],
        mixed=dtypes_of(stored),
        training=_training(whole, found),
    )
    for path in whole.origin.beside:
        if path.name != _TRAINING:
            copyfile(path, folder / path.name)


def _check(
    experts: float | None,
    keep: str | Path | Keep | None,
    kind: str | None,
    by: str | None,
    tokens: int,
    recover: int,
    seed: int | None,
) -> None:
    if experts is None and keep is None:
        raise InputError("say what is to go with --experts 25%, or what is to stay with --keep FILE.json")
    if experts is not None and keep is not None:
        raise InputError("--keep names the experts that stay, so --experts chooses nothing; leave one of them out")
    if keep is not None and (kind is not None or by is not None):
        raise InputError("--keep names the experts that stay, so --kind and --by choose nothing; leave them out")
    if seed is not None and by != "random":
        raise InputError("--seed is of --by random, and nothing else is drawn; leave it out")
    if experts is not None and not 0 < experts < 1:
        raise InputError(f"{experts:.0%} of the experts cannot be removed; give more than 0 % and less than 100 %")
    for given, known, what in ((kind, Kind, "kind of experts"), (by, By, "saliency")):
        if given is not None and given not in get_args(known):
            raise InputError.unknown(what, given, get_args(known))
    if tokens < 2 or recover < 0:
        raise InputError("look at 2 tokens or more, and recover over none or more")


def _blocks(weights: Weights, kind: Kind) -> list[Experts]:
    """The experts behind a router, of the kinds that are asked for."""
    asked = ("ssm", "mlp") if kind == "both" else (kind,)
    return [of for of in experts_of(weights.config) if of.routing is not None and of.kind in asked]


def _candidates(weights: Weights, kind: Kind) -> list[Expert]:
    """The experts that may go. Raises `InputError`: there are none."""
    found = [Expert(of.layer, of.kind, number) for of in _blocks(weights, kind) for number in range(of.count)]
    if not found:
        raise InputError(f"{weights.origin.path} has no router of {kind} experts, so there is none to remove")
    return found


def _identity(weights: Weights, windows: Tensor, device: str) -> str:
    """SHA-256 of all that decides what is measured."""
    run = [release(), dict(weights.origin.files), windows.tolist(), device, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()


def _removed(one: Saliencies, trials: Trials) -> Removed:
    alone = trials.without([one.expert], {one.expert: one.routing})
    return Removed(
        layer=one.expert.layer,
        kind=one.expert.kind,
        expert=one.expert.number,
        frequency=one.frequency,
        reap=one.reap,
        change=one.change,
        alone=alone.kl,
        alone_ci95=alone.ci95,
    )


def _totals(weights: Weights, keep: Keep) -> list[tuple[str, int, int]]:
    """Kind, experts before, experts after."""
    totals: dict[str, tuple[int, int]] = {}
    for of in experts_of(weights.config):
        before, after = totals.get(of.kind, (0, 0))
        totals[of.kind] = before + of.count, after + len(keep.of(of))
    return [(kind, *of) for kind, of in totals.items()]


def _training(weights: Weights, found: Pruning) -> dict[str, Any]:
    """The whole model's record of training, with the text that was read here, and what was done."""
    file = next((path for path in weights.origin.beside if path.name == _TRAINING), None)
    record: dict[str, Any] = {"version": 1} if file is None else json.loads(file.read_bytes())
    read = [{"name": found.text, "sha256": digest} for digest in found.text_sha256]
    pruned = {
        "from": dict(weights.origin.files),
        "keep": dict(found.keep),
        "by": found.by,
        "recovered_tokens": found.recovered_tokens,
    }
    return record | {"text": [*record.get("text", []), *read], "pruned": pruned}


def _effort(request: _Request) -> Effort:
    """What is to come."""
    weights, going, device = request.weights, sum(request.counts.values()), request.device
    pace, tokens, parameters = Pace(weights, device=device), request.windows.numel(), weights.origin.parameters
    measured = len(request.candidates) if request.by in ("leave-one-out", "greedy") else going
    measured += _AGAIN * going if request.by == "greedy" else 0
    alone = tokens * (REACHED * pace.blocks + 2 * pace.head + pace.compared)
    blocks = experts_of(weights.config)
    routed = sum(of.count for of in blocks if of.routing is not None)
    parts = {
        "looking at experts": tokens * pace.blocks * (1 + routed / len(blocks)),
        f"measuring {measured} times": tokens * pace.blocks + measured * alone,
        "judging": judging(pace, len(request.judged), 2 if request.tokens else 1),
    }
    if request.tokens:
        parts["distilling"] = distilling(pace, request.tokens)
    copied = sum(path.stat().st_size for path in weights.origin.beside)
    disk = weights.origin.file_bytes + copied + (SNAPSHOT * parameters if request.tokens else 0)
    looking = metering_bytes(weights, tokens)
    held = LIBRARIES + 4 * parameters + max(looking, metering_bytes(weights, len(request.judged), from_start=True))
    # Recovery holds the learner's shape beside the teacher, and what was learned is loaded once more.
    return Effort(parts, disk, held + (recovery_bytes(weights) + 8 * parameters if request.tokens else 0))
