# SPDX-License-Identifier: Apache-2.0
"""What removing experts costs: measures it model by model, and writes `docs/pruning.md`'s tables.

    python bench/pruning.py run WORK NAME MODEL [--calibrate FILE…] --same FILE [--other FILE] [--only PART…]
    python bench/pruning.py write WORK

`run` stores each part in WORK/NAME at once and leaves alone what is there; `write` leaves the sections of models that
WORK doesn't hold as they are. Experts are looked at on windows of the calibration text, leave-one-out for the rank
correlations on other windows of it; what is left is measured against the whole model on the other texts:
KL(whole ‖ pruned), nats a token, in fp32, in one stream with carried state; intervals and differences are paired
bootstraps over windows of 256 predicted tokens (95 %).
"""

import argparse
import json
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from page import joined, parted
from scipy.stats import spearmanr

from mossquant.calibration.meter import WINDOW, Meter
from mossquant.calibration.prune import prune
from mossquant.calibration.quantize import JUDGED_TOKENS, quantize
from mossquant.calibration.removal import Trials, all_but, counts_of, order_of, room_of
from mossquant.calibration.saliency import Expert, Saliencies, saliencies
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.pruned import Keep, Pruned
from mossquant.checkpoint.weights import Weights
from mossquant.errors import InputError
from mossquant.eval.bench import bench
from mossquant.eval.machine import machine
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.report.chart import Series, write_chart
from mossquant.eval.scores import score
from mossquant.eval.windows import Interval, Windows
from mossquant.targets.export import export

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "pruning.md"
BEGIN = "## What it costs"
KINDS, SHARES = ("ssm", "mlp", "both"), (0.125, 0.25, 0.5)
SALIENCIES = ("change", "reap", "frequency")
SEEDS = 5
LOOKED_AT = 12_288
JUDGED_SHARE = 0.25
"""At which ways of choosing are held against one another."""
RECOVERED = ("ssm:0.25", "mlp:0.25", "ssm:0.5", "both:0.25")
RIVALS = ("frequency", "reap")
"""Recovered too, at the share at which ways of choosing are held against one another."""
SHIPPED = ("ssm:0.25", "ssm:0.5", "mlp:0.25")
"""What is quantized and lowered beside the whole model."""
BITS = (3.8, 4.0, 4.2, 4.4, 4.75, 5.25, 6.0, 8.0)
"""Budgets, of bytes: bits a weight of the whole model."""
BITS_TOKENS = 32_768
"""Of each text, on which quantized models are measured."""
TARGETS = {"onnx": ".onnx", "executorch": ".pte", "native": ".moss"}


class Job:
    """One model, its texts, and the folder of what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.work / arguments.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.weights: Weights = open_weights(arguments.model, verb="prune")
        self.texts: dict[str, Path | None] = {"same": arguments.same, "other": arguments.other}
        self._saliencies: list[Saliencies] | None = None
        self._trials: Trials | None = None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is stored under a name, made if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            print(name, flush=True)
            began = process_time()
            found = make()
            path.write_text(json.dumps({"found": found, "cpu_seconds": process_time() - began}, indent=1) + "\n")
        return json.loads(path.read_text())["found"]

    @property
    def learned(self) -> CalibrationText:
        """The calibration text less its end."""
        return CalibrationText.of(self.weights, self.arguments.calibrate).split(JUDGED_TOKENS)[0]

    def saliencies(self) -> list[Saliencies]:
        """What the cheap saliencies say."""
        if self._saliencies is None:
            self._saliencies = saliencies(self.weights, self.learned.windows(LOOKED_AT // WINDOW, WINDOW))
        return self._saliencies

    def trials(self) -> Trials:
        """Measures on the windows that the experts are chosen on."""
        if self._trials is None:
            self._trials = Trials(self.folder / "trials.json", json.dumps(dict(self.weights.origin.files)))
            self._trials.measure_with(Meter(self.weights, self.learned.windows(LOOKED_AT // WINDOW, WINDOW)))
        return self._trials

    def of_kind(self, kind: str) -> list[Saliencies]:
        """The experts of a kind, or of both."""
        return [one for one in self.saliencies() if kind in (one.expert.kind, "both")]

    def order(self, kind: str, by: str, share: float, seed: int = 0) -> list[list[Any]]:
        """The experts that go, in the order in which they are chosen."""
        candidates = self.of_kind(kind)
        room = room_of(self.weights)
        experts = [one.expert for one in candidates]
        counts = counts_of(experts, share, room, "the model")
        chosen = order_of(by, candidates, counts, room, self.trials(), seed, lambda *of: None)  # type: ignore[arg-type]
        return [[one.layer, one.kind, one.number] for one in chosen]


def ranks(job: Job) -> dict[str, Any]:
    """Rank correlation (Spearman) of each cheap saliency with leave-one-out on windows that it has not seen."""
    tokens = job.learned.tokens
    length = len(tokens) // (LOOKED_AT // WINDOW)
    starts = [index * length + length // 2 for index in range(LOOKED_AT // WINDOW)]
    other = torch.from_numpy(np.stack([tokens[start : start + WINDOW] for start in starts]).astype(np.int64))
    meter = Meter(job.weights, other)
    found: dict[str, Any] = {"alone": {}}
    for one in job.saliencies():
        kl = float(meter.kl(gone={one.routing: [one.expert.number]}).mean())
        found["alone"][str(one.expert)] = kl
    for kind in ("ssm", "mlp"):
        own = job.of_kind(kind)
        alone = [found["alone"][str(one.expert)] for one in own]
        found[kind] = {by: float(spearmanr([getattr(one, by) for one in own], alone).statistic) for by in SALIENCIES}
        found[kind]["alone"] = [min(alone), float(np.median(alone)), max(alone)]
    return found


def keep_of(job: Job, order: Sequence[Sequence[Any]]) -> Keep:
    """Everything but these."""
    return all_but(job.weights, [Expert(*one) for one in order])


def prefix(job: Job, order: Sequence[Sequence[Any]], kind: str, share: float) -> list[Sequence[Any]]:
    """The first of an order, so many of each kind."""
    left = counts_of([one.expert for one in job.of_kind(kind)], share, room_of(job.weights), "the model")
    found = []
    for one in order:
        if left[one[1]] > 0:
            left[one[1]] -= 1
            found.append(one)
    return found


def measured(job: Job, candidates: Mapping[str, Weights | Path], tokens: int | None = None) -> dict[str, Any]:
    """KL, loss and agreement of each on every text, or on so many tokens of each."""
    original = open_model(job.arguments.model, threads=1)
    models = [open_model(candidate, threads=1) for candidate in candidates.values()]
    found: dict[str, Any] = {name: {} for name in candidates}
    for domain, path in job.texts.items():
        if path is None and domain == "other":
            continue
        passage = held_out_passage(
            [original, *models], text=path, tokens=tokens or job.arguments.tokens, allow_fewer=True
        )
        whole = (passage.tokens.shape[1] - 1) // WINDOW * WINDOW
        scores = score([original.runner, *(model.runner for model in models)], passage.tokens[:, : whole + 1])
        for name, own in zip(candidates, scores[1:], strict=True):
            windows = Windows(*own.kl.shape)
            found[name][domain] = {
                "text": Path(passage.name).name,
                "tokens": whole,
                "kl": [float(mean) for mean in windows.sums(own.kl) / windows.counts],
                "increase": float(np.expm1(own.nll.mean() - scores[0].nll.mean())),
                "agreement": float(own.agree.mean()),
            }
    return found


def pruned(job: Job, name: str, keep: Keep, recover: int) -> Path:
    """A checkpoint of what stays, recovered over so many tokens; made when first asked for."""
    path = job.folder / f"made-{name}"
    if not path.exists():
        prune(job.arguments.model, path, keep=keep, text=job.arguments.calibrate, recover=recover)
    return path


def shipped(job: Job) -> dict[str, str | Path]:
    """The whole model, and those without experts: recovered ones where there are any."""
    found: dict[str, str | Path] = {"nothing": job.arguments.model}
    for case in SHIPPED:
        kind, share = case.split(":")[0], float(case.split(":")[1])
        name = f"{kind} {100 * share:g} %"
        if case in job.arguments.recovered and job.arguments.recover:
            found[f"{name}, recovered"] = pruned(
                job, f"{kind}-{share}", greedy(job, kind, share), job.arguments.recover
            )
        else:
            found[name] = pruned(job, f"{kind}-{share}-unrecovered", greedy(job, kind, share), 0)
    return found


def greedy(job: Job, kind: str, share: float) -> Keep:
    """What stays where experts are chosen as `prune` does."""
    order = job.once(f"order {kind} greedy", lambda: job.order(kind, "greedy", 0.5))
    return keep_of(job, prefix(job, order, kind, share))


def against_bits(job: Job) -> dict[str, Any]:
    """Each model in `int4` within the same bytes, its formats chosen by what roles are known to lose: bytes and KL."""
    found: dict[str, Any] = {}
    for name, path in shipped(job).items():
        with tempfile.TemporaryDirectory(dir=job.folder) as folder:
            made: dict[str, Path] = {}
            stored: dict[str, int] = {}
            for bits in BITS:
                size, output = bits * job.weights.origin.parameters / 8, Path(folder) / f"{bits}"
                try:
                    ledger = quantize(path, output, budget=f"{size / 1e6:.6f}MB")
                except InputError as error:
                    print(f"{name} at {bits} bits: {error}", flush=True)
                    continue
                made[f"{bits}"], stored[f"{bits}"] = output, ledger.predicted_bytes
            own = measured(job, made, BITS_TOKENS)
            found[name] = [{"bits": float(bits), "bytes": stored[bits], **own[bits]} for bits in made]
    return found


def bought(job: Job) -> dict[str, Any]:
    """Each model in int4 on every target, timed in turns: bytes, load time, tokens a second."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        artifacts: dict[Path, tuple[str, str]] = {}
        for number, (name, path) in enumerate(shipped(job).items()):
            codes = Path(folder) / f"{number}"
            quantize(path, codes, recipe="int4-uniform")
            for target in TARGETS:
                artifact = Path(folder) / f"{number}-{target}"
                print(f"{target} without {name}", flush=True)
                export(codes, artifact, target=target)
                artifacts[artifact] = name, target
        report = bench(list(artifacts), threads=1, prompt=512, decode=64, repeats=7)
        rows = []
        for timing, (artifact, (name, target)) in zip(report.artifacts, artifacts.items(), strict=True):
            size = sum(
                path.stat().st_size
                for path in artifact.rglob("*")
                if path.suffix in (".onnx", ".data", ".pte", ".ptd", ".moss")
            )
            rows.append({"gone": name, "target": target, "bytes": size, **asdict(timing)})
        return {"machine": report.machine, "rows": rows}


def run(arguments: argparse.Namespace) -> None:
    """Every part that is not there yet."""
    torch.set_num_threads(1)
    job = Job(arguments)
    about = {
        "model": Path(arguments.model).name,
        "parameters": job.weights.origin.parameters,
        "calibrate": [path.name for path in arguments.calibrate] or ["the bundled calibration text"],
        "machine": machine()["cpu"],
        "recover": arguments.recover,
        "argv": vars(arguments) | {"work": "WORK"},
        "parts": [name for name in parts(job) if not arguments.only or name in arguments.only],
    }
    stored = job.folder / "about.json"
    if stored.is_file() and json.loads(stored.read_text())["model"] != about["model"]:
        raise SystemExit(f"{job.folder} holds figures of another model; give another name")
    stored.write_text(json.dumps(about, indent=1, default=lambda of: getattr(of, "name", None)))
    for name, make in parts(job).items():
        if not arguments.only or name in arguments.only:
            job.once(name, make)


def parts(job: Job) -> dict[str, Callable[[], Any]]:
    """Every part by its name, in the order in which they are measured."""
    found: dict[str, Callable[[], Any]] = {"ranks": lambda: ranks(job)}

    def views(kind: str) -> Callable[[], Any]:
        return lambda: measured(job, {f"{share}": Pruned(job.weights, greedy(job, kind, share)) for share in SHARES})

    def recovered(name: str, keep: Callable[[], Keep]) -> Callable[[], Any]:
        return lambda: measured(job, {"recovered": pruned(job, name, keep(), job.arguments.recover)})

    def others(kind: str) -> Callable[[], Any]:
        ways = [(by, 0) for by in SALIENCIES] + [("random", seed) for seed in range(SEEDS)]
        return lambda: measured(
            job,
            {
                f"{by}, seed {seed}" if by == "random" else by: Pruned(job.weights, keep_of(job, gone))
                for by, seed in ways
                if (gone := job.order(kind, by, JUDGED_SHARE, seed))
            },
        )

    for kind in KINDS:
        found[f"greedy {kind}"] = views(kind)
    if job.arguments.recover:
        for case in job.arguments.recovered:
            kind, share = case.split(":")[0], float(case.split(":")[1])
            keep = lambda kind=kind, share=share: greedy(job, kind, share)  # noqa: E731
            found[f"recovered {kind} {share}"] = recovered(f"{kind}-{share}", keep)
            if share == JUDGED_SHARE and kind != "both" and job.arguments.rivals:
                for by in RIVALS:
                    keep = lambda kind=kind, by=by: keep_of(job, job.order(kind, by, JUDGED_SHARE))  # noqa: E731
                    found[f"recovered {kind} {share} {by}"] = recovered(f"{kind}-{share}-{by}", keep)
    for kind in ("ssm", "mlp"):
        found[f"others {kind}"] = others(kind)
    found["against bits"] = lambda: against_bits(job)
    found["bought"] = lambda: bought(job)
    return found


Floats = NDArray[np.float64]


def _interval(values: Floats) -> Interval | None:
    """95 % interval of the mean of windows."""
    return Windows(1, len(values), window=1).interval(values[None])


def _mean(values: Floats) -> str:
    interval = _interval(values)
    between = "" if interval is None else f" [{interval.low:.2e}, {interval.high:.2e}]"
    return f"{values.mean():.2e}{between}"


def _command(name: str, argv: Mapping[str, Any]) -> str:
    """What measured a model."""
    words = ["python bench/pruning.py run WORK", f'"{name}"', Path(argv["model"]).name]
    for option in ("calibrate", "same", "other", "tokens", "recover", "recovered", "rivals", "only"):
        value = argv[option]
        if value is True:
            words.append(f"--{option}")
        elif value and list(value if isinstance(value, list) else [value]) != list(RECOVERED):
            several = value if isinstance(value, list) else [value]
            words += [f"--{option}", *(f'"{one}"' if " " in str(one) else str(one) for one in several)]
    return "    " + " ".join(words)


def _section(folder: Path) -> list[str]:
    about = json.loads((folder / "about.json").read_text())

    def stored(name: str) -> Any:
        path = folder / f"{name}.json"
        return json.loads(path.read_text())["found"] if path.is_file() else None

    lines = [f"### {folder.name}", ""]
    lines += [
        f"{about['parameters']:,} parameters; looked at {LOOKED_AT:,} tokens of {', '.join(about['calibrate'])}. "
        f"{about['machine']}, 1 thread.",
        "",
        _command(folder.name, about["argv"]),
        "",
    ]
    found = stored("ranks")
    if found is not None:
        heads = "change | reap | frequency | KL alone, least – median – most"
        lines += [f"| Spearman with leave-one-out on other text | {heads} |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for kind in ("ssm", "mlp"):
            least, median, most = found[kind]["alone"]
            figures = " | ".join(f"{found[kind][by]:.2f}" for by in SALIENCIES)
            lines += [f"| {kind} experts | {figures} | {least:.1e} – {median:.1e} – {most:.1e} |"]
        lines += [""]
    last = _against_bits(folder, stored("against bits")) + _bought(stored("bought"))
    whole = [stored(name) for name in about["parts"] if name.startswith(("greedy", "recovered"))]
    first = next((of for part in whole for of in (part or {}).values()), None)
    if first is None:
        return lines + last
    domains = [domain for domain in ("same", "other") if domain in first]
    texts = [f"{first[domain]['text']}, {first[domain]['tokens']:,} tokens" for domain in domains]
    lines += ["| experts gone | " + " | ".join(f"KL: {text} | perplexity" for text in texts) + " |"]
    lines += ["| --- |" + " ---: | ---: |" * len(domains)]
    for kind in KINDS:
        greedy = stored(f"greedy {kind}") or {}
        for share in SHARES:
            ways = {
                "": greedy.get(f"{share}"),
                ", recovered": (stored(f"recovered {kind} {share}") or {}).get("recovered"),
            }
            for said, own in ways.items():
                if own is not None:
                    cells = [
                        f"{_mean(np.array(own[domain]['kl']))} | {100 * own[domain]['increase']:+.2f} %"
                        for domain in domains
                    ]
                    lines += [f"| {kind} {100 * share:g} %{said} | " + " | ".join(cells) + " |"]
    lines += [""]
    if any(folder.glob("recovered *.json")):
        lines += [f"Recovered over {about['recover']:,} tokens.", ""]
    missing = [name for name in about["parts"] if stored(name) is None]
    if missing:
        lines += [f"Not measured in this run: {', '.join(missing)}.", ""]
    ways: list[tuple[str, str, Any, Any]] = []
    for kind in ("ssm", "mlp"):
        ours, group = stored(f"greedy {kind}"), stored(f"others {kind}")
        if ours is not None and group is not None:
            best = ours[f"{JUDGED_SHARE}"]
            ways += [(name, kind, of, best) for name, of in ({"greedy": best} | group).items()]
    for kind in ("ssm", "mlp"):
        found = {by: stored(f"recovered {kind} {JUDGED_SHARE}{by and ' ' + by}") for by in ("", *RIVALS)}
        for by, of in found.items():
            if of is not None and found[""] is not None:
                ways.append((f"{by or 'greedy'}, recovered", kind, of["recovered"], found[""]["recovered"]))
    if ways:
        heads = " | ".join(f"KL: {text} | greedy less it" for text in texts)
        lines += [f"| 25 % gone, chosen by | of | {heads} |", "| --- | --- |" + " ---: | ---: |" * len(domains)]
    for name, kind, of, best in ways:
        cells = []
        for domain in domains:
            own, least = (np.array(which[domain]["kl"]) for which in (of, best))
            difference = _interval(least - own)
            said = "–"
            if of is not best and difference is not None:
                said = f"{(least - own).mean():+.1e} [{difference.low:+.1e}, {difference.high:+.1e}]"
            cells += [f"{own.mean():.2e} | {said}"]
        lines += [f"| {name} | {kind} | " + " | ".join(cells) + " |"]
    lines += [""] if ways else []
    return lines + last


def _picture(folder: Path) -> Path:
    """Where the picture of a model goes."""
    words = re.findall(r"\w+", folder.name.lower())
    return OUTPUT.parent / f"pruning-{'-'.join(words)}.svg"


def gone(name: str) -> str:
    """What is gone of a model of `shipped`, in words."""
    what, comma, recovered = name.partition(",")
    return f"{what} gone{comma}{recovered}"


def _against_bits(folder: Path, found: Mapping[str, Any] | None) -> list[str]:
    """Experts against bits: KL at the same bytes."""
    if found is None:
        return []
    first = next(iter(found.values()))[0]
    domains = [domain for domain in ("same", "other") if domain in first]
    series = [
        Series(
            f"{name}, {domain}" if len(domains) > 1 else name,
            tuple((row["bytes"] / 1e6, float(np.mean(row[domain]["kl"]))) for row in rows),
        )
        for name, rows in found.items()
        for domain in domains
    ]
    write_chart(
        f"{folder.name}: KL over bytes, by experts gone", series, _picture(folder), x="MB"
    )
    said = (
        "Against bits: `int4` within the same bytes, its formats chosen by what roles are known to lose; KL against "
        "the whole model in full precision."
    )
    lines = [said, "", f"![KL over bytes]({_picture(folder).name})", ""]
    names = list(found)
    sizes = sorted({row["bits"] for rows in found.values() for row in rows})
    for domain in domains:
        own = first[domain]
        lines += [f"| bytes of, MB | {' | '.join(f'KL, {gone(name)}' for name in names)} |"]
        lines += ["| ---: |" + " ---: |" * len(names)]
        for bits in sizes:
            rows = [next((row for row in found[name] if row["bits"] == bits), None) for name in names]
            size = max(row["bytes"] for row in rows if row is not None)
            cells = [_mean(np.array(row[domain]["kl"])) if row is not None else "–" for row in rows]
            lines += [f"| {size / 1e6:.2f} | {' | '.join(cells)} |"]
        lines += ["", f"{own['text']}, {own['tokens']:,} tokens; –: no choice of formats fits.", ""]
    return lines


def _bought(found: Mapping[str, Any] | None) -> list[str]:
    """What a phone gets for it."""
    if found is None:
        return []
    lines = ["| in int4, experts gone | artifact | MB | load, ms | prefill of 512, tokens/s | decode, tokens/s |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in found["rows"]:
        speeds = [
            f"{row[way]['median']:,.0f} ({row[way]['min']:,.0f}–{row[way]['max']:,.0f})"
            for way in ("prefill_tok_s", "decode_tok_s")
        ]
        artifact = TARGETS[row["target"]]
        lines += [
            f"| {row['gone']} | {artifact} | {row['bytes'] / 1e6:.2f} | {row['load_ms']:.0f} | {' | '.join(speeds)} |"
        ]
    said = f"{found['machine']['cpu']}, one thread, all in turns: median and range of seven."
    return [*lines, "", said, ""]


def write(arguments: argparse.Namespace) -> None:
    """Put the tables of every model in WORK behind what the page says before them; other models keep theirs."""
    page = OUTPUT.read_text("utf-8")
    before, _, after = page.partition(BEGIN)
    _, sections = parted(after, "### ")
    for folder in sorted(path.parent for path in arguments.work.glob("*/about.json")):
        sections |= parted("\n".join(_section(folder)), "### ")[1]
    measuring = (__doc__ or "").partition("doesn't hold as they are. ")[2]
    said = f"Written by `python bench/pruning.py write WORK` from what `run` measured. {measuring}"
    lines = [f"{before}{BEGIN}", *textwrap.wrap(" ".join(said.split()), 128)]
    OUTPUT.write_text(joined("\n\n".join([lines[0], "\n".join(lines[1:])]), sections, "### "), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="measure one model")
    running.add_argument("work", type=Path)
    running.add_argument("name", help="of the model, in the document")
    running.add_argument("model", help="a checkpoint folder, or tiny")
    running.add_argument("--calibrate", type=Path, nargs="+", default=[], help="texts that may be learned from")
    running.add_argument("--same", type=Path, help="text of the same domain")
    running.add_argument("--other", type=Path, help="text of another domain")
    running.add_argument("--tokens", type=int, help="of each text, at most")
    running.add_argument("--recover", type=int, default=0, help="tokens of recovery")
    running.add_argument("--recovered", nargs="+", choices=RECOVERED, default=RECOVERED, help="what is recovered")
    running.add_argument("--rivals", action="store_true", help="recover what other ways choose too")
    running.add_argument("--only", nargs="+", default=[], metavar="PART", help="measure these parts")
    writing = verbs.add_parser("write", help="write the document")
    writing.add_argument("work", type=Path)
    arguments = parser.parse_args()
    {"run": run, "write": write}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
