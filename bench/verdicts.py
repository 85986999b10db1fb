# SPDX-License-Identifier: Apache-2.0
"""How often `verify` fails right artifacts, and how often it sees planted faults: the figures of docs/evaluation.md.

    python bench/verdicts.py right FOLDER --models 200      right .onnx of random models, at verify's defaults
    python bench/verdicts.py faults FOLDER --models 20      each fault of `faults`, planted in what runs
    python bench/verdicts.py judge FOLDER                   prints the tables of what FOLDER holds
    python bench/verdicts.py simulate FOLDER --models 2000  right streams drawn from the windows of the right artifacts

The models are Mambas of width 64 with one or two layers (every sixth has SSM and MLP experts), at int8-uniform and
int4-uniform, every eighth with fp32 activations. What `mossquant.eval.parity.measure` finds is kept, a file for each
model and fault, so that bounds can be judged again without running: a second call goes on where the first was stopped.
The text is Python's own modules.
"""

import argparse
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

import mossquant.eval.one_step as steps_module
import mossquant.targets.onnx.open as onnx_open
from mossquant import divergence
from mossquant.calibration.quantize import quantize
from mossquant.checkpoint.checkpoint import write_checkpoint
from mossquant.checkpoint.inputs import activation_model
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.eval.one_step import OneStep
from mossquant.eval.parity import Measured, judged, measure
from mossquant.formats.activations import int8_block
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Activation
from mossquant.model.mossnet import MossNet, tensor_specs
from mossquant.runner import Arrays, Floats, LogitsWanted, Runner, State, Tokens
from mossquant.targets.export import export
from mossquant.targets.onnx.runner import OnnxRunner
from mossquant.targets.torch.runner import TorchRunner

DEFAULT, SHORT = (2000, 20_000), (320, 2000)
"""Positions and tokens of the stream: verify's defaults for right artifacts, less than those for faults."""
MATTERS = 1e-6
"""A fault that moves the mean KL of the full-precision pass by less nats is none on that model."""
GROWS, INT8_FOR_FP32, ONE_EXPERT = "an error that grows", "int8 activations for fp32", "one expert's input in fp32"
"""Faults with a way of their own: on verify's whole stream, against fp32 activations, on models with experts."""
WIDTH = MossNetConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, time_step_rank=4)


def config_of(seed: int) -> MossNetConfig:
    """One or two layers, tied or not; every sixth model has experts."""
    config = replace(WIDTH, num_hidden_layers=1 + seed % 2, tie_word_embeddings=bool(seed // 2 % 2))
    if seed % 6:
        return config
    ssm, mlp = (int(count) for count in np.random.default_rng(seed).integers(2, 5, 2))
    return replace(
        config,
        num_ssm_experts=ssm,
        num_ssm_experts_per_tok=2,
        num_mlp_experts=mlp,
        num_mlp_experts_per_tok=2,
        mlp_intermediate_size=96,
    )


def make(seed: int, folder: Path, *, lively: bool) -> tuple[MossNetConfig, str]:
    """Write a random model, its quantization and its .onnx; returns its config and its activations.

    `lively` has smaller embeddings: the others are, as random ones from outside, often sure of one token whatever the
    state is (a perplexity of 1e14), and hardly any fault changes what they predict.
    """
    config = config_of(seed)
    model, noise = MossNet(config), torch.Generator().manual_seed(seed + 1)
    model.reset_parameters(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            if seed % 6 == 0 or lively:
                parameter.add_((0.8 if name.endswith("router") else 0.2) * drawn)
            elif name in ("embeddings", "lm_head"):
                parameter.copy_(0.6 * drawn)
            elif name.endswith("proj"):
                parameter.copy_(0.08 * drawn)
    tensors = {spec.name: model.parameter_of(spec).detach() for spec in tensor_specs(config)}
    (folder / "model").mkdir()
    write_checkpoint(folder / "model", config, lambda spec: tensors[spec.name], dtype=torch.float32)
    quantize(folder / "model", folder / "quantized", recipe=("int8-uniform", "int4-uniform")[seed // 4 % 2])
    activations = "fp32" if seed % 8 == 7 else "planned"
    export(folder / "quantized", folder / "onnx", activations="fp32" if activations == "fp32" else None)
    return config, activations


def text(seed: int, length: int) -> Tokens:
    """Bytes of 24 modules, other ones for each seed: tokens [length]."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"".join(path.read_bytes() for path in modules[seed % 40 * 4 :][:24])
    return np.resize(np.frombuffer(data, np.uint8), length).astype(np.int64)


class Wrapped:
    """Another Runner with something done to it."""

    def __init__(self, inner: Runner) -> None:
        self.inner, self.info, self.initial_state = inner, inner.info, inner.initial_state
        self.copy, self.read = inner.copy, inner.read

    def write(self, arrays: Arrays) -> State:
        return self.inner.write(arrays)

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        return self.inner(tokens, state, logits=logits)


class Seam(Wrapped):
    """Loses the state between the pieces of a call."""

    def __init__(self, inner: Runner, piece: int) -> None:
        super().__init__(inner)
        self.piece = piece

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        parts = []
        for start in range(0, tokens.shape[1], self.piece):
            if start:
                state = self.inner.initial_state(tokens.shape[0])
            part, state = self.inner(tokens[:, start : start + self.piece], state, logits=logits)
            parts.append(part)
        return (np.concatenate(parts, 1) if logits == "all" else parts[-1]), state


class HalfState(Wrapped):
    """Rounds its state to fp16 at each call."""

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        found, state = self.inner(tokens, state, logits=logits)
        arrays = self.inner.read(state)
        return found, self.inner.write(
            {name: value.astype(np.float16).astype(np.float32) for name, value in arrays.items()}
        )


class Forgetful(Wrapped):
    """Does not carry its state from call to call."""

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        return self.inner(tokens, state, logits=logits)[0], self.inner.initial_state(tokens.shape[0])


class NotWritten(Wrapped):
    """Writes zeros into one state array."""

    def __init__(self, inner: Runner, array: str) -> None:
        super().__init__(inner)
        self.array = array

    def write(self, arrays: Arrays) -> State:
        return self.inner.write({**arrays, self.array: np.zeros_like(arrays[self.array])})


class Growing(Wrapped):
    """Is the further off the longer it has run: 1e-5 a token, in one direction of the logits."""

    def __call__(self, tokens: Tokens, state: State, *, logits: LogitsWanted = "last") -> tuple[Floats, State]:
        age = state.position + np.arange(tokens.shape[1])[:, None]
        found, state = self.inner(tokens, state, logits=logits)
        error = 1e-5 * age * np.random.default_rng(0).standard_normal(found.shape[-1])
        return (found + error[-found.shape[1] :]).astype(np.float32), state


def _scale_of_128(x: torch.Tensor, block: int) -> torch.Tensor:
    parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 128
    return (torch.round(parts / scale).clamp(-127, 127) * scale).flatten(-2)[..., : x.shape[-1]]


def faults(seed: int, config: MossNetConfig, folder: Path, activations: str) -> Iterator[tuple[str, Runner, Runner]]:
    """(name, what runs with the fault, the same fault in an exact pass where it can be planted there)."""
    source, draw = QuantizedCheckpoint.open(folder / "quantized"), np.random.default_rng(1000 + seed)
    quantized = [s for s in tensor_specs(config) if s.site is not None and source.format(s.name) is not None]

    def opened(kind: str, dtype: torch.dtype) -> TorchRunner:
        return TorchRunner.open(source, activations=kind, dtype=dtype)

    ways = [(activations, torch.float32), ("fp32", torch.float64)]
    piece = int(draw.choice([64, 128, 256, 512]))
    state = str(draw.choice(sorted(opened("fp32", torch.float32).read(opened("fp32", torch.float32).initial_state(1)))))
    linears = [s for s in quantized if "embeddings" not in s.name and "lm_head" not in s.name]
    role = str(draw.choice(sorted({s.role for s in linears})))
    spec = linears[int(draw.choice([i for i, s in enumerate(linears) if s.role == role]))]
    row = int(draw.integers(spec.shape[0]))
    onnx, exact = OnnxRunner(folder / "onnx", threads=1), opened("fp32", torch.float64)
    yield "state lost at a chunk's seam", Seam(onnx, piece), Seam(exact, piece)
    scaled = [opened(*way) for way in ways]
    for runner in scaled:
        runner.model.parameter_of(spec).view(spec.shape)[row] *= 1.02
    yield "one row's scale × 1.02", *scaled
    larger = [opened(*way) for way in ways]
    for runner in larger:
        changed = replace(config, rms_norm_eps=10 * config.rms_norm_eps)
        for module in (runner.model, *runner.model.blocks):
            module.config = changed
    yield "eps × 10", *larger
    yield "state in fp16 at each call", HalfState(onnx), onnx
    yield "state not carried", Forgetful(onnx), onnx
    yield "a state array not written", NotWritten(onnx, state), onnx
    yield GROWS, Growing(opened(activations, torch.float32)), onnx
    if activations == "fp32":
        return
    planned, plain = activation_model(source), opened("fp32", torch.float32)
    formats = {s.name: source.format(s.name) for s in quantized}
    site = str(draw.choice(sorted({str(s.site) for s in quantized})))
    models: dict[str, Activation] = {
        "blocks of 16": lambda name, x: int8_block(x, 16) if name in formats else planned(name, x),
        "scale max ÷ 128": lambda name, x: (
            _scale_of_128(x, formats[name].activation_block) if name in formats else planned(name, x)
        ),
        "one site in fp32": lambda name, x: x if source.specs[name].site == site else planned(name, x),
        "every site in fp32": lambda name, x: x,
    }
    experts = sorted(name for name in formats if ".experts." in name)
    if experts:
        expert = str(draw.choice(experts))
        models[ONE_EXPERT] = lambda name, x: x if name == expert else planned(name, x)
    for name, model in models.items():
        yield name, plain.with_activation(model, name=name), onnx
    yield INT8_FOR_FP32, onnx, onnx


def moved(faulty: Runner, exact: Runner, tokens: Tokens) -> float:
    """Mean KL, nats, that a fault causes in an exact pass over tokens [T] in one call: longer than any seam."""
    found = [runner(tokens[None], runner.initial_state(1), logits="all")[0] for runner in (exact, faulty)]
    return float(divergence.kl(*map(divergence.Predictions, found)).mean())


def kept(path: Path, measured: Measured) -> None:
    """Write one measurement."""
    arrays = {f"steps.{name}": value for name, value in measured.steps._asdict().items()}
    arrays |= {f"forms.{name}": value for name, value in measured.forms.items()}
    rest = measured._asdict() | {"steps": None, "forms": None}
    arrays |= {name: np.asarray(value) for name, value in rest.items() if value is not None}
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    part.rename(path)


def read(path: Path) -> Measured:
    """A measurement that `kept` wrote."""
    with np.load(path) as stored:
        own: dict[str, NDArray[np.float64]] = dict(stored)
    steps = OneStep(*(own[f"steps.{name}"] for name in OneStep._fields))
    forms = {name.removeprefix("forms."): value for name, value in own.items() if name.startswith("forms.")}
    free = (own.get(name) for name in ("rise", "kl", "rounding", "rounding_rise", "cost"))
    return Measured(steps, *free, forms, float(own["parted"]))  # type: ignore[arg-type]


def collect(folder: Path, what: str, models: int) -> None:
    """Measure models until there are so many; a fault that changes nothing on a model leaves a file without a run."""
    folder.mkdir(exist_ok=True)
    # Every sixth model has experts: their own fault is planted in as many.
    only_experts = range(models + -models % 6, 6 * models, 6) if what == "faults" else ()
    for seed in (*range(models), *only_experts):
        if (folder / f"{what}-{seed}.done").exists():
            continue
        with tempfile.TemporaryDirectory() as made:
            config, activations = make(seed, Path(made), lively=what == "faults")
            reference = TorchRunner.open(Path(made) / "quantized", activations=activations, dtype=torch.float64)
            plain = None if activations == "fp32" else TorchRunner.open(Path(made) / "quantized")
            exact = TorchRunner.open(Path(made) / "quantized", dtype=torch.float64)
            tokens = text(seed, DEFAULT[1] + 1)
            if what == "right":
                artifact = OnnxRunner(Path(made) / "onnx", threads=1)
                found = measure(reference, artifact, tokens, positions=DEFAULT[0], unquantized_activations=plain)
                kept(folder / f"right-{seed}.npz", found)
            else:
                for name, artifact, twin in faults(seed, config, Path(made), activations):
                    path = folder / f"fault-{seed}-{name}.npz"
                    if path.exists() or (seed >= models and name != ONE_EXPERT):
                        continue
                    if isinstance(twin, TorchRunner | Seam) and moved(twin, exact, tokens[:1200]) < MATTERS:
                        print(f"{seed}: {name} changes nothing", flush=True)
                        continue
                    held, unquantized = (exact, None) if name == INT8_FOR_FP32 else (reference, plain)
                    length = DEFAULT[1] if name == GROWS else SHORT[1]
                    # A few repetitions show that rounding does not explain a fault.
                    with mock.patch.object(steps_module, "EXPLAINED_AT_MOST", 20):
                        found = measure(
                            held,
                            artifact,
                            tokens[: length + 1],
                            positions=SHORT[0],
                            unquantized_activations=unquantized,
                        )
                    kept(path, found)
        if seed < models:  # beyond, one fault alone was planted
            (folder / f"{what}-{seed}.done").touch()
        print(f"{what} {seed}", flush=True)


def judge(folder: Path) -> None:
    """Print what failed of the right artifacts, and how often each fault was seen, and by which check."""
    right = sorted(folder.glob("right-*.npz"))
    failed = {path.stem: [check for check in judged(read(path)) if not check.passed] for path in right}
    for name, checks in failed.items():
        for check in checks:
            print(f"{name}: {check.name}: {check.value:.3g}, at most {check.bound:.3g}")
    print(f"right artifacts that failed: {sum(map(bool, failed.values()))} of {len(right)}\n")
    print("| fault | seen | by |\n| --- | --- | --- |")
    by_fault: dict[str, list[set[str]]] = {}
    for path in sorted(folder.glob("fault-*.npz")):
        seen = {check.name for check in judged(read(path)) if not check.passed}
        by_fault.setdefault(path.stem.split("-", 2)[2], []).append(seen)
    for name, found in by_fault.items():
        counts = {check: sum(check in seen for seen in found) for check in set().union(*found)}
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        most = ", ".join(f"{check} ({count})" for check, count in ranked[:3])
        print(f"| {name} | {sum(map(bool, found))} of {len(found)} | {most} |")


def simulate(folder: Path, runs: int) -> None:
    """Print how many streams fail that are drawn, window by window, from what other rounding did to the references.

    The artifact is such a draw and the rounding that it is held against another: neither is a fault.
    """
    stored = [found for path in sorted(folder.glob("right-*.npz")) if (found := read(path)).cost is not None]
    draw, failed = np.random.default_rng(0), {"any": 0}
    for run in range(runs):
        found, count = stored[run % len(stored)], (78, 20)[run // len(stored) % 2]

        def resampled(values: NDArray[np.float64], windows: NDArray[np.int64]) -> NDArray[np.float64]:
            whole = values[:, : values.shape[1] // 256 * 256].reshape(-1, 256)
            return whole[windows].reshape(1, -1)

        own, other, cost = (draw.integers(0, found.kl.shape[1] // 256, count) for _ in range(3))
        checks = judged(
            found._replace(
                kl=resampled(found.rounding, own),
                rise=resampled(found.rounding_rise, own),
                rounding=resampled(found.rounding, other),
                rounding_rise=resampled(found.rounding_rise, other),
                cost=resampled(found.cost, cost),
            )
        )
        for name in {check.name for check in checks if not check.passed}:
            failed[name] = failed.get(name, 0) + 1
        failed["any"] += any(not check.passed for check in checks)
    print(f"of {runs} drawn streams failed: {failed}")


def main() -> None:
    """Measure or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("right", "faults", "judge", "simulate"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "judge":
        judge(given.folder)
        return
    if given.what == "simulate":
        simulate(given.folder, given.models)
        return
    # These programs were made here; trying each in a child process takes longer than measuring it.
    with mock.patch.object(onnx_open, "try_apart"):
        collect(given.folder, given.what, given.models)


if __name__ == "__main__":
    main()
