# SPDX-License-Identifier: Apache-2.0
"""What removing experts costs: measures it model by model, and writes `docs/pruning.md`'s tables.

    python bench/pruning.py run WORK NAME MODEL [--calibrate FILE…] --same FILE [--other FILE]
    python bench/pruning.py write WORK

`run` stores each part in WORK/NAME at once and leaves alone what is there. Experts are looked at on windows of the
calibration text, leave-one-out for the rank correlations on other windows of it; what is left is measured against the
whole model on the other texts: KL(whole ‖ pruned), nats a token, in fp32, in one stream with carried state; intervals
and differences are paired bootstraps over windows of 256 predicted tokens (95 %).
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from mossquant.calibration.meter import WINDOW, Meter
from mossquant.calibration.prune import _all_but, _chosen, _counts, _room, _Trials, prune
from mossquant.calibration.quantize import JUDGED_TOKENS
from mossquant.calibration.saliency import Expert, Saliencies, saliencies
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.pruned import Keep, Pruned
from mossquant.checkpoint.weights import Weights
from mossquant.eval.machine import machine
from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.scores import score
from mossquant.eval.windows import Interval, Windows

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "pruning.md"
BEGIN = "## What it costs"
KINDS, SHARES = ("ssm", "mlp", "both"), (0.125, 0.25, 0.5)
SALIENCIES = ("change", "reap", "frequency")
SEEDS = 5
LOOKED_AT = 12_288
JUDGED_SHARE = 0.25
"""At which ways of choosing are held against one another."""
RECOVERED = ("ssm:0.25", "mlp:0.25", "ssm:0.5", "both:0.25")


class Job:
    """One model, its texts, and the folder of what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.work / arguments.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.weights: Weights = open_weights(arguments.model, verb="prune")
        self.texts: dict[str, Path | None] = {"same": arguments.same, "other": arguments.other}
        self._saliencies: list[Saliencies] | None = None
        self._trials: _Trials | None = None

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

    def trials(self) -> _Trials:
        """Measures on the windows that the experts are chosen on."""
        if self._trials is None:
            self._trials = _Trials(self.folder / "trials.json", json.dumps(dict(self.weights.origin.files)))
            self._trials.measure_with(Meter(self.weights, self.learned.windows(LOOKED_AT // WINDOW, WINDOW)))
        return self._trials

    def of_kind(self, kind: str) -> list[Saliencies]:
        """The experts of a kind, or of both."""
        return [one for one in self.saliencies() if kind in (one.expert.kind, "both")]

    def order(self, kind: str, by: str, share: float, seed: int = 0) -> list[list[Any]]:
        """The experts that go, in the order in which they are chosen."""
        candidates = self.of_kind(kind)
        room = _room(self.weights)
        experts = [one.expert for one in candidates]
        counts = _counts(experts, share, room, "the model")
        chosen = _chosen(by, candidates, counts, room, self.trials(), seed, lambda *of: None)  # type: ignore[arg-type]
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
    return _all_but(job.weights, [Expert(*one) for one in order])


def prefix(job: Job, order: Sequence[Sequence[Any]], kind: str, share: float) -> list[Sequence[Any]]:
    """The first of an order, so many of each kind."""
    left = _counts([one.expert for one in job.of_kind(kind)], share, _room(job.weights), "the model")
    found = []
    for one in order:
        if left[one[1]] > 0:
            left[one[1]] -= 1
            found.append(one)
    return found


def measured(job: Job, candidates: Mapping[str, Weights | Path]) -> dict[str, Any]:
    """KL, loss and agreement of each on every text."""
    original = open_model(job.arguments.model, threads=1)
    models = [open_model(candidate, threads=1) for candidate in candidates.values()]
    found: dict[str, Any] = {name: {} for name in candidates}
    for domain, path in job.texts.items():
        if path is None and domain == "other":
            continue
        passage = held_out_passage([original, *models], text=path, tokens=job.arguments.tokens, allow_fewer=True)
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
    }
    stored = job.folder / "about.json"
    if stored.is_file() and json.loads(stored.read_text())["model"] != about["model"]:
        raise SystemExit(f"{job.folder} holds figures of another model; give another name")
    stored.write_text(json.dumps(about, indent=1, default=lambda of: getattr(of, "name", None)))
    job.once("ranks", lambda: ranks(job))
    for kind in KINDS:
        order = job.once(f"order {kind} greedy", lambda kind=kind: job.order(kind, "greedy", 0.5))
        keep = {f"{share}": keep_of(job, prefix(job, order, kind, share)) for share in SHARES}
        views = {name: Pruned(job.weights, of) for name, of in keep.items()}
        job.once(f"greedy {kind}", lambda views=views: measured(job, views))
    for case in arguments.recovered if arguments.recover else ():
        kind, share = case.split(":")[0], float(case.split(":")[1])
        order = job.once(f"order {kind} greedy", lambda: None)
        keep_then, path = keep_of(job, prefix(job, order, kind, share)), job.folder / f"made-{kind}-{share}"

        def recover(keep: Keep = keep_then, path: Path = path) -> dict[str, Any]:
            if not path.exists():
                prune(job.arguments.model, path, keep=keep, text=arguments.calibrate, recover=arguments.recover)
            return measured(job, {"recovered": path})

        job.once(f"recovered {kind} {share}", recover)
    for kind in ("ssm", "mlp"):
        ways = [(by, 0) for by in SALIENCIES] + [("random", seed) for seed in range(SEEDS)]

        def others(kind: str = kind, ways: Sequence[tuple[str, int]] = ways) -> dict[str, Any]:
            views = {}
            for by, seed in ways:
                gone = job.order(kind, by, JUDGED_SHARE, seed)
                views[f"{by}, seed {seed}" if by == "random" else by] = Pruned(job.weights, keep_of(job, gone))
            return measured(job, views)

        job.once(f"others {kind}", others)


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
    for option in ("calibrate", "same", "other", "tokens", "recover", "recovered"):
        value = argv[option]
        if value and list(value if isinstance(value, list) else [value]) != list(RECOVERED):
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
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
    first = next(iter((stored("greedy ssm") or {}).values()), None)
    if first is None:
        return lines
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
    wanted = [f"greedy {kind}" for kind in KINDS] + [f"others {kind}" for kind in ("ssm", "mlp")]
    recovered = [f"recovered {case.replace(':', ' ')}" for case in about["argv"]["recovered"] if about["recover"]]
    missing = [name for name in [*wanted, *recovered] if stored(name) is None]
    if any(stored(name) is not None for name in recovered):
        lines += [f"Recovered over {about['recover']:,} tokens.", ""]
    if missing:
        lines += [f"Not measured: {', '.join(missing)}.", ""]
    if all(stored(f"others {kind}") is None for kind in ("ssm", "mlp")):
        return lines
    lines += ["| 25 % gone, chosen by | of | " + " | ".join(f"KL: {text} | greedy less it" for text in texts) + " |"]
    lines += ["| --- | --- |" + " ---: | ---: |" * len(domains)]
    for kind in ("ssm", "mlp"):
        greedy, group = stored(f"greedy {kind}"), stored(f"others {kind}")
        if greedy is None or group is None:
            continue
        for name, of in ({"greedy": greedy[f"{JUDGED_SHARE}"]} | group).items():
            cells = []
            for domain in domains:
                own, ours = (np.array(which[domain]["kl"]) for which in (of, greedy[f"{JUDGED_SHARE}"]))
                difference = _interval(ours - own)
                said = "–"
                if name != "greedy" and difference is not None:
                    said = f"{(ours - own).mean():+.1e} [{difference.low:+.1e}, {difference.high:+.1e}]"
                cells += [f"{own.mean():.2e} | {said}"]
            lines += [f"| {name} | {kind} | " + " | ".join(cells) + " |"]
    return [*lines, ""]


def write(arguments: argparse.Namespace) -> None:
    """Put the tables of every model in WORK behind what the page says before them."""
    page = OUTPUT.read_text("utf-8")
    before = page[: page.index(BEGIN)]
    folders = sorted(path.parent for path in arguments.work.glob("*/about.json"))
    measuring = (__doc__ or "").partition("leaves alone what is there. ")[2]
    said = f"Written by `python bench/pruning.py write WORK` from what `run` measured. {measuring}"
    folders = sorted(path.parent for path in arguments.work.glob("*/about.json"))
    lines = [BEGIN, "", *textwrap.wrap(" ".join(said.split()), 128), ""]
    for folder in folders:
        lines += _section(folder)
    OUTPUT.write_text(before + "\n".join(lines).rstrip() + "\n", encoding="utf-8")


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
    writing = verbs.add_parser("write", help="write the document")
    writing.add_argument("work", type=Path)
    arguments = parser.parse_args()
    {"run": run, "write": write}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
