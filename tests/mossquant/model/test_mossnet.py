# SPDX-License-Identifier: Apache-2.0
"""The model against a scalar loop in plain Python, and its forms against one another."""

import json
import math
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from safetensors import safe_open
from small import CONFIGS, SMALL, difference, random_model, random_tokens, write_model
from torch import Tensor

from mossquant.checkpoint.checkpoint import Checkpoint, load_model
from mossquant.model.config import MossNetConfig
from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, activation_sites, parameter_count, state_specs, tensor_specs
from mossquant.model.scan import ScanForm

LENGTHS = (1, 2, 31, 32, 33, 100)


def run(
    model: MossNet, tokens: Tensor, form: ScanForm, state: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and state in one form; the step form token by token."""
    if form != "step":
        logits, after = model(tokens, state, run=Forward(scan=form))
        return logits, after
    state, rows = state or model.initial_state(tokens.shape[0]), []
    for t in range(tokens.shape[1]):
        row, state = model(tokens[:, t : t + 1], state, run=Forward(scan="step"))
        rows.append(row)
    return torch.cat(rows, 1), state


class ScalarLoop:
    """MossNet one number at a time, from the raw values of a checkpoint: Python floats, no torch, nothing of ours."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", framework="np") as file:
            self.w: dict[str, Any] = {
                name: file.get_tensor(name).astype("float64").tolist() for name in list(file.keys())
            }
        self.inner = self.config["expand"] * self.config["hidden_size"]
        layers = range(self.config["num_hidden_layers"])
        self.window = [[[0.0] * self.inner for _ in range(self.config["conv_kernel"] - 1)] for _ in layers]
        self.h = [[[0.0] * self.config["state_size"] for _ in range(self.inner)] for _ in layers]

    def step(self, token: int) -> list[float]:
        """The logits after one more token."""
        table = self.w["backbone.embeddings.weight"]
        x = list(table[token])
        for i in range(self.config["num_hidden_layers"]):
            at = f"backbone.layers.{i}"
            x = self.add(x, self.mixer(i, f"{at}.mixer", self.norm(x, self.w[f"{at}.norm.weight"])))
            if f"{at}.norm2.weight" in self.w:
                x = self.add(x, self.mlp(f"{at}.mlp", self.norm(x, self.w[f"{at}.norm2.weight"])))
        return self.times(self.w.get("lm_head.weight", table), self.norm(x, self.w["backbone.norm_f.weight"]))

    def mixer(self, i: int, at: str, u: list[float]) -> list[float]:
        both = self.times(self.w[f"{at}.in_proj.weight"], u)
        window = [*self.window[i], both[: self.inner]]
        self.window[i] = window[1:]
        x = []
        for c in range(self.inner):
            taps = self.w[f"{at}.conv1d.weight"][c][0]
            x.append(self.silu(self.w[f"{at}.conv1d.bias"][c] + sum(taps[j] * window[j][c] for j in range(len(taps)))))
        R, N = self.config["time_step_rank"], self.config["state_size"]
        delta, B, C = [0.0] * self.inner, [0.0] * N, [0.0] * N
        for e, gate in self.gates(at, u, "num_ssm_experts_per_tok"):
            own = at if e is None else f"{at}.experts.{e}"
            out = self.times(self.w[f"{own}.x_proj.weight"], x)
            part = self.add(self.times(self.w[f"{own}.dt_proj.weight"], out[:R]), self.w[f"{own}.dt_proj.bias"])
            delta = [a + gate * b for a, b in zip(delta, part, strict=True)]
            B = [a + gate * b for a, b in zip(B, out[R : R + N], strict=True)]
            C = [a + gate * b for a, b in zip(C, out[R + N :], strict=True)]
        y = []
        for c in range(self.inner):
            step = math.log1p(math.exp(delta[c]))
            total = self.w[f"{at}.D"][c] * x[c]
            for n in range(N):
                decay = math.exp(-step * math.exp(self.w[f"{at}.A_log"][c][n]))
                self.h[i][c][n] = decay * self.h[i][c][n] + step * x[c] * B[n]
                total += self.h[i][c][n] * C[n]
            y.append(total * self.silu(both[self.inner + c]))
        return self.times(self.w[f"{at}.out_proj.weight"], y)

    def mlp(self, at: str, u: list[float]) -> list[float]:
        total = [0.0] * len(u)
        for e, gate in self.gates(at, u, "num_mlp_experts_per_tok"):
            own = f"{at}.experts.{e or 0}"
            left, right = self.times(self.w[f"{own}.w1.weight"], u), self.times(self.w[f"{own}.w3.weight"], u)
            out = self.times(self.w[f"{own}.w2.weight"], [self.silu(a) * b for a, b in zip(left, right, strict=True)])
            total = [a + gate * b for a, b in zip(total, out, strict=True)]
        return total

    def gates(self, at: str, u: list[float], chosen: str) -> list[tuple[int | None, float]]:
        if f"{at}.router.weight" not in self.w:
            return [(None, 1.0)]
        logits = self.times(self.w[f"{at}.router.weight"], u)
        best = sorted(range(len(logits)), key=lambda e: -logits[e])[: self.config[chosen]]
        total = sum(math.exp(logits[e]) for e in best)
        return [(e, math.exp(logits[e]) / total) for e in best]

    def norm(self, x: list[float], weight: list[float]) -> list[float]:
        scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + self.config["rms_norm_eps"])
        return [v * scale * w for v, w in zip(x, weight, strict=True)]

    @staticmethod
    def times(matrix: list[list[float]], x: list[float]) -> list[float]:
        return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]

    @staticmethod
    def add(x: list[float], y: list[float]) -> list[float]:
        return [a + b for a, b in zip(x, y, strict=True)]

    @staticmethod
    def silu(x: float) -> float:
        return x / (1 + math.exp(-x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_prompt_and_steps_equal_the_scalar_loop(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model(CONFIGS[kind]))
    model = load_model(Checkpoint.open(folder), dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 18)
    loop = ScalarLoop(folder)
    expected = torch.tensor([[loop.step(int(token)) for token in tokens[0]]], dtype=torch.float64)
    assert float(expected.std()) > 0.3, "logits that are all alike would prove nothing"
    for form in ("kernel", "sequential", "step"):
        assert difference(run(model, tokens, form)[0], expected) < bounds.REFERENCE_FLOAT64, form


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_forms_agree(kind: str) -> None:
    model = random_model(CONFIGS[kind])
    for length in LENGTHS if kind == "experts" else (33,):
        tokens = random_tokens(model.config, 3, length)
        expected, after = run(model, tokens, "sequential")
        for form in ("chunked", "kernel", "step"):
            logits, state = run(model, tokens, form)
            assert difference(logits, expected) < bounds.FORMS_FLOAT64, (form, length)
            for name in after:
                assert difference(state[name], after[name]) < bounds.FORMS_FLOAT64, (form, length, name)


def test_the_forms_agree_in_fp32() -> None:
    tokens = random_tokens(SMALL, 2, 100)
    expected, _ = run(random_model(SMALL), tokens, "sequential")
    model = random_model(SMALL, dtype=torch.float32)
    for form in ("sequential", "chunked", "kernel", "step"):
        assert difference(run(model, tokens, form)[0], expected) < bounds.FORMS_FLOAT32, form


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (31,), (32,), (33, 34, 66), (99,)])
def test_a_text_in_pieces_equals_one_long_prefill(cuts: tuple[int, ...]) -> None:
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 2, 100)
    expected, after = run(model, tokens, "kernel")
    state, parts, start = None, [], 0
    for stop in (*cuts, 100):
        form: ScanForm = "step" if stop - start == 1 else "kernel"
        logits, state = run(model, tokens[:, start:stop], form, state)
        parts.append(logits)
        start = stop
    assert state is not None
    assert difference(torch.cat(parts, 1), expected) < bounds.FORMS_FLOAT64
    for name in after:
        assert difference(state[name], after[name]) < bounds.FORMS_FLOAT64, name


def test_a_call_does_not_change_the_state_that_it_was_given() -> None:
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 2, 9)
    _, state = model(tokens)
    before = {name: array.clone() for name, array in state.items()}
    first, _ = model(tokens, state)
    second, _ = model(tokens, state)
    assert torch.equal(first, second)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 3, 40)
    whole, _ = model(tokens)
    for row in range(3):
        alone, _ = model(tokens[row : row + 1])
        assert difference(alone, whole[row : row + 1]) < bounds.FORMS_FLOAT64


def test_last_gives_the_last_row_of_all() -> None:
    model = random_model(SMALL)
    tokens = random_tokens(SMALL, 2, 7)
    last, _ = model(tokens, logits="last")
    assert last.shape == (2, 1, SMALL.vocab_size)
    assert difference(last, model(tokens)[0][:, -1:]) < bounds.SAME_SUM_FLOAT64


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_is_one_checkpoint_tensor(kind: str) -> None:
    config = CONFIGS[kind]
    model, specs = random_model(config), tensor_specs(config)
    assert len({spec.name for spec in specs}) == len(specs)
    assert sum(spec.count for spec in specs) == parameter_count(config) == sum(p.numel() for p in model.parameters())
    for number, spec in enumerate(specs):
        assert model.parameter_of(spec).shape == spec.shape
        model.parameter_of(spec).fill_(number)
    assert all(bool((model.parameter_of(spec) == number).all()) for number, spec in enumerate(specs)), "tensors overlap"
    for spec in specs:
        matrix = spec.to_matrix(model.parameter_of(spec)) if len(spec.shape) != 1 else model.parameter_of(spec)[None]
        assert matrix.shape == spec.matrix_shape
        assert torch.equal(spec.from_matrix(spec.to_matrix(model.parameter_of(spec))), model.parameter_of(spec))


@pytest.mark.parametrize("kind", CONFIGS)
def test_sites_and_states_match_the_tensors(kind: str) -> None:
    config = CONFIGS[kind]
    specs = {spec.name: spec for spec in tensor_specs(config)}
    sites = activation_sites(config)
    read = [name for site in sites for name in site.tensors]
    assert sorted(read) == sorted(spec.name for spec in specs.values() if spec.site is not None)
    for site in sites:
        assert {specs[name].site for name in site.tensors} == {site.name}
        columns = [specs[name].matrix_shape[1] for name in site.tensors]
        # The gated δ of all experts lie side by side; every other site is read whole by each of its tensors.
        assert site.width == sum(columns) if site.role.endswith("dt_proj.input") else set(columns) == {site.width}
    state = MossNet(config).initial_state(2)
    assert {name: tuple(array.shape[1:]) for name, array in state.items()} == {
        s.name: s.shape for s in state_specs(config)
    }


def test_published_sizes() -> None:
    """Mamba-130M has 129,135,360 parameters (its model card); the presets are ours."""
    config = MossNetConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, time_step_rank=48)
    assert parameter_count(config) == 129_135_360


def test_initial_weights_are_the_same_for_a_seed() -> None:
    one, same, other = MossNet(SMALL), MossNet(SMALL), MossNet(SMALL)
    for model, seed in ((one, 7), (same, 7), (other, 8)):
        model.reset_parameters(seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embeddings, other.embeddings)
    spec = next(spec for spec in tensor_specs(SMALL) if spec.role == "ssm.expert.dt_bias")
    delta = torch.nn.functional.softplus(one.parameter_of(spec))
    assert 0.999e-3 <= float(delta.min()) <= float(delta.max()) <= 1.001e-1
