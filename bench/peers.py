# SPDX-License-Identifier: Apache-2.0
"""Times llama.cpp against libmoss, onnxruntime and XNNPACK on the same weights, in one run.

    python bench/peers.py FOLDER [--llama DIR] [--targets native,executorch-kernels,…] [--artifact int4-native=FILE …]
        [--threads 1,2] [--repeats 9] [--json FILE] [--markdown docs/performance.md]

About an hour the first time, on two idle cores.

FOLDER keeps what is made, and what is there already is used again: a random Mamba (`--preset`; speed does not depend on
the values), our checkpoints of it (`int4-uniform`, `int8-uniform`), their artifacts, and GGUFs of the same weights:

    F16                   as llama.cpp's converter writes it
    Q8_0                  with ssm_dt padded by zeros to whole blocks of 32 columns; llama.cpp would keep it in f16
    Q4_0                  as its quantizer makes it: ssm_dt in f16, the tied table in 6 bits
    Q4_0, 4-bit head      the table in Q4_0 too, and ssm_dt padded

llama.cpp is that of the source package llama-cpp-python, built in `--llama` (FOLDER/llama) by its own CMake: Release,
GGML_NATIVE, all else at its default, nothing but libllama; `--no-amx` leaves AMX out. Before anything is timed, logits
of the GGUF in fp32 must be those of our PyTorch model, and those of every contestant near them.

Each contestant has a process of its own (`peers_worker.py`). They take turns, with a rest before each, because threads
of some spin for a while after their work. A turn: a prompt with the logits of its last position; single steps after
it, each with its logits; the prompt again, with logits of every position. All logits and the state are fp32. The first
turn does not count; ratios are of the same turn. The limit is what as many threads read of a mapping of the very .moss,
before and after the steps of each turn. To the first token: a new process, the file in memory, the runtime loaded,
our checks of the file done before; private memory is what the process then holds beside mapped files, after a prompt.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page import joined, parted
from peers_llama import F32, PACKAGE, VERSION, LlamaCpp, made

import mossquant
from mossquant import export, quantize
from mossquant.checkpoint.checkpoint import Checkpoint, write_checkpoint
from mossquant.checkpoint.locate import Located
from mossquant.errors import InputError
from mossquant.eval.bench import Speed
from mossquant.eval.machine import machine
from mossquant.model.config import MossNetConfig, preset
from mossquant.model.mossnet import MossNet
from mossquant.release import release
from mossquant.targets.child import Child
from mossquant.targets.target import get_target
from mossquant.targets.torch.runner import TorchRunner
from mossquant.targets.trial import passed

PROGRAMS = {"native": "model.moss", "onnx": "model.onnx", "executorch": "model.pte", "executorch-kernels": "model.pte"}
OWN_KERNELS = "-kernels"
"""At the end of a target: with kernels of ours (`export --kernels mossquant`)."""
AGAINST = {"int4": "llama.cpp Q4_0, 4-bit head", "int8": "llama.cpp Q8_0"}
CHECKED = 64
"""Tokens whose logits are compared."""
EQUAL, NEAR = 1e-5, 0.5
"""How far off logits may be from those of our PyTorch model, root mean square of the difference ÷ of the logits: in
fp32, where sums have another order and llama.cpp has polynomials for exp; and of fewer bits, where this only tells
whether it is the same model (another one is off by 1.4)."""
REST_SECONDS = 0.05
KINDS = ("decode", "prefill", "prefill_last")
HEADS = " | ".join(("decode", "prefill, all logits", "prefill, last logits"))


@dataclass(frozen=True)
class Contestant:
    """What takes turns.

    Attributes:
        name: in tables.
        kind: "llama.cpp", or a target's name.
        path: its file.
        against: name of the GGUF that it is compared with.
    """

    name: str
    kind: str
    path: Path
    against: str | None = None


@dataclass(frozen=True)
class Run:
    """What is the same for all contestants."""

    llama: LlamaCpp
    libmoss: Path | None
    prompt: int
    decode: int
    repeats: int
    starts: int


class Process(Child):
    """The process of a contestant; what fails there, fails here."""

    def __init__(self, run: Run, contestant: Contestant, threads: int) -> None:
        # ExecuTorch prints several lines in every process that loads it.
        super().__init__("peers_worker", quiet=contestant.kind == "executorch")
        self._name = contestant.name
        order = {"kind": contestant.kind, "path": str(contestant.path), "threads": threads, "prompt": run.prompt}
        libraries = {"library": str(run.llama.library), "libmoss": str(run.libmoss)}
        self.told({"do": "prepare", "passed": passed(), **order, **libraries})

    def told(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to an order."""
        time.sleep(REST_SECONDS)
        answer = self.ask(order)
        if answer is None:
            raise RuntimeError(f"the process of {self._name} ended with status {self.status}")
        return answer


def make_checkpoint(config: MossNetConfig, folder: Path) -> None:
    """Random weights, as training begins with them."""
    model = MossNet(config)
    model.reset_parameters(0)
    folder.mkdir()
    write_checkpoint(folder, config, lambda spec: model.parameter_of(spec).view(spec.shape), dtype=torch.bfloat16)


def our_contestants(folder: Path, targets: Sequence[str], given: Mapping[str, Path]) -> list[Contestant]:
    """Artifacts of FOLDER/full at int4 and int8 for each target: those given, and the rest made."""
    found = []
    for target in targets:
        for recipe in AGAINST:
            key = f"{recipe}-{target}"
            artifact = given.get(key) or made_artifact(folder, recipe, target)
            program = artifact / PROGRAMS[target] if artifact.is_dir() else artifact
            if not program.is_file():
                raise InputError(f"{program} is not there; give the program or its folder, as {key}=PATH")
            kind, own, _ = target.partition(OWN_KERNELS)
            if kind != "native":  # tried once, here, and not by each process that opens it
                get_target(kind).warm(Located(str(program), program, kind))
            name = f"{program.suffix} {recipe}{', our kernels' if own else ''}"
            found.append(Contestant(name, kind, program, AGAINST[recipe]))
    return found


def made_artifact(folder: Path, recipe: str, target: str) -> Path:
    """FOLDER/RECIPE-TARGET."""

    def lower(path: Path) -> None:
        full, (kind, own, _) = folder / "full", target.partition(OWN_KERNELS)
        checkpoint = made(folder / recipe, lambda path: quantize(full, path, recipe=f"{recipe}-uniform"))
        export(checkpoint, path, target=kind, kernels="mossquant" if own else None)

    return made(folder / f"{recipe}-{target}", lower)


def compared(run: Run, contestants: Sequence[Contestant], full: Path) -> dict[str, float]:
    """How far off logits are from those of our PyTorch model in fp32, as `EQUAL` says.

    Raises:
        InputError: farther than they may be.
    """
    runner = TorchRunner.open(full)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, runner.info.vocab_size, min(CHECKED, run.prompt))
    expected = runner(tokens[None], runner.initial_state(1), logits="all")[0][0]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for contestant in contestants:
            with closing(Process(run, contestant, 1)) as process:
                process.told({"do": "start"})
                process.told({"do": "logits", "tokens": tokens.tolist(), "to": f"{place}/logits.npy"})
            off = np.load(f"{place}/logits.npy") - expected
            found[contestant.name] = float(np.sqrt(np.square(off).mean() / np.square(expected).mean()))
    bounds = {name: EQUAL if name == F32 else NEAR for name in found}
    wrong = [f"{name}: off by {off:.1e}, allowed {bounds[name]:g}" for name, off in found.items() if off > bounds[name]]
    if wrong:
        raise InputError.listing("logits are not those of our model", wrong, f"Give artifacts of {full}.")
    return found


def measured(run: Run, contestants: Sequence[Contestant], threads: int) -> dict[str, Any]:
    """Everything about each contestant with so many threads, by name."""
    starts: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contestants}
    for _ in range(run.starts):
        for contestant in contestants:
            with closing(Process(run, contestant, threads)) as process:
                starts[contestant.name].append(process.told({"do": "start"}))
    turns: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contestants}
    with ExitStack() as stack:
        processes = {c.name: stack.enter_context(closing(Process(run, c, threads))) for c in contestants}
        for process in processes.values():
            process.told({"do": "start"})
        for turn in range(run.repeats + 1):
            for name, process in processes.items():
                seconds = process.told({"do": "turn", "decode": run.decode})
                if turn > 0:
                    turns[name].append(seconds)
            print(f"threads {threads}: turn {turn} of {run.repeats}", file=sys.stderr, flush=True)
    return {c.name: found(run, c, starts[c.name], turns) for c in contestants}


def found(
    run: Run, contestant: Contestant, starts: Sequence[Mapping[str, Any]], turns: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Medians and ranges of a contestant, from its starts and the turns of all."""
    own = turns[contestant.name]
    tokens = {"decode": run.decode, "prefill": run.prompt, "prefill_last": run.prompt}
    read = starts[0]["weight_bytes"] or run.llama.weight_bytes(contestant.path)
    row: dict[str, Any] = {
        **{f"{kind}_tok_s": Speed.of([tokens[kind] / turn[kind] for turn in own]) for kind in KINDS},
        **{name: Speed.of([start[name] for start in starts]) for name in ("start_ms", "private_mb")},
        "bytes_per_token": read,
        "file_bytes": contestant.path.stat().st_size,
    }
    if contestant.kind == "native":
        row["bandwidth_gb_s"] = Speed.of([speed for turn in own for speed in turn["bandwidth"]])
        rates = [(1e-9 * read * run.decode / turn["decode"], sum(turn["bandwidth"]) / 2) for turn in own]
        row["bandwidth_share"] = Speed.of([reached / limit for reached, limit in rates])
    if contestant.against is not None:
        pairs = list(zip(own, turns[contestant.against], strict=True))
        row["against"] = contestant.against
        row["ratios"] = {kind: Speed.of([peer[kind] / us[kind] for us, peer in pairs]) for kind in KINDS}
    return row


def cell(value: Speed | None, digits: int = 0, scale: float = 1) -> str:
    """Median and range."""
    if value is None:
        return "—"
    median, low, high = (f"{scale * x:,.{digits}f}" for x in (value.median, value.min, value.max))
    return f"{median} ({low}–{high})"


def tables(rows: Mapping[str, Any], threads: str) -> list[str]:
    """Speeds, their ratios, and what else a model costs, with so many threads."""
    many = f"{threads} thread{'' if threads == '1' else 's'}"
    lines = [f"| {many}, tokens/s | {HEADS} |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {' | '.join(cell(row[f'{kind}_tok_s']) for kind in KINDS)} |" for name, row in rows.items()]
    lines += ["", f"| {many}, times as fast | as | {HEADS} |", "| --- | --- | ---: | ---: | ---: |"]
    for name, row in rows.items():
        if "against" in row:
            lines.append(f"| {name} | {row['against']} | {' | '.join(cell(row['ratios'][k], 2) for k in KINDS)} |")
    lines += ["", f"| {many} | first token, ms | private, MB | weights a token, MB | limit, GB/s | decode, % of it |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in rows.items():
        costs = f"{cell(row['start_ms'])} | {cell(row['private_mb'], 1)} | {row['bytes_per_token'] / 1e6:,.1f}"
        limit = f"{cell(row.get('bandwidth_gb_s'), 1)} | {cell(row.get('bandwidth_share'), 0, 100)}"
        lines.append(f"| {name} | {costs} | {limit} |")
    return lines


def instructions(system: str) -> str:
    """The widest that both have kernels for, of what llama.cpp says of itself: each has a section of its own."""
    known = {"AVX512_VNNI": "AVX-512 VNNI", "AVX2": "AVX2", "MATMUL_INT8": "i8mm", "DOTPROD": "dotprod"}
    return next((name for flag, name in known.items() if f" {flag} = 1" in system), "no vectors")


def section(report: Mapping[str, Any]) -> str:
    """The section of docs/performance.md."""
    ran, model = report["machine"], report["model"]
    off = ", ".join(f"{name} {value:.1e}" for name, value in report["logits_off"].items())
    text = [
        f"## Against llama.cpp, {instructions(report['system'])}",
        "",
        f"Written by `{report['command']}` with mossquant {release()} on {ran['cpu']}, {ran['cores']} cores. A random "
        f"Mamba of {model['num_hidden_layers']} × {model['hidden_size']}, the same weights for all; a prompt of "
        f"{report['prompt']} tokens, and {report['decode']} steps after it. llama.cpp of {PACKAGE.replace('_', '-')} "
        f"{VERSION}, Release, `GGML_NATIVE=ON`{'' if report['amx'] else ' but AMX'}, OpenMP as by default, pieces of "
        f"512 tokens: `{report['system']}`. "
        f"onnxruntime {ran['onnxruntime']} and executorch {ran['executorch']} are stock. Median and range of "
        f"{report['repeats']} turns, and of {report['starts']} new processes for first token and private memory; "
        "`bench/peers.py` says what each is. Ratios hold for this machine alone.",
        "",
        f"Logits against our PyTorch model in fp32, root mean square of the difference ÷ of the logits: {off}.",
    ]
    for threads, rows in report["threads"].items():
        text += ["", *tables(rows, threads)]
    return "\n".join(text) + "\n"


def write_section(path: Path, text: str) -> None:
    """Put a section in the place of the one with its heading, or at the end."""
    before, sections = parted(path.read_text("utf-8") if path.exists() else "")
    path.write_text(joined(before, sections | parted(text)[1]), encoding="utf-8")


def library_of_ours() -> Path:
    """libmoss, as it is installed with the package."""
    installed = sorted(Path(mossquant.__file__).parent.glob("targets/native/**/libmoss.so"))
    if not installed:
        raise InputError("libmoss.so is not installed with mossquant; give --libmoss FILE")
    return installed[0]


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="of building llama.cpp")
    parser.add_argument(
        "--no-amx", action="store_true", help="build llama.cpp without AMX, where the system refuses it"
    )
    parser.add_argument("--libmoss", type=Path, help="instead of the installed one")
    parser.add_argument("--artifact", action="append", default=[], metavar="RECIPE-TARGET=PATH")
    default = ",".join(name for name in PROGRAMS if not name.endswith(OWN_KERNELS))
    parser.add_argument("--targets", default=default, help=f"those of ours that take part: {', '.join(PROGRAMS)}")
    parser.add_argument("--preset", default="mamba-130m")
    parser.add_argument("--layers", type=int, help="cut the preset to so many")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="page whose section is written anew")
    asked = parser.parse_args()
    asked.targets = [name for name in asked.targets.split(",") if name]
    asked.given = {key: Path(path).absolute() for key, _, path in (word.partition("=") for word in asked.artifact)}
    known = [f"{recipe}-{target}" for target in PROGRAMS for recipe in AGAINST]
    wrong = [f"{name} is no target" for name in asked.targets if name not in PROGRAMS]
    wrong += [f"{key} is none of {', '.join(known)}" for key in asked.given if key not in known]
    if wrong:
        raise InputError.listing("nothing can be timed", wrong, "Give others.")
    return asked


def report_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Make what is missing, check it, and measure."""
    config, folder = preset(asked.preset), asked.folder.absolute()
    config = replace(config, num_hidden_layers=asked.layers or config.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    full = made(folder / "full", lambda path: make_checkpoint(config, path))
    source = Checkpoint.open(full)
    if source.config != config:
        raise InputError(f"{full} is of another shape; give another folder, or remove it")
    libmoss = asked.libmoss or (library_of_ours() if "native" in asked.targets else None)
    llama = LlamaCpp((asked.llama or folder / "llama").absolute(), asked.jobs, amx=not asked.no_amx)
    run = Run(llama, libmoss, asked.prompt, asked.decode, asked.repeats, asked.starts)
    print(f"llama.cpp: {llama.system()}", flush=True)
    ggufs = [Contestant(name, "llama.cpp", path) for name, path in llama.ggufs(source, folder).items()]
    contestants = [*ggufs, *our_contestants(folder, asked.targets, asked.given)]
    return {
        "version": 1,
        "command": f"python bench/peers.py FOLDER --targets {','.join(asked.targets)}"
        + (" --no-amx" if asked.no_amx else "")
        + f" --threads {asked.threads} --repeats {asked.repeats} --starts {asked.starts}",
        "amx": not asked.no_amx,
        "machine": machine(),
        "system": llama.system(),
        "model": config.to_json(torch_dtype="bfloat16"),
        **{name: getattr(run, name) for name in ("prompt", "decode", "repeats", "starts")},
        "logits_off": compared(run, contestants, full),
        "threads": {many: measured(run, contestants[1:], int(many)) for many in asked.threads.split(",")},
    }


def published(
    arguments: Callable[[], argparse.Namespace],
    report_of: Callable[[argparse.Namespace], dict[str, Any]],
    section: Callable[[dict[str, Any]], str],
) -> None:
    """Measure on one thread of PyTorch's, print, and write what `--json` and `--markdown` ask for."""
    torch.set_num_threads(1)
    try:
        asked = arguments()
        report = report_of(asked)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = section(report)
    print(text)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1, default=asdict) + "\n")
    if asked.markdown:
        write_section(asked.markdown, text)


def main() -> None:
    """Measure, print, and write what was asked for."""
    # Python finds the worker there; and no setting of OpenMP but its own reaches llama.cpp.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    published(arguments, report_of, section)


if __name__ == "__main__":
    main()
