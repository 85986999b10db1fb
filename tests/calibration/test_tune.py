# SPDX-License-Identifier: Apache-2.0
"""`tune` lowers the error of its blocks on text that it did not see; the walk shows it what quantized blocks make."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path

import bounds
import numpy as np
import pytest
import torch
from commands import refused
from small import CONFIGS, difference, random_model, write_model
from solved import Solved, random_text, solved
from torch import Tensor

from mossquant.calibration.nearest import NEAREST_MSE
from mossquant.calibration.quantize import quantize
from mossquant.calibration.solver import BlockSolved, BlockSolver, BlockTask, Solver, Statistics
from mossquant.calibration.statistics import Hessian
from mossquant.calibration.student import Planned, Stored
from mossquant.calibration.tune import OFFSET, Rates, _Tuning, tune
from mossquant.calibration.walk import Walk
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.checkpoint.weights import View, Weights, value
from mossquant.errors import InputError
from mossquant.formats import FORMATS, NumberFormat, QuantizedTensor
from mossquant.model.block import Block, rms_norm
from mossquant.model.blocks import blocks_of
from mossquant.model.forward import Forward
from mossquant.plan.plan import Ledger
from mossquant.text.text import Text

FEW = Rates(steps=16, batch=6, codes=1e-2, small=1e-2, scales=2e-3, judged=4)
ONE_LAYER = replace(CONFIGS["experts"], num_hidden_layers=1)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps are enough here."""
    monkeypatch.setattr("mossquant.calibration.tune.RATES", FEW)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    """A small model with experts of both kinds at 4 bits."""
    return solved(tmp_path_factory.mktemp("experts") / "model", CONFIGS["experts"])


def loaded(case: Solved, number: int, weights: Weights, dtype: torch.dtype = torch.float32) -> Block:
    """The block of that number."""
    layer, kind = list(blocks_of(case.weights.config))[number]
    block = kind(case.weights.config, layer).to(dtype)
    block.load(lambda name: value(weights, name))
    return block.requires_grad_(False)


def passed(block: Block, x: Tensor) -> Tensor:
    """The residual stream after the block, by the loop over tokens."""
    state = {spec.name: spec.zeros(len(x), dtype=x.dtype) for spec in block.states(block.config, block.layer)}
    return block.added(x, state, Forward(scan="sequential"))[0]


def streams(windows: int, width: int, *, seed: int, time: int = 8) -> Tensor:
    """Residual streams that lie near few directions, as real ones do: [W, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(windows, time, 4, generator=generator)
    noise = 0.2 * torch.randn(windows, time, width, generator=generator)
    return latent @ torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + noise


def task_of(case: Solved, number: int, *, windows: int = 48) -> BlockTask:
    """A block on random inputs, with its own output in full precision as the target."""
    block = loaded(case, number, case.weights)
    inputs = streams(windows, block.config.hidden_size, seed=number)
    names = [spec.name for spec in block.specs(block.config, block.layer)]
    start = {name: case.tensors[name] for name in names if name in case.tensors}
    held_out = torch.arange(windows) % 3 == 1
    targets = passed(block, inputs)
    return BlockTask(case.weights, case.plan, block, start, frozenset(start), inputs, targets, held_out)


def slow_error(case: Solved, number: int, tensors: dict[str, Stored], x: Tensor, y: Tensor, size: Tensor) -> float:
    """Mean (x + block(x; ŵ) − y)², relative to `size`, in float64."""
    block = loaded(case, number, Planned(case.weights, case.plan, tensors), torch.float64)
    return float((passed(block, x.double()) - y.double()).square().mean() / size)


@pytest.mark.parametrize("config", CONFIGS)
def test_it_lowers_the_error_of_every_block(config: str, tmp_path: Path) -> None:
    """On windows that it judged on, and on others."""
    layers = 2 if config == "pruned" else 1
    case = solved(tmp_path / "model", replace(CONFIGS[config], num_hidden_layers=layers))
    for number in range(len(list(blocks_of(case.weights.config)))):
        task = task_of(case, number)
        found = tune(task, FEW)
        assert found.tensors.keys() == task.solved
        size = (task.targets - task.inputs).double().square().mean()
        held = task.held_out
        for tensors, said in ((task.start, found.before), (found.tensors, found.after)):
            exact = slow_error(case, number, dict(tensors), task.inputs[held], task.targets[held], size)
            assert said == pytest.approx(exact, rel=bounds.BLOCK_ERROR_FLOAT32)
        assert found.after < 0.85 * found.before, (number, task.block.kind)
        x = streams(8, task.inputs.shape[2], seed=99)
        y = passed(task.block, x)
        new = [slow_error(case, number, dict(of), x, y, size) for of in (task.start, found.tensors)]
        assert new[1] < 0.95 * new[0], (number, task.block.kind)


def slow_value(u: Tensor, r: Tensor, start: QuantizedTensor) -> Tensor:
    """round(u) · s₀ · e^r as stored, straight through both roundings, by PyTorch's own operations."""
    exact = start.scales.float() * r.exp()
    scale = exact * (exact.detach().to(start.format.scale_dtype).float() / exact.detach())
    code = u + (u.round() - u).detach()
    return (code * scale.unsqueeze(-1)).flatten(1)[:, : start.columns]


@pytest.mark.parametrize("number", [0, 1])
def test_steps_are_those_of_a_slow_form(experts: Solved, number: int) -> None:
    """Every expert apart, the scan token by token, Adam written out: losses and roundings of each step."""
    task, steps, specs = task_of(experts, number), 6, experts.weights.specs
    tuning = _Tuning(task, FEW)
    exact = {name: specs[name].to_matrix(experts.weights.kept(name)).float() for name in task.start}
    u = {
        name: (one.format.grouped(exact[name]) / one.scales.float().unsqueeze(-1)).clamp(
            (codes := one.codes.float().view(*one.scales.shape, -1)) - 0.499, codes + 0.499
        )
        for name, one in task.start.items()
    }
    r = {name: torch.zeros(one.scales.shape) for name, one in task.start.items()}
    first = {name: one.clone() for name, one in u.items()}
    moments = {(kind, name): [torch.zeros_like(of[name])] * 2 for kind, of in (("u", u), ("r", r)) for name in u}
    size = float((task.targets - task.inputs).square().mean())
    block, state = task.block, {spec.name: spec.zeros(4) for spec in task.block.states(task.block.config, 0)}
    for step in range(steps):
        windows, share = torch.arange(4) + 4 * step, 1 - step / steps
        for one in (*u.values(), *r.values()):
            one.requires_grad_()
        made = {name: specs[name].from_matrix(slow_value(u[name], r[name], task.start[name])) for name in u}
        run = Forward(scan="sequential", weight=lambda name, kept, made=made: made.get(name, kept))  # type: ignore[misc]
        out = block.added(task.inputs[windows], state, run)[0]
        loss = (out - task.targets[windows]).square().mean() / size
        loss.backward()  # type: ignore[no-untyped-call]
        assert tuning.step(windows, share=share) == pytest.approx(loss.item(), rel=bounds.BLOCK_ERROR_FLOAT32)
        for kind, of in (("u", u), ("r", r)):
            for name, one in of.items():
                rate = (FEW.codes if kind == "u" else FEW.scales) * share
                grad = torch.zeros_like(one) if one.grad is None else one.grad
                mean, square = moments[kind, name]
                mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad.square()
                moments[kind, name] = [mean, square]
                unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.95 ** (step + 1))
                moved = one.detach() - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-15)
                if kind == "u":
                    low, high = task.start[name].format.code_min, task.start[name].format.code_max
                    moved = moved.clamp(first[name] - OFFSET, first[name] + OFFSET).clamp(low - 0.499, high + 0.499)
                of[name] = moved
    found = tuning.tensors()
    assert any(not torch.equal(found[name].codes, task.start[name].codes) for name in u)
    for name, one in found.items():
        off = (one.codes.float() - u[name].round().flatten(1)).abs()
        assert float(off.max()) <= 1
        assert float(off.mean()) <= bounds.STEP_TIES
        scales = task.start[name].scales.float() * r[name].exp()
        assert difference(one.scales.float() / scales, torch.ones_like(scales)) < bounds.BFLOAT16_STEP


def test_roundings_of_one_row_against_all_of_them(tmp_path: Path) -> None:
    """A matrix of one row and four columns, alone: of its 16 roundings up or down it finds the best 8 times of 10."""
    config = replace(CONFIGS["experts"], hidden_size=4, num_mlp_experts=1, mlp_intermediate_size=1)
    case, better = solved(tmp_path / "model", config), 0
    apart: list[float] = []
    name = "backbone.layers.0.mlp.experts.0.w1.weight"
    entries = [replace(e, format="int4_g32", kept=None) if e.name == name else e for e in case.plan.tensors]
    plan = replace(case.plan, tensors=tuple(entries))
    for seed in range(10):
        matrix = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        weights = Changed(case.weights, name, matrix)
        started = NEAREST_MSE.prepare(FORMATS["int4_g32"], {})(matrix)
        own = replace(case, plan=plan, weights=weights, tensors=case.tensors | {name: started})
        task = replace(task_of(own, 1, windows=12), solved=frozenset([name]), held_out=torch.arange(12) >= 6)
        task.inputs.mul_(0.3).add_(torch.tensor([1.0, 1.0, -1.0, 1.0]))
        task.inputs[6:] = task.inputs[:6]  # what is judged on is what is learned from
        task = replace(task, targets=passed(task.block, task.inputs))
        found = tune(task, replace(FEW, steps=40, codes=4e-2, judged=20, scales=0.0))
        x, y = (of[task.held_out] for of in (task.inputs, task.targets))
        size = (task.targets - task.inputs).double().square().mean()
        scale = float(started.scales)
        errors = []
        for ups in product((0, 1), repeat=4):
            codes = torch.zeros_like(started.codes)
            codes[0, :4] = ((matrix / scale).floor() + torch.tensor(ups)).clamp(-8, 7)
            tensors = task.start | {name: replace(started, codes=codes)}
            errors.append(slow_error(own, 1, dict(tensors), x, y, size))
        assert torch.equal(found.tensors[name].scales, started.scales)
        assert found.after <= found.before
        apart.append(found.after / min(errors))
        better += found.after < found.before
    assert sum(ratio < 1 + bounds.BLOCK_ERROR_FLOAT32 for ratio in apart) >= 8
    assert better > 0


class Changed(View):
    """Weights of which one tensor is another."""

    def __init__(self, weights: Weights, name: str, tensor: Tensor) -> None:
        super().__init__(weights)
        self._name, self._tensor = name, tensor

    def kept(self, name: str) -> Tensor:
        return self._tensor if name == self._name else super().kept(name)


def ids(folder: Path, tokens: list[int]) -> Text:
    np.save(folder / "ids.npy", np.array(tokens))
    return Text.from_ids(folder / "ids.npy")


def recipe(folder: Path, solver: str = "tune") -> Path:
    """`int4-uniform` by another solver."""
    named = files("mossquant.plan") / "recipes" / "int4-uniform.yaml"
    path = folder / f"{solver}.yaml"
    path.write_text(named.read_text().replace("solver: nearest-mse", f"solver: {solver}"))
    return path


def notes(ledger: Ledger) -> dict[str, str | None]:
    return {entry.name: entry.note for entry in ledger.tensors if entry.solver == "tune"}


def test_whole_models(tmp_path: Path) -> None:
    """From text to bytes: everything named, the same bytes again."""
    source = write_model(tmp_path / "model", random_model(ONE_LAYER, dtype=torch.float32))
    text, lines = [ids(tmp_path, random_text(53, 400).tokens.tolist())], list[str]()
    ledger = quantize(source, tmp_path / "out", recipe=recipe(tmp_path), text=text, said=lines.append)
    assert "MB of memory" in lines[0]
    said = notes(ledger)
    assert (said["backbone.embeddings.weight"] or "").startswith("outside the blocks: gptq")
    quantize(source, tmp_path / "again", recipe=recipe(tmp_path), text=text)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / of).iterdir()}
        for of in ("out", "again")
    ]
    assert digests[0] == digests[1]


def test_what_text_lacks_is_in_the_ledger(tmp_path: Path) -> None:
    """One token again and again starves experts; one alone leaves nothing to judge on."""
    source = write_model(tmp_path / "model", random_model(ONE_LAYER, dtype=torch.float32))
    quantize(source, tmp_path / "start", recipe="int4-uniform")
    ledger = quantize(source, tmp_path / "out", recipe=recipe(tmp_path), text=[ids(tmp_path, [7] * 64)])
    starved = {name for name, note in notes(ledger).items() if "no calibration text reached it" in (note or "")}
    assert len({name.partition(".experts.")[0] for name in starved}) >= 2
    before, after = (QuantizedCheckpoint.open(tmp_path / of) for of in ("start", "out"))
    for name in starved:
        assert torch.equal(before.quantized(name).codes, after.quantized(name).codes)
        assert torch.equal(before.quantized(name).scales, after.quantized(name).scales)
    assert all(math.isfinite(entry.relative_error or 0.0) for entry in ledger.tensors)
    one, start = (
        quantize(source, tmp_path / solver, recipe=recipe(tmp_path, solver), text=[ids(tmp_path, [7])])
        for solver in ("tune", "gptq")
    )
    alone = {name: note for name, note in notes(one).items() if name.startswith("backbone.layers")}
    reasons = ("nothing was held out to judge on: as gptq left it", "no calibration text reached it")
    assert all(note is not None and any(reason in note for reason in reasons) for note in alone.values())
    assert [entry.relative_error for entry in one.tensors] == [entry.relative_error for entry in start.tensors]


def test_what_is_not_asked_for_stays(experts: Solved) -> None:
    """Of two solvers in a block, `tune` moves its own tensors, and the others as little as kept ones."""
    task = task_of(experts, 1)
    mine = frozenset(name for name in task.start if ".experts.1." in name or name.endswith("2.w2.weight"))
    found = tune(replace(task, solved=mine), FEW)
    assert found.tensors.keys() == mine
    assert found.after < found.before
    size = (task.targets - task.inputs).double().square().mean()
    x, y = (of[task.held_out] for of in (task.inputs, task.targets))
    exact = slow_error(experts, 1, task.start | found.tensors, x, y, size)
    assert found.after == pytest.approx(exact, rel=bounds.BLOCK_ERROR_FLOAT32)


def seen_by(case: Solved, change: Callable[[BlockTask], dict[str, QuantizedTensor]]) -> tuple[list[BlockTask], Walk]:
    """What a block solver is shown, block by block, when it leaves behind what `change` makes."""
    tasks: list[BlockTask] = []

    def solve(task: BlockTask) -> BlockSolved:
        tasks.append(replace(task, inputs=task.inputs.clone(), targets=task.targets.clone()))
        return BlockSolved(change(task), {}, 0.0, 0.0)

    entries = tuple(replace(e, solver=None if e.solver is None else "seen") for e in case.plan.tensors)
    solvers = {"seen": BlockSolver("seen", NEAREST_MSE, solve)}
    walk = Walk(case.weights, replace(case.plan, tensors=entries), solvers, random_text(53, 300))
    walk.run(said=lambda line: None)
    return tasks, walk


@pytest.mark.parametrize("config", ["experts", "untied"])
def test_inputs_are_those_of_the_quantized_prefix(config: str, tmp_path: Path) -> None:
    """And targets those of full precision; a fault in the first block reaches the inputs of the next."""
    case = solved(tmp_path / "model", CONFIGS[config])
    tasks, walk = seen_by(case, lambda task: {name: task.start[name] for name in task.solved})
    stored = Planned(case.weights, case.plan, case.tensors)
    for weights, streams in ((stored, [t.inputs for t in tasks]), (case.weights, [t.targets for t in tasks])):
        x = value(weights, "backbone.embeddings.weight").double()[walk.windows]
        for number, stream in enumerate(streams):
            block = loaded(case, number, weights, torch.float64)
            expected, x = (x, passed(block, x)) if weights is stored else (passed(block, x),) * 2
            assert difference(stream, expected) < bounds.FORMS_FLOAT32 * float(expected.abs().max())

    def faulty(task: BlockTask) -> dict[str, QuantizedTensor]:
        zero = {name: replace(task.start[name], codes=0 * task.start[name].codes) for name in task.solved}
        return zero if len(zero) and task.block.layer == 0 and task.block.kind == "ssm" else dict(task.start)

    wrong, _ = seen_by(case, faulty)
    assert torch.equal(wrong[0].inputs, tasks[0].inputs)
    for right, other in zip(tasks[1:], wrong[1:], strict=True):
        assert difference(right.inputs, other.inputs) > bounds.PLANTED_FAULT
        assert torch.equal(right.targets, other.targets)


@pytest.mark.parametrize("config", ["experts", "pruned", "untied"])
def test_moments_are_those_of_the_quantized_prefix(config: str, tmp_path: Path) -> None:
    """What `gptq` is given without statistics; a tied table sees what enters the head at the end."""
    case, known = solved(tmp_path / "model", CONFIGS[config]), list[Statistics]()

    def prepare(number_format: NumberFormat, statistics: Statistics) -> Callable[[Tensor], QuantizedTensor]:
        known.append(statistics)
        return NEAREST_MSE.prepare(number_format, {})

    entries = tuple(replace(e, solver=None if e.solver is None else "seen") for e in case.plan.tensors)
    plan = replace(case.plan, tensors=entries)
    walk = Walk(case.weights, plan, {"seen": Solver("seen", ("hessian", "rows"), prepare)}, random_text(53, 300))
    walk.run(said=lambda line: None)
    names = [e.name for e in plan.tensors if e.solver and case.weights.specs[e.name].layer is not None]
    names += [e.name for e in plan.tensors if e.solver and case.weights.specs[e.name].layer is None]
    of = dict(zip(names, known, strict=True))
    stored = Planned(case.weights, case.plan, case.tensors)
    x = value(stored, "backbone.embeddings.weight").double()[walk.windows]
    learned = torch.arange(len(x)) % 8 != 1
    for number in range(len(list(blocks_of(case.weights.config)))):
        seen: dict[str, Tensor] = {}
        block = loaded(case, number, case.weights, torch.float64)
        state = {spec.name: spec.zeros(len(x), dtype=x.dtype) for spec in block.states(block.config, block.layer)}
        run = Forward(scan="sequential", observe=lambda names, x, *_, seen=seen: seen.setdefault(names[0], x))  # type: ignore[misc]
        block.added(x, state, run)
        for name, entering in seen.items():
            if case.weights.specs[name].expert is None:
                rows = entering.view(len(learned), -1, entering.shape[1])[learned].flatten(0, 1)
                expected = rows.T @ rows / len(rows)
                found: Hessian = of[name]["hessian"]
                assert difference(found.mean, expected) < bounds.STATISTICS_FLOAT32 * float(expected.abs().max())
                assert found.effective == len(rows)
        x = passed(loaded(case, number, stored, torch.float64), x)
    assert of[names[0]]["hessian"] is None or case.weights.specs[names[0]].site is not None
    norm = value(case.weights, "backbone.norm_f.weight").double()
    rows = rms_norm(x[learned], norm, case.weights.config.rms_norm_eps).flatten(0, 1)
    head = "backbone.embeddings.weight" if case.weights.config.tie_word_embeddings else "lm_head.weight"
    expected = rows.T @ rows / len(rows)
    assert difference(of[head]["hessian"].mean, expected) < bounds.STATISTICS_FLOAT32 * float(expected.abs().max())


def test_gptq_from_text(tmp_path: Path) -> None:
    """A recipe that asks for `gptq` needs no statistics where there is text."""
    source = write_model(tmp_path / "model", random_model(CONFIGS["experts"], dtype=torch.float32))
    text = [ids(tmp_path, random_text(53, 400).tokens.tolist())]
    found = quantize(source, tmp_path / "out", recipe=recipe(tmp_path, "gptq"), text=text)
    start = quantize(source, tmp_path / "start", recipe="int4-uniform")
    for name in ("backbone.layers.1.mixer.in_proj.weight", "backbone.embeddings.weight"):
        assert found.by_name[name].relative_error > start.by_name[name].relative_error  # type: ignore[operator]
    assert {entry.solver for entry in found.tensors if entry.format is not None} == {"gptq"}
    assert found.by_name["backbone.layers.0.mixer.D"].note == "no linear multiplies it: nearest-mse"


def test_refusals(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", random_model(CONFIGS["mamba"], dtype=torch.float32))
    recipe(tmp_path)
    words = ["quantize", source, "-r", tmp_path / "tune.yaml", "-o", tmp_path / "out"]
    assert "tune needs text (--text FILE) to run the blocks on" in refused(tmp_path, *words)
    assert "tune needs text (--text FILE) to run the blocks on" in refused(tmp_path, *words, "--dry-run")
    weights = solved(tmp_path / "other", CONFIGS["mamba"])
    huge = Changed(weights.weights, "backbone.layers.1.norm.weight", torch.full((20,), 3e38))
    with pytest.raises(InputError, match="computes NaN or infinite values in layer 1, ssm") as caught:
        seen_by(replace(weights, weights=huge), lambda task: dict(task.start))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
