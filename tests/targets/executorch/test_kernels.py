# SPDX-License-Identifier: Apache-2.0
"""A .pte with kernels of ours computes what the PyTorch model and libmoss do, holds the checkpoint, and refuses what it
cannot run.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import NATIVE_FP32, NATIVE_INT8_MEDIAN
from lowered import Lowered, Workshop, read_back, relative, same_bits
from torch import Tensor, nn

from mossquant.checkpoint.locate import locate
from mossquant.errors import InputError
from mossquant.eval.open import open_runner
from mossquant.kernels import _native
from mossquant.targets.executorch.info import info
from mossquant.targets.executorch.kernels import library
from mossquant.targets.executorch.kernels.chain import differences
from mossquant.targets.executorch.kernels.library import load_operators
from mossquant.targets.executorch.packages import load_method, load_program
from mossquant.targets.executorch.program_file import Chain, KernelCall, ProgramFile
from mossquant.targets.export import export
from mossquant.targets.native.blocks.calls import FORMATS, LAYOUTS
from mossquant.targets.native.export import host_layout
from mossquant.targets.native.open import open_program
from mossquant.targets.program import METHODS

CASES = [
    ("wide", "int4"),
    ("wide", "one input"),
    ("experts", "g128"),
    ("all chosen", "int8"),
    ("mamba48", "int4"),
    ("no window", "int8"),
    ("pruned", "int4"),
    ("untied", None),
]
"""Experts, all of them and one, matrices in several formats and in fp32, sizes that no group and no strip divides."""
LENGTHS = (1, 2, 5, 128)


def lowered_own(workshop: Workshop, model: str, recipe: str | None) -> Lowered:
    return workshop(model, recipe, target="executorch", kernels="mossquant")


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_same_bits_as_libmoss(workshop: Workshop, model: str, recipe: str | None) -> None:
    """Logits of all positions, of the last one and of single steps, and the state, at several lengths of a call."""
    own, native = lowered_own(workshop, model, recipe).runner, workshop(model, recipe, target="native").runner
    same_bits(own, native, workshop(model, recipe, target="native").tokens(1, 2 * sum(LENGTHS)), LENGTHS)


@pytest.mark.parametrize(("model", "recipe"), [("wide", "int4"), ("experts", "g128"), ("untied", None)])
def test_what_the_pytorch_model_computes(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = lowered_own(workshop, model, recipe)
    exact, runner = lowered.reference(), lowered.runner
    assert runner.info.activations == ("fp32" if recipe is None else "int8_block")
    state, off = exact.initial_state(1), []
    for column in lowered.tokens(1, 24).T:
        before = exact.read(state)  # single steps from the same states: a rounding tie upsets its own position only
        expected, state = exact(column[None], exact.write(before))
        off.append(relative(runner(column[None], runner.write(before))[0], expected).max())
    assert np.median(off) <= (NATIVE_FP32 if recipe is None else NATIVE_INT8_MEDIAN)


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_weight_is_read_back(workshop: Workshop, model: str, recipe: str | None) -> None:
    lowered = lowered_own(workshop, model, recipe)
    report = read_back(lowered.checkpoint, lowered.artifact)
    assert report.differences == ()
    assert report.weights == lowered.runner.info.parameters


def test_a_changed_weight_is_named(workshop: Workshop, tmp_path: Path) -> None:
    lowered = lowered_own(workshop, "wide", "int4")
    folder = shutil.copytree(lowered.artifact, tmp_path / "artifact", ignore=lambda *_: ["manifest.json"])
    data = bytearray(lowered.program.read_bytes())
    stored = workshop("wide", "int4", target="native")
    packed = open_program(stored.program).stored("backbone.layers.1.mixer.out_proj.weight")[:256].tobytes()
    assert data.count(packed) == 1
    data[data.index(packed)] ^= 1
    (folder / "model.pte").write_bytes(data)
    (difference,) = read_back(lowered.checkpoint, folder).differences
    assert difference.startswith("prefill: backbone.layers.1.mixer.out_proj.weight: code [0, 0] is ")


def test_info_says_what_every_byte_is_for(workshop: Workshop) -> None:
    lowered = lowered_own(workshop, "wide", "one input")
    report = info(locate(lowered.artifact))
    assert sum(report.sections.values()) == lowered.program.stat().st_size
    assert min(report.sections.values()) >= 0
    assert dict(report.facts)["packed for"].startswith(host_layout())
    assert report.active_parameters < report.parameters


def test_the_tied_table_is_stored_once(workshop: Workshop) -> None:
    lowered = lowered_own(workshop, "experts", "g128")
    assert lowered.config.tie_word_embeddings
    file = ProgramFile(lowered.program)
    places = set()
    for method in METHODS:
        first, *_, last = file.chain(method).calls
        places |= {call.arguments[1].__array_interface__["data"][0] for call in (first, last)}
    assert len(places) == 1


@pytest.mark.parametrize("argument", range(12))
def test_a_constant_anywhere_else_is_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, argument: int) -> None:
    """One number changed in a call's list of arguments: a constant for x, a setting, formats, an output."""
    lowered = lowered_own(workshop, "wide", "int4")
    file = ProgramFile(lowered.program)
    chain = file.chain("decode")
    number = next(i for i, call in enumerate(chain.calls) if "mlp_moe" in call.operator)
    call = chain.calls[number]
    arguments = list(call.arguments)
    constant = next(one for one in arguments if isinstance(one, np.ndarray))
    arguments[argument] = np.concatenate([constant, constant])
    calls = (*chain.calls[:number], KernelCall(call.operator, tuple(arguments)), *chain.calls[number + 1 :])
    monkeypatch.setattr(file, "chain", lambda name: Chain(chain.inputs, chain.outputs, calls))
    (found,) = differences(file, "decode", lowered.config, host_layout())
    assert found.startswith(f"decode, call {number} (mossquant::mlp_moe.out): ")


@pytest.mark.skipif(host_layout() == "arm", reason="packs for another family than this machine's")
def test_another_layout_is_written_and_read_and_not_run(workshop: Workshop) -> None:
    lowered = workshop("wide", "int4", target="executorch", kernels="mossquant", isa="arm")
    assert read_back(lowered.checkpoint, lowered.artifact).differences == ()
    with pytest.raises(InputError, match=r"packed for arm, and the kernels of this machine want \w+; export it again"):
        open_runner(lowered.artifact)


@pytest.mark.skipif(host_layout() == "arm", reason="packs for another family than this machine's")
def test_in_full_precision_no_layout_is_refused(workshop: Workshop) -> None:
    own = lowered_own(workshop, "untied", None)
    other = workshop("untied", None, target="executorch", kernels="mossquant", isa="arm")
    tokens = own.tokens(1, 5)
    expected, found = (
        runner(tokens, runner.initial_state(1), logits="all")[0]
        for runner in (own.runner, open_runner(other.artifact, threads=1))
    )
    np.testing.assert_array_equal(found, expected)


def test_several_states_of_one_runner(workshop: Workshop) -> None:
    """A state lies in memory of the program: another one, a copy and an end of the Runner leave it as it was."""
    lowered = lowered_own(workshop, "wide", "int4")
    runner = open_runner(lowered.artifact, threads=1)
    tokens = lowered.tokens(2, 12)
    expected = [runner(row[None], runner.initial_state(1), logits="all")[0] for row in tokens]
    states = [runner.initial_state(1), runner.initial_state(1)]
    for time in range(12):
        for stream in (0, 1):
            found, states[stream] = runner(tokens[stream : stream + 1, time : time + 1], states[stream])
            np.testing.assert_allclose(found[0, 0], expected[stream][0, time], rtol=0, atol=1e-4)
    arrays = runner.read(states[0])
    other = open_runner(lowered.artifact, threads=1)
    kept = runner.copy(states[0])
    del runner
    np.testing.assert_array_equal(other.read(kept)["layers.0.mixer.ssm"], arrays["layers.0.mixer.ssm"])
    np.testing.assert_array_equal(other.read(states[0])["layers.0.mixer.ssm"], arrays["layers.0.mixer.ssm"])


def test_threads_change_no_bit(workshop: Workshop) -> None:
    lowered = lowered_own(workshop, "wide", "int4")
    tokens = lowered.tokens(1, 40)
    found = []
    for threads in (2, 1):
        runner = open_runner(lowered.artifact, threads=threads)
        every, state = runner(tokens, runner.initial_state(1), logits="all")
        found.append((every, runner(tokens[:, :1], state)[0]))
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_stock_kernels_stay_the_default(workshop: Workshop, tmp_path: Path) -> None:
    """They do not have `int8_g32` matrices, which `test_the_same_bits_as_libmoss` runs."""
    checkpoint = workshop.checkpoint("wide", "one input")
    with pytest.raises(InputError, match=r"executorch cannot hold .* in int8_g32"):
        export(checkpoint, tmp_path / "stock", target="executorch")


def test_compiling_is_shown_and_done_once(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stages: list[str] = []
    checkpoint = workshop.checkpoint("mamba", "int4")
    export(
        checkpoint,
        tmp_path / "out",
        target="executorch",
        kernels="mossquant",
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert stages[0] == "compiling the operators, once"
    assert stages[-1] == "written"
    (made,) = (tmp_path / "cache").rglob("*.so")
    before = made.stat().st_mtime_ns
    assert library.compiled() == made
    assert made.stat().st_mtime_ns == before


def test_without_a_compiler_there_is_one_line(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = workshop.checkpoint("wide", "int4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"takes a C\+\+20 compiler, once, and none was found; install one .* and run"):
        export(checkpoint, tmp_path / "out", target="executorch", kernels="mossquant")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_OPTIONS", (*library._OPTIONS, "-DMOSS_BLOCKS_H_"))
    with pytest.raises(InputError, match=r"cannot compile the operators for executorch [\d.]+ \(.*error.*\)"):
        library.compiled()
    assert not list(tmp_path.rglob("*.so"))


class _Called(nn.Module):
    """One operator with constants and settings."""

    def __init__(self, operator: str, constants: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.given = operator, constants
        for name, value in constants.items():
            for i, tensor in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(tensor, Tensor):
                    self.register_buffer(f"{name}_{i}", tensor)

    def forward(self, *inputs: Tensor) -> Any:
        found: list[Any] = []
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                found.append(getattr(self, f"{name}_0"))
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                found.append([getattr(self, f"{name}_{i}") for i in range(len(value))])
            else:
                found.append(value)
        return getattr(torch.ops.mossquant, self.operator).default(*inputs, *found)


def _run(operator: str, inputs: tuple[Tensor, ...], constants: dict[str, Any], folder: Path) -> list[Tensor]:
    """What an operator gives in a program."""
    from executorch.exir import EdgeCompileConfig, to_edge

    load_operators()
    exported = torch.export.export(_Called(operator, constants), inputs, strict=False)
    edge = to_edge(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
    path = folder / "one.pte"
    path.write_bytes(edge.to_executorch().buffer)
    program = load_program(path)
    found: list[Tensor] = load_method(program, "forward")(list(inputs))
    return found


V, D, E, N, W, R, F = 11, 6, 20, 3, 4, 2, 5
X = torch.randn(3, D)
TOKENS = torch.tensor([[4, 0, V - 1]])
STATES = torch.zeros(1, W - 1, E), torch.zeros(1, 2, N, 16)
TABLE = {"table": torch.randn(V, D), "vocabulary": V, "hidden": D, "layout": 0, "formats": [0]}
HEAD = {
    **{"matrix": torch.randn(V, D), "norm": torch.ones(D), "eps": 1e-5, "vocabulary": V, "last": False},
    **{"layout": 0, "formats": [0]},
}
PACKED = {
    **HEAD,
    "matrix": torch.zeros(_native.packed_bytes(host_layout(), "int8", V, D), dtype=torch.uint8),
    "layout": LAYOUTS.index(host_layout()),
    "formats": [FORMATS.index("int8")],
}
SSM = {
    **{"in_proj": torch.randn(2 * E, D), "x_proj": [torch.randn(R + 2 * N, E)], "dt_proj": [torch.randn(E, R)]},
    **{"out_proj": torch.randn(D, E), "norm": torch.ones(D), "router": None, "conv": torch.randn(W, E)},
    **{"conv_bias": torch.randn(E), "dt_bias": torch.randn(1, E), "rate": torch.zeros(2, N, 16), "D": torch.randn(E)},
    **{"eps": 1e-5, "rank": R, "chosen": 1, "layout": 0, "formats": [0] * 4},
}
MLP = {
    **{"w1": [torch.randn(F, D)] * 2, "w3": [torch.randn(F, D)] * 2, "w2": [torch.randn(D, F)] * 2},
    **{"norm": torch.ones(D), "router": torch.randn(2, D), "eps": 1e-5, "mlp_hidden": F, "chosen": 1},
    **{"layout": 0, "formats": [0] * 6},
}
"""Operators with matrices in fp32, whatever the machine."""


def test_operators_by_themselves(tmp_path: Path) -> None:
    """Rows of a table, a block of experts and a head, against PyTorch."""
    (rows,) = _run("embedding", (TOKENS,), TABLE, tmp_path)
    torch.testing.assert_close(rows, TABLE["table"][TOKENS[0]], rtol=0, atol=0)
    normed = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + 1e-5)
    expected = X.clone()
    for row, expert in enumerate((normed @ MLP["router"].T).argmax(-1).tolist()):
        w1, w3, w2 = (MLP[name][expert] for name in ("w1", "w3", "w2"))
        expected[row] += w2 @ (nn.functional.silu(w1 @ normed[row]) * (w3 @ normed[row]))
    (found,) = _run("mlp_moe", (X,), MLP, tmp_path)
    torch.testing.assert_close(found, expected)
    (logits,) = _run("head", (X,), HEAD, tmp_path)
    torch.testing.assert_close(logits[0], normed @ HEAD["matrix"].T)
    (last,) = _run("head", (X,), {**HEAD, "last": True}, tmp_path)
    torch.testing.assert_close(last, logits[:, -1:])
    x, window, _ = _run("ssm_moe", (X, *STATES), SSM, tmp_path)
    assert x.shape == X.shape
    torch.testing.assert_close(window[0], normed @ SSM["in_proj"][:E].T)
    assert not _run("head", (X,), PACKED, tmp_path)[0].any()


@pytest.mark.parametrize(
    ("operator", "inputs", "constants", "changed"),
    [
        ("embedding", (torch.tensor([[0, V]]),), TABLE, {}),
        ("embedding", (torch.tensor([[-1]]),), TABLE, {}),
        ("embedding", (torch.tensor([[1]], dtype=torch.int32),), TABLE, {}),
        ("embedding", (TOKENS,), TABLE, {"vocabulary": V + 1}),
        ("head", (X,), HEAD, {"formats": [5]}),
        ("head", (X,), HEAD, {"formats": [-1]}),
        ("head", (X,), HEAD, {"formats": [1 << 32]}),
        ("head", (X,), HEAD, {"formats": [0, 0]}),
        ("head", (X,), PACKED, {"layout": PACKED["layout"] + (1 << 32)}),
        ("head", (X[:0],), HEAD, {"last": True}),
        ("head", (X,), HEAD, {"norm": torch.ones(D + 1)}),
        ("head", (X,), HEAD, {"norm": torch.ones(D, dtype=torch.float64)}),
        ("head", (X,), PACKED, {"layout": (PACKED["layout"] + 1) % 3}),
        ("head", (X,), PACKED, {"matrix": PACKED["matrix"][:-64].clone()}),
        ("ssm_moe", (X, *STATES), SSM, {"router": torch.ones(1, D + 1)}),
        ("ssm_moe", (X, *STATES), SSM, {"chosen": 2}),
        ("ssm_moe", (X, *STATES), SSM, {"chosen": 0}),
        ("ssm_moe", (X, *STATES), SSM, {"rank": 1 << 40}),
        ("ssm_moe", (X, *STATES), SSM, {"x_proj": SSM["x_proj"] * 2, "formats": [0] * 5}),
        ("ssm_moe", (X, *STATES), SSM, {"rate": torch.zeros(1, N, 16)}),
        ("ssm_moe", (X, STATES[0], torch.zeros(1, 1, N, 16)), SSM, {"rate": torch.zeros(1, N, 16)}),
        ("ssm_moe", (X, torch.zeros(2, W - 1, E), STATES[1]), SSM, {}),
        ("mlp_moe", (X,), MLP, {"router": None}),
        ("mlp_moe", (X,), MLP, {"w2": MLP["w2"][:1], "formats": [0] * 5}),
        ("mlp_moe", (X,), MLP, {"mlp_hidden": F + 1}),
        ("mlp_moe", (X,), MLP, {"mlp_hidden": 0}),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_crash(
    tmp_path: Path, operator: str, inputs: tuple[Tensor, ...], constants: dict[str, Any], changed: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match="failed with error 0x12"):
        _run(operator, inputs, {**constants, **changed}, tmp_path)
