# SPDX-License-Identifier: Apache-2.0
"""The program that targets compile is the model: with plain float64 matrices in it, the same numbers."""

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from bounds import FORMS_FLOAT64, PLANTED_FAULT
from lowered import MODELS
from small import difference, random_model, random_tokens
from torch import Tensor, nn

from mossquant.model.forward import Forward
from mossquant.model.mossnet import MossNet, state_specs, tensor_specs
from mossquant.targets.executorch.scan import loop, step
from mossquant.targets.program import Model, Scan

TIME = 9


class Plain:
    """`mossquant.targets.program.Matrices` of a model in memory, in its own type."""

    def __init__(self, model: MossNet, *, order: int = 1) -> None:
        self._tensors = {spec.name: model.parameter_of(spec) for spec in tensor_specs(model.config)}
        self._order = order

    def stacked(self, names: Sequence[str]) -> nn.Module:
        return _Product(torch.cat([self._tensors[name] for name in names]))

    def summed(self, names: Sequence[str]) -> nn.Module:
        return _Sum(torch.stack([self._tensors[name] for name in names[:: self._order]]))

    def table(self, name: str) -> nn.Module:
        return _Rows(self._tensors[name])

    def value(self, name: str) -> Tensor:
        return self._tensors[name].clone()


class _Product(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Sum(_Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("txk,xnk->tn", x, self.weight)


class _Rows(_Product):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]


def plain_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """A token after the other."""
    y = []
    for t in range(len(x)):
        h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        y.append(h @ C[t])
    return torch.stack(y), h


def some_state(model: MossNet) -> list[Tensor]:
    """The state after some tokens, in the program's order."""
    state = model.initial_state(1)
    _, state = model.hidden(random_tokens(model.config, 1, 5, seed=1), state, Forward(scan="sequential"))
    return [state[spec.name] for spec in state_specs(model.config)]


def expected(model: MossNet, tokens: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the model makes of tokens [1, T] from states."""
    names = [spec.name for spec in state_specs(model.config)]
    run = Forward(scan="sequential")
    hidden, after = model.hidden(tokens, dict(zip(names, states, strict=True)), run)
    return model.head(hidden, run), [after[name] for name in names]


def run(
    program: Model, scan: Scan, tokens: Tensor, states: Sequence[Tensor], *, last: bool
) -> tuple[Tensor, list[Tensor]]:
    """Block after block: tokens [1, T], states → logits [1, T or 1, V], states."""
    x, rest, after = program.table(tokens[0]), iter(states), list[Tensor]()
    for norms, blocks, layer, count in program.order:
        norm, block = program.get_submodule(f"{norms}.{layer}"), program.get_submodule(f"{blocks}.{layer}")
        out, own = block(norm(x), list(islice(rest, count)), scan)
        x, after = x + out, [*after, *own]
    return program.head(program.norm_f(x[-1:] if last else x)).unsqueeze(0), after


def same_states(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(found), list(wanted), rtol=0, atol=FORMS_FLOAT64)


@pytest.mark.parametrize("scan", [plain_scan, loop])
@pytest.mark.parametrize("name", MODELS)
def test_score_and_prefill_are_the_model(name: str, scan: Scan) -> None:
    model = random_model(MODELS[name])
    program, states = Model(model.config, tensor_specs(model.config), Plain(model)), some_state(model)
    tokens = random_tokens(model.config, 1, TIME)
    wanted, after = expected(model, tokens, states)
    every, found = run(program, scan, tokens, states, last=False)
    last, also = run(program, scan, tokens, states, last=True)
    assert difference(every, wanted) <= FORMS_FLOAT64
    assert difference(last, wanted[:, -1:]) <= FORMS_FLOAT64
    same_states(found, after)
    same_states(also, after)


@pytest.mark.parametrize("name", MODELS)
def test_decode_is_the_model(name: str) -> None:
    model = random_model(MODELS[name])
    program = Model(model.config, tensor_specs(model.config), Plain(model))
    states = some_state(model)
    for tokens in random_tokens(model.config, TIME, 1).split(1):
        wanted, after = expected(model, tokens, states)
        found, states = run(program, step, tokens, states, last=True)
        assert found.shape == (1, 1, model.config.vocab_size)
        assert difference(found, wanted) <= FORMS_FLOAT64
        same_states(states, after)


def test_experts_in_another_order_are_seen() -> None:
    model = random_model(MODELS["experts"])
    program = Model(model.config, tensor_specs(model.config), Plain(model, order=-1))
    tokens, states = random_tokens(model.config, 1, TIME), some_state(model)
    found, _ = run(program, plain_scan, tokens, states, last=False)
    assert difference(found, expected(model, tokens, states)[0]) >= PLANTED_FAULT
