# SPDX-License-Identifier: Apache-2.0
"""What compression cost: candidates against the original, in lockstep on the same held-out tokens.

    perplexity increase = 100 · (exp(mean nll_c − mean nll_o) − 1) %        KL(original ‖ candidate), nats a token

Intervals are 95 % paired bootstraps over windows of the text (`mossquant.eval.windows`). The original is the stored
weights computed in fp32. Decide by KL: over some ten thousand tokens perplexity is too noisy to rank small losses.
Asked for, PyTorch models are run again to see what their routers do (`mossquant.eval.routing`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from mossquant.checkpoint.locate import Located, locate
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.machine import shared_out
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.routing import RoutingShift, check_routers, compare_routing
from mossquant.eval.scores import Scores, score
from mossquant.eval.windows import RESAMPLES, WINDOW, Interval, Windows
from mossquant.progress import Progress
from mossquant.runner import Runner, RunnerInfo
from mossquant.targets.torch.runner import TorchRunner
from mossquant.text.text import Text


@dataclass(frozen=True)
class Baseline:
    """The original: PATH, kind, stored type of its weights, perplexity, and bytes of its weights."""

    path: str
    kind: str
    weights: str
    perplexity: float
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Candidate:
    """One candidate against the original.

    Attributes:
        path: as given.
        kind: "checkpoint", "quantized checkpoint", or the target of a program.
        weights: recipe name or stored type.
        activations: activation format that it ran with.
        perplexity: on the same tokens.
        ppl_increase_pct: over the original's, in per cent.
        ppl_increase_ci95: its interval; None where the text is shorter than two windows (so with the others).
        kl_mean: mean KL(original ‖ candidate), nats a token.
        kl_ci95: its interval.
        kl_median: median over tokens.
        top1_agreement: share of tokens at which both find the same token most likely.
        bytes: stored for the weights (codes, scales, padding, unquantized tensors).
        file_bytes: on disk, of the tensor files or the program.
        bits_per_weight: 8 · bytes ÷ parameters of the full-precision model.
        gate_failed: the perplexity increase is above the gate.
    """

    path: str
    kind: str
    weights: str
    activations: str
    perplexity: float
    ppl_increase_pct: float
    ppl_increase_ci95: Interval | None
    kl_mean: float
    kl_ci95: Interval | None
    kl_median: float
    top1_agreement: float
    bytes: int
    file_bytes: int
    bits_per_weight: float
    gate_failed: bool


@dataclass(frozen=True)
class ComparisonReport:
    """What `compare` found; `gate_failed` decides the command's exit status.

    Attributes:
        text: name of the text.
        text_sha256: of the whole text.
        tokens: predicted tokens.
        streams: independent streams.
        seen_by: models that were trained or calibrated on this text.
        special: whether special tokens that the text spells were taken for tokens.
        document_separator: what stood between its documents, None where they were not told apart.
        notes: what the user should know, a sentence each.
        baseline: the original.
        candidates: in the order given.
        max_ppl_increase_pct: the gate, None without one.
        routing: of each candidate against the original's; None where it was not asked for.
        scores: nats a token, of the original and then of each candidate (not in the JSON; none where that was read).
    """

    text: str
    text_sha256: str
    tokens: int
    streams: int
    seen_by: tuple[str, ...]
    special: bool
    document_separator: str | None
    notes: tuple[str, ...]
    baseline: Baseline
    candidates: tuple[Candidate, ...]
    max_ppl_increase_pct: float | None
    routing: tuple[RoutingShift, ...] | None = None
    scores: tuple[Scores, ...] = field(default=(), repr=False)

    @property
    def gate_failed(self) -> bool:
        """Whether a candidate's perplexity rose by more than the gate allows."""
        return any(candidate.gate_failed for candidate in self.candidates)

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        gate = {"max_ppl_increase_pct": self.max_ppl_increase_pct, "failed": self.gate_failed}
        counts = {
            "tokens": self.tokens,
            "streams": self.streams,
            "seen_by": list(self.seen_by),
            "special": self.special,
            "document_separator": self.document_separator,
            "notes": list(self.notes),
        }
        return {
            "version": 1,
            "text": {"name": self.text, "sha256": self.text_sha256, **counts},
            "baseline": asdict(self.baseline),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "interval": {"level": 0.95, "method": "paired bootstrap", "window_tokens": WINDOW, "resamples": RESAMPLES},
            "gate": None if self.max_ppl_increase_pct is None else gate,
            "routing": None if self.routing is None else [asdict(shift) for shift in self.routing],
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "ComparisonReport":
        """A report that `to_json` wrote. Raises `LookupError`, `TypeError` or `ValueError` for anything else."""
        text, gate, routing = stored["text"], stored["gate"], stored.get("routing")
        return cls(
            text=text["name"],
            text_sha256=text["sha256"],
            tokens=text["tokens"],
            streams=text["streams"],
            seen_by=tuple(text["seen_by"]),
            special=text["special"],
            document_separator=text["document_separator"],
            notes=tuple(text["notes"]),
            baseline=TypeAdapter(Baseline).validate_python(stored["baseline"]),
            candidates=TypeAdapter(tuple[Candidate, ...]).validate_python(stored["candidates"]),
            max_ppl_increase_pct=None if gate is None else gate["max_ppl_increase_pct"],
            routing=None if routing is None else TypeAdapter(tuple[RoutingShift, ...]).validate_python(routing),
        )


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a − b over the same tokens, with its interval; `decided` where the interval leaves out zero."""

    mean: float
    interval: Interval | None

    @property
    def decided(self) -> bool:
        """Whether the two differ beyond what the choice of text explains."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def paired_difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> PairedDifference:
    """Compare two candidates by a quantity a token, e.g. their KL to the original: a, b [S, T] on the same tokens."""
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"values of shapes {a.shape} and {b.shape} cannot be paired; measure both on the same streams")
    difference = a - b
    return PairedDifference(float(difference.mean()), Windows(*difference.shape).interval(difference))


def compare(
    base: str | Path | Weights,
    candidates: Sequence[str | Path | Weights],
    *,
    text: str | Path | Text | None = None,
    tokens: int | None = None,
    streams: int = 1,
    max_ppl_increase: float | None = None,
    activations: str | None = None,
    threads: int | None = None,
    allow_seen: bool = False,
    routing: bool = False,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Measure candidates against the original.

    Args:
        base: the original, a PATH argument or weights; usually the full-precision checkpoint.
        candidates: PATH arguments, or weights.
        text: a file or a text; None: the bundled held-out text, for models with the bundled model's tokenizer.
        tokens: only so many tokens from the text's beginning.
        streams: consecutive parts of the text, each run from the initial state.
        max_ppl_increase: the gate, in per cent; a candidate above it sets `gate_failed`.
        activations: how quantized checkpoints are run, "fp32" or "planned"; artifacts have theirs built in.
        threads: CPU threads, shared out to the models, which work side by side; None: all that this process may use.
        allow_seen: measure also on text that a model has seen; the report says so.
        routing: also say what became of the routers' choices, and how much of the KL they explain; PyTorch models only.
        progress: told how many tokens are done.

    Raises:
        InputError: bad paths, text or options, models that do not share a tokenizer, an original that is not one;
            routing of artifacts, or of models whose routers differ.
    """
    if not candidates:
        raise InputError("no candidate was given; name a checkpoint or artifact to compare with the original")
    if max_ppl_increase is not None and not math.isfinite(max_ppl_increase):
        raise InputError(f"the gate {max_ppl_increase} is not a number of per cent; give one, e.g. 1%")
    at_once, own_threads = shared_out(threads, 1 + len(candidates))
    original, *sources = [
        locate(source) if isinstance(source, str | Path) else source for source in (base, *candidates)
    ]
    if routing:
        _check_shows_routing([original, *sources])
    opened = [open_model(original, threads=own_threads)]
    for source in sources:
        kind = source.kind if isinstance(source, Located) else source.origin.kind
        # Only a quantized checkpoint has a choice.
        wanted = activations if kind == "quantized checkpoint" else None
        opened.append(open_model(source, activations=wanted, threads=own_threads))
    runners = [model.runner for model in opened]
    if routing:
        check_routers(*_as_torch(runners))
    passage = held_out_passage(opened, text=text, tokens=tokens, streams_wanted=streams, allow_seen=allow_seen)
    scores = score(runners, passage.tokens, at_once=at_once, progress=progress)
    shifts = None
    if routing:
        shifts = compare_routing(*_as_torch(runners), passage.tokens, at_once=at_once, progress=progress)
    info, *infos = (runner.info for runner in runners)
    ppl = math.exp(scores[0].nll.mean())
    windows = Windows(*scores[0].nll.shape)
    return ComparisonReport(
        text=passage.name,
        text_sha256=passage.sha256,
        tokens=passage.predicted,
        streams=streams,
        seen_by=passage.seen_by,
        special=passage.special,
        document_separator=passage.document_separator,
        notes=passage.notes,
        baseline=Baseline(info.path, info.kind, info.weights, ppl, info.weight_bytes, info.bits_per_weight),
        candidates=tuple(
            _candidate(info, own, scores[0], windows, max_ppl_increase)
            for info, own in zip(infos, scores[1:], strict=True)
        ),
        max_ppl_increase_pct=max_ppl_increase,
        routing=None if shifts is None else tuple(shifts),
        scores=tuple(scores),
    )


def _check_shows_routing(sources: Sequence[Located | Weights]) -> None:
    """Programs do not say what their routers choose."""
    programs = [source.given for source in sources if isinstance(source, Located) and source.path.is_file()]
    if programs:
        what = "routing is compared between PyTorch models, and these are artifacts"
        raise InputError.listing(what, programs, "Give the checkpoints that they were lowered from.")


def _as_torch(runners: Sequence[Runner]) -> tuple[TorchRunner, list[TorchRunner]]:
    original, *candidates = [runner for runner in runners if isinstance(runner, TorchRunner)]
    return original, candidates


def _candidate(info: RunnerInfo, own: Scores, original: Scores, windows: Windows, gate: float | None) -> Candidate:
    rise = own.nll - original.nll
    increase = 100 * math.expm1(rise.mean())
    return Candidate(
        path=info.path,
        kind=info.kind,
        weights=info.weights,
        activations=info.activations,
        perplexity=math.exp(own.nll.mean()),
        ppl_increase_pct=increase,
        ppl_increase_ci95=windows.percentiles(100 * np.expm1(windows.resampled_means(rise))),
        kl_mean=float(own.kl.mean()),
        kl_ci95=windows.interval(own.kl),
        kl_median=float(np.median(own.kl)),
        top1_agreement=float(own.agree.mean()),
        bytes=info.weight_bytes,
        file_bytes=info.file_bytes,
        bits_per_weight=info.bits_per_weight,
        gate_failed=gate is not None and increase > gate,
    )
