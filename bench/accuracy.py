# SPDX-License-Identifier: Apache-2.0
"""What every way of compressing a model costs: measures them one by one, and writes `docs/accuracy.md`.

    python bench/accuracy.py run WORK NAME MODEL [--calibrate FILE…] --same FILE --other FILE
    python bench/accuracy.py write WORK

`run` makes and measures each method in a process of its own and stores what came out in WORK/NAME/METHOD.json at once;
what is there already is left alone, so that a run that was stopped goes on. `write` needs nothing but WORK, and leaves
sections of models that WORK doesn't hold as they are.

Without texts the bundled model is calibrated on its calibration text and measured on its held-out text. KL is
KL(original ‖ candidate), nats a token, in fp32: one stream with carried state a text, cut to whole windows of 256
predicted tokens, over which intervals and differences are paired bootstraps (95 %).
"""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mossquant.calibration.calibrate import _windows, calibrate
from mossquant.calibration.meter import WINDOW as METER_WINDOW
from mossquant.calibration.options import dtypes_of
from mossquant.calibration.quantize import JUDGED_TOKENS, quantize
from mossquant.calibration.recover import recover
from mossquant.calibration.statistics import Statistics
from mossquant.calibration.student import Planned
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.open import open_weights
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import Weights
from mossquant.eval.machine import machine, peak_rss_mb
from mossquant.eval.open import OpenModel, open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.routing import compare_routing, routers_of
from mossquant.eval.scores import Scores, score
from mossquant.eval.windows import WINDOW, Interval, Windows
from mossquant.files.outputs import file_sha256, new_file
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan import recipe as recipes
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import load_recipe
from mossquant.release import release
from mossquant.targets.export import export
from mossquant.targets.torch.runner import TorchRunner

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
Floats = NDArray[np.float64]

STATISTICS = "statistics"
"""What solvers with data share."""

LINEARS = """\
# Every linear of a block quantized; everything else in full precision.
version: 1
name: linears
targets: [torch, onnx, executorch]
solver: SOLVER
measure: MEASURE
weights:
  - {role: ssm.in_proj, FORMAT, sensitivity: 0.79}
  - {role: ssm.expert.x_proj, FORMAT, sensitivity: 0.11}
  - {role: ssm.expert.dt_proj, FORMAT, sensitivity: 0.082}
  - {role: ssm.out_proj, FORMAT, sensitivity: 0.61}
  - {role: "mlp.expert.w[13]", FORMAT, sensitivity: 0.11, optional: true}
  - {role: mlp.expert.w2, FORMAT, sensitivity: 0.15, optional: true}
  - {role: "*", keep: fp32, why: "only linears are compared"}
activations:
  - {role: "*", format: int8_block}
state:
  - {role: "*", format: fp32}
"""
"""int4_g32 everywhere, or for a budget int8 too, by the sensitivities of the recipe `int4` or by text."""


@dataclass(frozen=True)
class Made:
    """What a method made.

    Attributes:
        candidate: what is measured: a path or weights.
        bits: a weight; of the set that the method belongs to.
        seconds: of the CPU, that something it needs took before.
        notes: what is to be said.
        twin: the same codes and scales in PyTorch, with the activation format of an artifact.
    """

    candidate: Path | Weights
    bits: float
    seconds: float = 0.0
    notes: Sequence[str] = ()
    twin: Path | None = None


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        part: "all" tensors, "linears" alone, or "artifact".
        make: makes it.
        said: what it is.
        base: what its KL is a part of.
        routing: whether the original's experts are forced too.
        statistics: whether those of the calibration text are needed, or how many tokens they took.
    """

    part: str
    make: "Callable[[Job], Made]"
    said: str
    base: str
    routing: bool = False
    statistics: bool = False


@dataclass
class Job:
    """One model, and where its results go."""

    folder: Path
    model: str
    calibrate: list[Path]
    same: Path | None
    other: Path | None
    tokens: int | None
    bits: float
    bits8: float
    recover: int

    @cached_property
    def weights(self) -> Weights:
        """The full-precision model."""
        return open_weights(self.model, verb="bench/accuracy.py")

    @cached_property
    def text(self) -> CalibrationText:
        """What may be learned from."""
        return CalibrationText.of(self.weights, self.calibrate)

    @property
    def linears(self) -> list[TensorSpec]:
        """What the part "linears" is about: neither the table nor routers."""
        uses = {Use.LINEAR, Use.SUMMED}
        return [spec for spec in self.weights.specs.values() if spec.layer is not None and spec.use & uses]

    @property
    def texts(self) -> dict[str, Path | None]:
        """Domain → text that is measured on; None: the bundled held-out text."""
        given = {"same domain": self.same, "other domain": self.other}
        return {name: path for name, path in given.items() if path is not None} or {"held out": None}

    @property
    def has_statistics(self) -> bool:
        """Whether `statistics` has nothing to make."""
        return (self.folder / f"{STATISTICS}.seconds").exists()

    def statistics(self) -> tuple[Statistics, float]:
        """Of the calibration text, and the CPU seconds that they took; made when first asked for."""
        folder, seconds = self.folder / STATISTICS, self.folder / f"{STATISTICS}.seconds"
        if not self.has_statistics:
            began = time.process_time()
            calibrate(self.model, folder, text=self.calibrate, threads=torch.get_num_threads(), force=True, said=print)
            seconds.write_text(str(time.process_time() - began))
        return Statistics.open(folder, self.weights), float(seconds.read_text())

    def recipe(self, name: str, solver: str, *, opened: bool = False, measure: bool = False) -> Path:
        """A named recipe with another solver, or one of the linears alone, `opened` for a budget."""
        if name == "linears":
            what = "choose: [int4_g32, int8_g32, int8]" if opened else "format: int4_g32"
            text = LINEARS.replace("SOLVER", solver).replace("MEASURE", str(measure).lower()).replace("FORMAT", what)
            text = text if opened else re.sub(r", sensitivity: [0-9.]+", "", text)
        else:
            text = (Path(recipes.__file__).parent / "recipes" / f"{name}.yaml").read_text()
            text = re.sub(r"^solver: .*$", f"solver: {solver}", text, flags=re.MULTILINE)
        path = self.folder / f"{name}-{solver}{'-open' if opened else ''}.yaml"
        path.write_text(text)
        return path


def _ours(
    recipe: str, job: Job, *, solver: str = "nearest-mse", bits: str = "", recovered: bool = False, text: bool = False
) -> Made:
    """A quantized checkpoint by `quantize`; `text` where formats are chosen on it."""
    name = "-".join([recipe, solver, *(["recovered"] if recovered else []), *(["text"] if text else [])])
    output, asked = job.folder / "made" / name, job.recipe(recipe, solver)
    budget = f"{getattr(job, bits)}bpw" if bits else None
    return _quantized(job, output, asked, solver=solver, budget=budget, recovered=recovered, text=text)


def _quantized(
    job: Job, output: Path, recipe: Path, *, solver: str, budget: str | None, recovered: bool, text: bool
) -> Made:
    given, seconds = dict[str, Any](), 0.0
    if solver == "gptq" and not (text or recovered):  # with text it gathers its own, behind what was quantized before
        _, seconds = job.statistics()
        given["stats"] = job.folder / STATISTICS
    if text or recovered:
        given |= {"text": job.calibrate, "recover": job.recover if recovered else 0}
    ledger = quantize(job.model, output, recipe=recipe, budget=budget, force=True, said=print, **given)
    stored, count = ledger.predicted_bytes, ledger.parameters
    if ledger.recipe.startswith("linears"):
        names = {spec.name for spec in job.linears}
        own = [entry for entry in ledger.tensors if entry.name in names]
        stored, count = sum(entry.predicted_bytes for entry in own), sum(entry.count for entry in own)
    notes = []
    if recovered and ledger.calibrated is not None and ledger.calibrated.recovered_tokens == 0:
        notes = ["recovery raised KL on held-out calibration text: left out"]
    return Made(output, 8 * stored / count, seconds, notes)


def _as_many_bits(solver: str, zero_bits: int, job: Job) -> Made:
    """Ours, with the bits of linears that zero points of so many bits would take, spent on wider codes."""
    plan = make_plan(job.weights.config, dtypes_of(job.weights), load_recipe(job.recipe("linears", "nearest-mse")))
    own = [entry for entry in plan.tensors if entry.format is not None]
    zeros = sum(entry.rows * entry.padded_columns // 32 for entry in own) * zero_bits // 8
    on_text = solver == "gptq"
    return _quantized(
        job,
        job.folder / "made" / f"linears-{solver}-{zero_bits}",
        job.recipe("linears", solver, opened=True, measure=on_text),
        solver=solver,
        budget=f"{(plan.predicted_bytes + zeros) / 1e6:.6f}MB",
        recovered=False,
        text=on_text,
    )


def _scales(job: Job) -> Made:
    """Scales and kept tensors of `int4-uniform` distilled, every code as it was."""
    uniform = QuantizedCheckpoint.open(_made(job, "int4-uniform"))
    plan = make_plan(job.weights.config, dtypes_of(job.weights), load_recipe("int4-uniform"))
    solved = {entry.name: uniform.quantized(entry.name) for entry in plan.tensors if entry.format is not None}
    learned, _ = job.text.split(JUDGED_TOKENS)
    tensors = recover(job.weights, plan, solved, learned, tokens=job.recover, strength="scales")
    return Made(Planned(job.weights, plan, tensors), plan.bits_per_weight)


def _beside(name: str) -> ModuleType:
    """A module of this folder, when it is needed: -P leaves the folder out, and importing torchao takes seconds."""
    sys.path.append(str(Path(__file__).parent))
    return importlib.import_module(name)


def _torchao(name: str, job: Job, *, calibrated: bool = False) -> Made:
    """A method of torchao, as values of the linears."""
    torchao = _beside("torchao_methods")
    method = getattr(torchao, name)
    if name == "qat":
        learned, judged = job.text.split(JUDGED_TOKENS)
        held_out = judged.windows(max(1, len(judged) // METER_WINDOW), METER_WINDOW)
        made = method(job.weights, learned, held_out, job.recover)
    elif calibrated:
        statistics, _ = job.statistics()
        windows = _windows(job.text, 2_000_000)
        made = method(job.weights, windows[: statistics.manifest.tokens // windows.shape[1]])
    else:
        made = method(job.weights)
    count = sum(spec.count for spec in job.linears)
    return Made(torchao.Replaced(job.weights, made.values), made.bits / count, notes=made.notes)


def _artifact(of: str, target: str, job: Job) -> Made:
    """A program, beside the PyTorch model with its activation format."""
    checkpoint, output = _made(job, of), job.folder / "made" / f"{of}.{target}"
    artifact = export(checkpoint, output, target=target, force=True)
    info = open_model(output).runner.info
    return Made(output, info.bits_per_weight, notes=artifact.notes, twin=checkpoint)


def _made(job: Job, method: str) -> Path:
    """The checkpoint that an earlier method left."""
    stored = job.folder / f"{method}.json"
    if not stored.exists():
        raise SystemExit(f"{method} comes first; it was not made yet")
    return Path(job.folder, json.loads(stored.read_text())["candidate"])


def _methods() -> dict[str, Method]:
    """Every method, in the order in which they are made."""
    four, eight, linears = "int4-uniform", "int8-uniform", "nearest-mse"
    found = {
        four: Method("all", partial(_ours, four), "every matrix int4_g32", four, routing=True),
        eight: Method("all", partial(_ours, eight), "every matrix int8", eight, routing=True),
        "int4": Method("all", partial(_ours, "int4", bits="bits"), "bits by what roles are known to lose", four),
        "int8": Method("all", partial(_ours, "int8", bits="bits8"), "bits by what roles are known to lose", eight),
        "int4-uniform gptq": Method(
            "all", partial(_ours, four, solver="gptq"), "int4-uniform solved by gptq", four, statistics=True
        ),
        "int4-uniform tune": Method(
            "all", partial(_ours, four, solver="tune", text=True), "int4-uniform solved by tune, block by block", four
        ),
        "int4 on text": Method(
            "all", partial(_ours, "int4-best", bits="bits", text=True), "bits by losses on calibration text", four
        ),
        "int4-uniform recover scales": Method("all", _scales, "int4-uniform, scales and kept tensors distilled", four),
        "int4-uniform recover": Method(
            "all", partial(_ours, four, recovered=True), "int4-uniform, codes and scales distilled", four
        ),
        "int4-uniform gptq recover": Method(
            "all",
            partial(_ours, four, solver="gptq", recovered=True),
            "int4-uniform solved by gptq, distilled",
            four,
            statistics=True,
        ),
        "int4 on text recover": Method(
            "all",
            partial(_ours, "int4-best", bits="bits", recovered=True),
            "bits by losses on text, nearest-mse, distilled",
            four,
        ),
        "int4-best": Method(
            "all",
            partial(_ours, "int4-best", solver="gptq", bits="bits", recovered=True),
            "bits by losses on text, gptq, distilled",
            four,
            routing=True,
        ),
        "int8-best": Method(
            "all",
            partial(_ours, "int8-best", solver="gptq", bits="bits8", recovered=True),
            "bits by losses on text, gptq, distilled",
            eight,
            routing=True,
        ),
    }
    for solver in ("nearest", "nearest-mse", "gptq"):
        found[solver] = Method(
            "linears",
            partial(_ours, "linears", solver=solver),
            f"ours, `{solver}`",
            linears,
            statistics=solver == "gptq",
        )
    for solver in ("nearest-mse", "gptq"):
        make = partial(_ours, "linears", solver=solver, recovered=True)
        said = f"ours, `{solver}`, then `recover`"
        found[f"{solver} recover"] = Method("linears", make, said, linears, statistics=solver == "gptq")
    for solver in ("nearest-mse", "gptq"):
        for zero_bits in (4, 16):
            said = f"ours, `{solver}`, int8 where it helps most, in the bits of zero points of {zero_bits} bits"
            make = partial(_as_many_bits, solver, zero_bits)
            name = f"{solver} in zp{zero_bits}'s bits"
            found[name] = Method("linears", make, said, linears, statistics=solver == "gptq")
    for name, said in (
        ("rtn", "round to nearest"),
        ("rtn_zp", "round to nearest, zero points of 4 bits"),
        ("hqq", "HQQ, scales alone"),
        ("hqq_zp", "HQQ, zero points of 16 bits"),
    ):
        found[f"torchao {name}"] = Method("linears", partial(_torchao, name), f"torchao, {said}", linears)
    for name, said in (
        ("awq", "AWQ"),
        ("awq_zp", "AWQ, zero points of 4 bits"),
        ("gptq", "GPTQ"),
        ("gptq_zp", "GPTQ, zero points of 16 bits"),
        ("qat", "QAT"),
    ):
        make = partial(_torchao, name, calibrated=True)
        found[f"torchao {name}"] = Method("linears", make, f"torchao, {said}", linears, statistics=name != "qat")
    for of, target, suffix in (
        ("int4-best", "onnx", ".onnx"),
        ("int4-best", "executorch", ".pte"),
        ("int8-best", "onnx", ".onnx"),
        ("int8-best", "executorch", ".pte"),
    ):
        base = f"{of[:4]}-uniform"
        found[f"{of} {suffix}"] = Method("artifact", partial(_artifact, of, target), f"{of}, lowered", base)
    return found


METHODS = _methods()


def stored_name(method: str) -> str:
    """Of its file."""
    return f"{method}.json"


def make_and_measure(job: Job, name: str) -> None:
    """One method: made, measured on every text, stored."""
    method = METHODS[name]
    if name.startswith("torchao"):
        _beside("torchao_methods")
    began, cpu = time.monotonic(), time.process_time()
    made = method.make(job)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    peak = peak_rss_mb()
    threads = torch.get_num_threads()
    original = open_model(job.model, threads=threads)
    candidates = [open_model(made.candidate, threads=threads)]
    activations = candidates[0].runner.info.activations
    if made.twin is not None:
        runner = TorchRunner.open(made.twin, activations=activations, threads=threads)
        candidates.append(OpenModel(runner, made.twin))
    texts = {}
    for domain, path in job.texts.items():
        passage = held_out_passage([original, *candidates], text=path, tokens=job.tokens, allow_fewer=True)
        whole = (passage.tokens.shape[1] - 1) // WINDOW * WINDOW
        if whole == 0:
            raise SystemExit(f"{passage.name} has fewer than {WINDOW + 1} tokens")
        tokens = passage.tokens[:, : whole + 1]
        scores = score([original.runner, *(candidate.runner for candidate in candidates)], tokens)
        texts[domain] = {
            "text": Path(passage.name).name,
            "sha256": passage.sha256,
            "tokens": whole,
            "original_nll": float(scores[0].nll.mean()),
            **_kept(scores[1]),
        }
        if made.twin is not None:
            texts[domain]["twin"] = _kept(scores[2])
        if method.routing and routers_of(original.runner.model.config):  # type: ignore[attr-defined]
            (shift,) = compare_routing(original.runner, [candidates[0].runner], tokens)  # type: ignore[arg-type, list-item]
            forced = {"chosen": shift.chosen, "gates": shift.gates}
            texts[domain]["forced"] = {what: [of.kl_mean, of.kl_ci95] for what, of in forced.items()}
    result = {
        "method": name,
        "candidate": os.path.relpath(made.candidate, job.folder) if isinstance(made.candidate, Path) else None,
        "bits": made.bits,
        "activations": activations,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_before": made.seconds,
        "peak_mb": peak,
        "notes": list(made.notes),
        "texts": texts,
    }
    _store(job.folder / stored_name(name), result)


def _kept(scores: Scores) -> dict[str, Any]:
    """What is stored of a candidate: KL of every window, loss and agreement."""
    windows = Windows(*scores.kl.shape)
    return {
        "kl": [float(mean) for mean in windows.sums(scores.kl) / windows.counts],
        "nll": float(scores.nll.mean()),
        "agreement": float(scores.agree.mean()),
    }


def _store(path: Path, values: Mapping[str, Any]) -> None:
    with new_file(path, force=True) as partial_path:
        partial_path.write_text(json.dumps(values, indent=1) + "\n")


def _in_a_child(step: str, threads: int) -> bool:
    """This command again, for one method or the statistics; whether it succeeded."""
    child = [sys.executable, "-P", *sys.argv, "--child", step]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(child, env=environment, check=False).returncode == 0


def run(arguments: argparse.Namespace) -> None:
    """The verb `run`: every method that is not there yet, each in a process of its own."""
    folder = arguments.work / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made").mkdir(exist_ok=True)
    same, other = arguments.same, arguments.other
    job = Job(
        folder,
        arguments.model,
        arguments.calibrate,
        same,
        other,
        arguments.tokens,
        arguments.bits,
        arguments.int8_bits,
        arguments.recover,
    )
    if arguments.child is not None:
        torch.set_num_threads(arguments.threads)
        if arguments.child == STATISTICS:
            job.statistics()
        else:
            make_and_measure(job, arguments.child)
        return
    about = {
        "model": Path(arguments.model).name,
        "calibrate": [path.name for path in arguments.calibrate],
        "same": None if same is None else same.name,
        "other": None if other is None else other.name,
        "tokens": arguments.tokens,
        "bits": arguments.bits,
        "int8_bits": arguments.int8_bits,
        "recover": arguments.recover,
        "files": dict(job.weights.origin.files),
        "texts": {path.name: file_sha256(path) for path in [*arguments.calibrate, same, other] if path is not None},
    }
    more = {
        "parameters": job.weights.origin.parameters,
        "threads": arguments.threads,
        "machine": machine(),
        "release": release(),
        "torchao": version("torchao"),
        "calibration_tokens": len(job.text),
    }
    known = folder / "run.json"
    if known.exists():
        before = json.loads(known.read_text())
        if any(before.get(key, value) != value for key, value in about.items()):
            raise SystemExit(f"{folder} holds results of another run; give it other arguments, or another WORK")
    else:
        _store(known, {**about, **more})
    names = [name for name in METHODS if METHODS[name].part != "artifact" or arguments.artifacts]
    if arguments.only:
        unknown = [name for name in arguments.only if name not in METHODS]
        if unknown:
            raise SystemExit(f"unknown methods {unknown}; known: {', '.join(METHODS)}")
        names = [name for name in METHODS if name in arguments.only]
    failed = []
    for name in names:
        if (folder / stored_name(name)).exists():
            print(f"{name}: there already", flush=True)
            continue
        began = time.monotonic()
        needed = [STATISTICS] if METHODS[name].statistics and not job.has_statistics else []
        if not all(_in_a_child(step, arguments.threads) for step in (*needed, name)):
            failed.append(name)
            print(f"{name}: FAILED after {time.monotonic() - began:.0f} s", flush=True)
            continue
        result = json.loads((folder / stored_name(name)).read_text())
        shown = ", ".join(f"{domain} {np.mean(of['kl']):.3e}" for domain, of in result["texts"].items())
        print(f"{name}: {shown}; {result['bits']:.3f} bits, {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


@dataclass
class Results:
    """What WORK holds of one model."""

    name: str
    about: Mapping[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Every result of a folder."""
        about = json.loads((folder / "run.json").read_text())
        paths = {name: folder / stored_name(name) for name in METHODS}
        return cls(folder.name, about, {n: json.loads(p.read_text()) for n, p in paths.items() if p.exists()})

    @property
    def domains(self) -> list[str]:
        """Texts that were measured on."""
        return list(next(iter(self.methods.values()))["texts"])

    def of(self, method: str, domain: str) -> dict[str, Any]:
        """What was measured of a method on a text."""
        values: dict[str, Any] = self.methods[method]["texts"][domain]
        return values

    def kl(self, method: str, domain: str) -> Floats:
        """Mean KL of each window [1, W]; windows are equally long."""
        return np.array([self.of(method, domain)["kl"]])

    def parts(self, part: str) -> list[str]:
        """Methods of a part that are there."""
        return [name for name in self.methods if METHODS[name].part == part]


def mean_of(values: Floats) -> str:
    """A mean with its interval."""
    return f"{values.mean():.2e} {_interval(_windows_of(values).interval(values), '.2e')}"


def ratio_of(values: Floats, to: Floats) -> str:
    """A ratio of two means on the same windows with its interval."""
    if not to.any():
        return "–"
    return f"{values.mean() / to.mean():.3f} {_interval(_windows_of(values).ratio_interval(values, to), '.3f')}"


def difference_of(values: Floats, to: Floats) -> tuple[str, str]:
    """A difference of two means on the same windows with its interval, and on whose side that lies."""
    found = _windows_of(values).interval(values - to)
    side = "**ours**" if found and found.high < 0 else "theirs" if found and found.low > 0 else "open"
    return f"{(values - to).mean():+.2e} {_interval(found, '+.2e')}", side


def _windows_of(values: Floats) -> Windows:
    return Windows(*values.shape, window=1)


def _interval(found: Interval | None, form: str) -> str:
    return "" if found is None else f"[{found.low:{form}}, {found.high:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, the first columns to the left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)] + [""]


def _rows(found: Results, part: str, domain: str) -> list[list[str]]:
    rows = []
    for name in found.parts(part):
        method, result, own = METHODS[name], found.methods[name], found.of(name, domain)
        kl, ratio = found.kl(name, domain), "–"
        if method.base in found.methods:
            ratio = ratio_of(kl, found.kl(method.base, domain))
        seconds = result["cpu_seconds"] + result["seconds_before"]
        rows.append(
            [
                f"`{name}`",
                f"{result['bits']:.3f}",
                mean_of(kl),
                ratio,
                f"{math.exp(own['nll']):.3f}",
                f"{100 * own['agreement']:.2f}",
                f"{seconds:,.0f}",
                f"{result['peak_mb']:,.0f}",
            ]
        )
    return rows


ABOUT = """\
- KL is KL(original ‖ candidate), nats a token, in fp32: one stream with carried state a text, all methods of a model on
  the same tokens. Intervals are 95 %, bootstrap over windows of 256 predicted tokens; of ratios and differences paired.
- *all tensors*: bits count every tensor of the model. *linears alone*: in_proj, x_proj, dt_proj, out_proj, w1, w2 and
  w3 of every layer and expert, and their bits; everything else in full precision on both sides, but that recovery and
  QAT train it.
- Seconds are of the CPU, with statistics where a solver of ours needs them; peak is the resident memory of the process
  that made it, with Python and PyTorch.
- torchao's methods get every linear, of each expert alone, at groups of 32 and 16-bit scales; zero points and AWQ's
  scales of inputs count as bits. What had to be replaced to run them on a CPU is in `bench/torchao_methods.py`. GPTQ
  and AWQ get the windows that `calibrate` read (AWQ at most 32,768 tokens), QAT the tokens and loss of `recover`.
- *English Mamba* has one expert: `mossquant train --preset mamba-5m --steps 1224 --threads 1` on the calibration text,
  5,013,504 tokens of it; its loss was then 3.93 nats a token.
- `int8-best` rounds by `gptq`, as in *tiny, int8-best*; when *English MossNet* and *tiny* were measured it rounded by
  `nearest-mse`.
"""

COUNTERPARTS = {
    "torchao rtn": ("nearest", "nearest-mse", "gptq"),
    "torchao rtn_zp": ("nearest-mse", "nearest-mse in zp4's bits", "gptq in zp4's bits"),
    "torchao hqq": ("nearest-mse", "gptq"),
    "torchao hqq_zp": ("nearest-mse", "nearest-mse in zp16's bits", "gptq in zp16's bits"),
    "torchao awq": ("nearest-mse", "gptq"),
    "torchao awq_zp": ("gptq", "gptq in zp4's bits"),
    "torchao gptq": ("nearest-mse", "gptq"),
    "torchao gptq_zp": ("gptq", "gptq in zp16's bits"),
    "torchao qat": ("nearest-mse recover", "gptq recover"),
}
"""Solvers meet solvers, recovery meets QAT, and zero points what else their bits buy."""

STEPS = (
    ("bits by what roles are known to lose", "int4", "int4-uniform"),
    ("bits by losses on text, in their place", "int4 on text", "int4"),
    ("recovery after that", "int4-best", "int4 on text"),
    ("all of these", "int4-best", "int4-uniform"),
    ("`gptq`, alone", "int4-uniform gptq", "int4-uniform"),
    ("recovery of scales, alone", "int4-uniform recover scales", "int4-uniform"),
    ("recovery, alone", "int4-uniform recover", "int4-uniform"),
    ("`gptq` before recovery", "int4-uniform gptq recover", "int4-uniform recover"),
    ("int8: bits by what roles are known to lose", "int8", "int8-uniform"),
    ("int8: losses on text and recovery", "int8-best", "int8"),
)
"""(what is added, with it, without it)."""


def _model_section(found: Results) -> list[str]:
    about = found.about
    calibration = ", ".join(f"`{name}`" for name in about["calibrate"]) or "the bundled calibration text"
    lines = [
        f"## {found.name}",
        "",
        f"{about['parameters']:,} parameters; calibrated on {calibration} ({about['calibration_tokens']:,} tokens), "
        f"{about['recover']:,} tokens of recovery and QAT. {about['machine']['cpu']}, {about['threads']} "
        f"thread{'s' if about['threads'] > 1 else ''}, PyTorch {about['machine']['torch']}, "
        f"torchao {about['torchao']}, mossquant {about['release']}.",
        "",
        f"    {command(found)}",
        "",
    ]
    missing = [name for name in METHODS if METHODS[name].part != "artifact" and name not in found.methods]
    if missing:
        lines += [f"Not measured: {', '.join(f'`{name}`' for name in missing)}.", ""]
    columns = ["bits a weight", "KL", "of {}", "perplexity", "same top, %", "CPU s", "peak MB"]
    for domain in found.domains:
        first = found.of(next(iter(found.methods)), domain)
        lines += [
            f"### {found.name}, {domain}",
            "",
            f"`{first['text']}`, {first['tokens']:,} predicted tokens, SHA-256 `{first['sha256']}`. Original: "
            f"perplexity {math.exp(first['original_nll']):.3f}.",
            "",
        ]
        head = ["all tensors", *columns]
        head[3] = "of int4- or int8-uniform"
        lines += table(head, _rows(found, "all", domain)) if found.parts("all") else []
        forced = [
            [f"`{name}`", *(_forced(found, name, domain, what) for what in ("chosen", "gates"))]
            for name in found.parts("all")
            if "forced" in found.of(name, domain)
        ]
        if forced:
            lines += table(["KL with the original's", "experts", "experts and gates"], forced)
        added = [
            [what, ratio_of(*_pair(found, a, b, domain)), difference_of(*_pair(found, a, b, domain))[0]]
            for what, a, b in STEPS
            if a in found.methods and b in found.methods
        ]
        if added:
            lines += table(["what it adds", "KL with, of KL without", "difference"], added)
        head = ["linears alone", *columns]
        head[3] = "of `nearest-mse`"
        lines += table(head, _rows(found, "linears", domain)) if found.parts("linears") else []
        pairs = [
            [f"`{theirs}`", f"{found.methods[theirs]['bits']:.2f}", f"`{own}`", f"{found.methods[own]['bits']:.2f}"]
            + list(difference_of(*_pair(found, own, theirs, domain)))
            for theirs, counterparts in COUNTERPARTS.items()
            for own in counterparts
            if theirs in found.methods and own in found.methods
        ]
        if pairs:
            head = ["theirs", "bits", "ours", "bits", "ours less theirs, KL", "on whose side"]
            lines += table(head, pairs, left=len(head))
        programs = [
            [
                f"`{name}`",
                found.methods[name]["activations"],
                mean_of(kl := found.kl(name, domain)),
                ratio_of(kl, np.array([found.of(name, domain)["twin"]["kl"]])),
                f"{math.exp(found.of(name, domain)['nll']):.3f}",
            ]
            for name in found.parts("artifact")
        ]
        if programs:
            lines += table(["artifact", "activations", "KL", "of PyTorch's with these", "perplexity"], programs)
    notes = [f"- `{n}`: {'; '.join(_short(of['notes']))}" for n, of in found.methods.items() if of["notes"]]
    return lines + (["Notes:", "", *notes, ""] if notes else [])


def _short(notes: Sequence[str]) -> list[str]:
    """The first few."""
    return [*notes[:3], *([f"and {len(notes) - 3} more"] if len(notes) > 3 else [])]


def _pair(found: Results, a: str, b: str, domain: str) -> tuple[Floats, Floats]:
    return found.kl(a, domain), found.kl(b, domain)


def _forced(found: Results, name: str, domain: str, what: str) -> str:
    """KL with its interval, and what part of the uniform recipe's free KL it is."""
    (mean, interval), base = found.of(name, domain)["forced"][what], METHODS[name].base
    shown = f"{mean:.2e} {_interval(None if interval is None else Interval(*interval), '.2e')}"
    if base not in found.methods:
        return shown
    return f"{shown}, {mean / np.mean(found.of(base, domain)['kl']):.3f} × `{base}`"


def command(found: Results) -> str:
    """What was run, with the files' names alone."""
    about, parts = found.about, ["python bench/accuracy.py run WORK"]
    parts += [f'"{found.name}"' if " " in found.name else found.name, about["model"]]
    parts += ["--calibrate", *about["calibrate"]] if about["calibrate"] else []
    parts += [f"--{key} {about[key]}" for key in ("same", "other") if about[key]]
    numbers = {key: about[key] for key in ("bits", "int8_bits", "tokens", "recover") if about[key] is not None}
    parts += [f"--{key.replace('_', '-')} {number:.12g}" for key, number in numbers.items()]
    parts += ["--artifacts"] if found.parts("artifact") else []
    return " ".join(parts + [f"--threads {about['threads']}"])


def write(arguments: argparse.Namespace) -> None:
    """The verb `write`: sections of models that WORK doesn't hold stay as they are."""
    results = [Results.read(path.parent) for path in sorted(arguments.work.glob("*/run.json"))]
    results = [found for found in results if found.methods]
    if not results:
        raise SystemExit(f"{arguments.work} holds no results")
    lines = [
        "# Accuracy",
        "",
        "Written by `python bench/accuracy.py write WORK` from what `python bench/accuracy.py run` measured.",
        "",
        *ABOUT.splitlines(),
        "",
    ]
    page = _beside("page")
    _, sections = page.parted(arguments.output.read_text("utf-8") if arguments.output.exists() else "")
    for found in results:
        sections |= page.parted("\n".join(_model_section(found)))[1]
    text = page.joined("\n".join(lines).rstrip(), sections)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


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
    running.add_argument("--bits", type=float, default=4.75, help="budget of the int4 recipes")
    running.add_argument("--int8-bits", type=float, default=8.6, help="budget of the int8 recipes")
    running.add_argument("--tokens", type=int, help="of each text, at most")
    running.add_argument("--recover", type=int, default=1_000_000, help="tokens of recovery and QAT")
    running.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    running.add_argument("--artifacts", action="store_true", help="lower the best recipes too")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--child", help=argparse.SUPPRESS)
    writing = verbs.add_parser("write", help="write the document")
    writing.add_argument("work", type=Path)
    writing.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    {"run": run, "write": write}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
