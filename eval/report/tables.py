# SPDX-License-Identifier: Apache-2.0
"""Reports as tables for a terminal; no arithmetic but rounding. A dash stands where there is no value."""

import math

from rich.table import Table

from mossquant.eval.bench import PROFILED_TURNS, BenchReport, Speed
from mossquant.eval.compare import Candidate, ComparisonReport
from mossquant.eval.perplexity import PerplexityReport
from mossquant.eval.report.grid import DASH, figure, grid, left, right, spaced
from mossquant.eval.routing import ForcedLoss, RouterShift
from mossquant.eval.verify import VerifyReport
from mossquant.eval.windows import Interval
from mossquant.targets.export import Needs
from mossquant.targets.info_report import InfoReport

_HASH_SHOWN = 16


def perplexity_table(report: PerplexityReport) -> Table:
    """One model on one text."""
    how = ", special tokens taken for tokens" if report.special else ""
    how += f", documents between {report.document_separator!r}" if report.document_separator else ""
    seen = "; the model was trained or calibrated on it" if report.seen else ""
    error = DASH if report.standard_error is None else f"± {report.standard_error:.4f} (standard error)"
    bytes_read = "" if report.text_bytes is None else f", {report.text_bytes:,} bytes"
    rows = [
        ("model", f"{report.path} ({_kind(report.kind, report.activations)})"),
        ("text", f"{report.text}, SHA-256 {report.text_sha256[:_HASH_SHOWN]}{how}{seen}"),
        ("tokens predicted", f"{report.tokens:,} in {_streams(report.streams)}{bytes_read}"),
        ("nats a token", f"{report.nats_per_token:.4f} {error}"),
        ("perplexity", figure(report.perplexity, ".4f") + _says_nothing(report.perplexity)),
        ("bits a byte", DASH if report.bits_per_byte is None else f"{report.bits_per_byte:.4f}"),
    ]
    return grid(left("", ""), rows, header=False)


def comparison_table(report: ComparisonReport) -> Table:
    """The original and every candidate; intervals stand below what they belong to."""
    base = report.baseline
    size = _size(base.bytes, base.bits_per_weight)
    rows = [(f"{base.path}\noriginal, {base.weights}", figure(base.perplexity, ".3f"), DASH, DASH, DASH, size)]
    for candidate in report.candidates:
        interval, failed = candidate.ppl_increase_ci95, "\nabove the gate" if candidate.gate_failed else ""
        between = "" if interval is None else f"[{interval.low:+.2f}, {interval.high:+.2f}]"
        rows.append(
            (
                f"{candidate.path}\n{_kind(candidate.kind, candidate.activations)}",
                figure(candidate.perplexity, ".3f"),
                f"{figure(candidate.ppl_increase_pct, '+.2f')}\n{between}{failed}",
                _divergence(candidate),
                f"{100 * candidate.top1_agreement:.1f}",
                _size(candidate.bytes, candidate.bits_per_weight),
            )
        )
    seen = "; seen by " + ", ".join(report.seen_by) if report.seen_by else ""
    nothing = _says_nothing(base.perplexity, *(candidate.perplexity for candidate in report.candidates))
    where = f"{report.text}, {report.tokens:,} tokens in {_streams(report.streams)}"
    caption = f"{where}{seen}; intervals are 95 %{nothing}"
    columns = right("perplexity", "increase, %", "KL,\nnats a token", "same\ntop, %", "weights, MB\nbits a weight")
    return grid([*left(""), *columns], rows, caption=caption)


def comparison_tables(report: ComparisonReport) -> list[Table | str]:
    """The comparison; where it was asked for, what every candidate's routers do, and what that explains of its KL."""
    tables = [comparison_table(report)]
    for shift in report.routing or ():
        means = [mean for kind in ("ssm", "mlp") if (mean := shift.mean(kind)) is not None]
        rows = [_router(router) for router in (*shift.routers, *means)]
        heads = [*left("router", "of"), *right("same\nexperts, %", "gates\nmoved, %", "load\nmoved, %")]
        tables.append(grid(heads, rows, caption=f"{shift.path}: routing against the original's"))
        free = ("none", _mean_between(shift.kl_mean, shift.kl_ci95), DASH)
        forced = [("chosen experts", *_forced(shift.chosen)), ("and their gates", *_forced(shift.gates))]
        caption = f"{shift.path}: what routing explains"
        columns = right("KL,\nnats a token", "explained, %")
        tables.append(grid([*left("original's choices"), *columns], [free, *forced], caption=caption))
    return spaced(*tables)


def needs_table(needs: Needs) -> Table:
    """What an export takes, target by target."""
    rows = [(name, _megabytes(disk), _megabytes(memory)) for name, (disk, memory) in needs.targets.items()]
    rows += [
        ("tokenizer and manifest", _megabytes(needs.beside_bytes), DASH),
        ("all", _megabytes(needs.disk_bytes), _megabytes(needs.memory_bytes)),
    ]
    heads = [*left(""), *right("disk, MB,\nat most", "memory, MB,\nat most")]
    caption = "Memory is beside Python's own with its imports. Targets are lowered one after the other."
    return grid(heads, rows, caption=caption, whole_names=True)


def parity_table(report: VerifyReport) -> Table:
    """Every check of every artifact, below its path."""
    rows = []
    for artifact in report.artifacts:
        weights = artifact.weights
        equal = "all equal" if weights.passed else f"{len(weights.differences)} differences"
        rows += [
            (artifact.path, "", "", ""),
            (f"  weights of {weights.tensors} tensors", equal, "", _verdict(weights.passed)),
        ]
        if artifact.parity is None:
            rows.append(("  graph", "not compared: nothing was run", "", ""))
        for check in artifact.checks:
            bound, verdict = ("", "") if check.bound is None else (figure(check.bound, ".3g"), _verdict(check.passed))
            name = f"  {check.name}" + (f" ({check.note})" if check.note else "")
            found = DASH if check.note.startswith("not measured") else figure(check.value, ".3g")
            rows.append((name, found, bound, verdict))
    verdicts = [row[3] for row in rows if row[3]]
    skipped = sum(bool(check.note) for artifact in report.artifacts for check in artifact.checks)
    caption = f"{verdicts.count('ok')} of {len(verdicts)} checks passed; lines without a bound are for information"
    caption += f"; {skipped} were not judged, for the reasons beside them" if skipped else ""
    return grid([*left("check"), *right("found", "at most"), *left("")], rows, caption=caption)


def bench_table(report: BenchReport) -> Table:
    """Speed and memory of every artifact."""
    rows = [
        (
            f"{timing.path}\n{_kind(timing.kind, timing.activations)}",
            _speed(timing.prefill_tok_s),
            _speed(timing.decode_tok_s),
            f"{timing.load_ms:.0f}",
            f"{timing.peak_rss_mb:.0f}",
            _megabytes(timing.bytes_per_token),
        )
        for timing in report.artifacts
    ]
    caption = (
        f"{report.machine['cpu']}, {report.threads} of {report.machine['cores']} cores, copies "
        f"{report.bandwidth_gb_s:.1f} GB/s; prefill of {report.prompt} tokens, {report.decode} decode steps; median "
        f"and range of {report.repeats} turns"
    )
    columns = right("prefill\ntokens/s", "decode\ntokens/s", "load,\nms", "peak\nMB", "MB read\na token")
    return grid([*left(""), *columns], rows, caption=caption)


def bandwidth_tables(report: BenchReport) -> list[Table]:
    """How near decode is to what memory gives, of artifacts that read their weights from a mapping; or nothing."""
    rows = [
        (
            timing.path,
            f"{timing.mapped_mb:.1f}",
            _megabytes(timing.bytes_per_token),
            f"{timing.read_gb_s.median:.1f}",
            f"{100 * timing.read_share.median:.0f}",
        )
        for timing in report.artifacts
        if timing.mapped_mb is not None and timing.read_gb_s is not None and timing.read_share is not None
    ]
    columns = right("mapped,\nMB", "MB read\na token", "mapping is\nread at, GB/s", "decode,\n% of that")
    return [grid([*left(""), *columns], rows)] if rows else []


def profile_tables(report: BenchReport) -> list[Table | str]:
    """Where the time of each artifact goes, by part of the model; a line for those that do not say."""
    results: list[Table | str] = [
        f"Where the time goes, medians of {PROFILED_TURNS} more turns, each part by itself:"
    ]
    for timing in report.artifacts:
        if not timing.decode_us:
            results.append(f"{timing.path}: {timing.kind} does not say where its time goes")
            continue
        totals = [sum(of.values()) for of in (timing.prefill_us, timing.decode_us)]
        parts = dict.fromkeys((*timing.prefill_us, *timing.decode_us))
        rows = [(part, *(f"{of.get(part, 0):.1f}" for of in (timing.prefill_us, timing.decode_us))) for part in parts]
        rows.append(("in all", *(f"{total:.1f}" for total in totals)))
        columns = right("prefill\nµs a token", "decode\nµs a token")
        results.append(grid([*left(timing.path), *columns], rows))
    return results


def info_tables(report: InfoReport) -> list[Table | str]:
    """What is at a path: facts, weights by role, sections of a program, files."""
    config, whole = report.config, report.program_bytes
    widths = f"width {config.hidden_size}, d_inner {config.d_inner}, state {config.state_size}"
    ranks = f"dt_rank {config.time_step_rank}, vocabulary {config.vocab_size}"
    facts = [
        ("what", f"{report.path} ({report.kind}, {report.weights})"),
        ("shape", f"{config.num_hidden_layers} blocks, {widths}, {ranks}"),
        ("SSM experts", _count(config.num_ssm_experts, config.num_ssm_experts_per_tok)),
        ("MLP experts", _count(config.num_mlp_experts, config.num_mlp_experts_per_tok)),
        ("parameters", f"{report.parameters:,}, of which {report.active_parameters:,} for one token"),
        ("weights", f"{report.weight_bytes:,} bytes, {report.bits_per_weight:.2f} bits a weight"),
        *report.facts,
    ]
    tables = [grid(left("", ""), facts, header=False)]
    if report.rows:
        rows = [
            (
                *(row.role, row.storage, str(row.tensors), f"{row.weights:,}", f"{row.bytes:,}"),
                *(f"{row.bits_per_weight:.2f}", DASH if row.relative_error is None else f"{row.relative_error:.4f}"),
            )
            for row in report.rows
        ]
        heads = [*left("role", "stored as"), *right("tensors", "weights", "bytes", "bits a\nweight", "largest\nerror")]
        tables.append(grid(heads, rows, whole_names=True))
    if report.sections:
        sections = [(name, f"{size:,}", f"{100 * size / whole:.1f}") for name, size in report.sections.items()]
        sections.append(("the program", f"{whole:,}", "100.0"))
        stored = f"the {report.payload_bytes:,} bytes that the checkpoint stores for the weights"
        caption = f"{whole / report.payload_bytes:.4f} × {stored}"
        tables.append(grid([*left("bytes for"), *right("bytes", "%")], sections, caption=caption))
    files = [(row.name, f"{row.bytes:,}", row.sha256[:_HASH_SHOWN]) for row in report.files]
    tables.append(grid([*left("file"), *right("bytes"), *left("SHA-256 begins")], files))
    return spaced(*tables)


def scientific(value: float) -> str:
    """1.31e-3."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _divergence(candidate: Candidate) -> str:
    """Mean; below it its interval, both with the mean's exponent; below that the median."""
    between = _mean_between(candidate.kl_mean, candidate.kl_ci95)
    return f"{between}\nmedian {scientific(candidate.kl_median)}" if "\n" in between else between


def scaled(first: float, *others: float) -> tuple[list[float], int]:
    """Numbers over the power of ten of the first, and its exponent."""
    exponent = math.floor(math.log10(first))
    return [value / 10.0**exponent for value in (first, *others)], exponent


def _mean_between(mean: float, interval: Interval | None) -> str:
    """A mean and below it its interval, both with the mean's exponent."""
    if interval is None or mean <= 0:
        return scientific(mean)
    (shown, low, high), exponent = scaled(mean, interval.low, interval.high)
    return f"{shown:.2f}e{exponent}\n[{low:.2f}, {high:.2f}]e{exponent}"


def _router(router: RouterShift) -> tuple[str, ...]:
    figures = router.overlap, router.total_variation, router.load_shift
    return (router.name, router.kind, *(f"{100 * value:.2f}" for value in figures))


def _forced(loss: ForcedLoss) -> tuple[str, str]:
    """KL, and the share of the free run's that is gone."""
    between = loss.explained_ci95
    share = DASH if loss.explained is None else f"{100 * loss.explained:.1f}"
    share += "" if between is None else f"\n[{100 * between.low:.1f}, {100 * between.high:.1f}]"
    return _mean_between(loss.kl_mean, loss.kl_ci95), share


def _kind(kind: str, activations: str) -> str:
    return f"{kind}, {activations} activations"


def _says_nothing(*perplexities: float) -> str:
    return "; a perplexity above 10^6 is as good as no prediction" if max(perplexities) > 1e6 else ""


def _verdict(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _speed(speed: Speed) -> str:
    return f"{speed.median:.0f}\n({speed.min:.0f}–{speed.max:.0f})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _size(count: int, bits_per_weight: float) -> str:
    return f"{_megabytes(count)}\n{bits_per_weight:.2f}"


def _streams(count: int) -> str:
    return "one stream" if count == 1 else f"{count} streams"


def _count(experts: int | tuple[int, ...], chosen: int) -> str:
    if isinstance(experts, int):
        return f"{experts}, {chosen} a token"
    most = "at most " if min(experts) < chosen else ""
    return f"by layer {' '.join(map(str, experts))}, {most}{chosen} a token"
