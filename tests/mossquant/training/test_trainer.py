# SPDX-License-Identifier: Apache-2.0
"""The trainer: its loss against PyTorch's, its windows, exact resume, and that experts are used."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mossquant.errors import InputError
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import MossNet
from mossquant.training.trainer import Schedule, Trainer, _HeadLoss, learning_rate

CONFIG = MossNetConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    time_step_rank=5,
    num_ssm_experts=4,
    num_ssm_experts_per_tok=2,
    num_mlp_experts=4,
    num_mlp_experts_per_tok=2,
    mlp_intermediate_size=32,
)
SCHEDULE = Schedule(steps=30, batch=4, window=16, peak_lr=1e-2, warmup=3)


@pytest.fixture
def tokens() -> np.ndarray:
    """A text with structure: each token decides the next two thirds of the time."""
    generator = np.random.default_rng(0)
    follows = generator.integers(0, 64, 64)
    out = [0]
    for _ in range(4000):
        out.append(int(follows[out[-1]]) if generator.random() < 0.67 else int(generator.integers(64)))
    return np.array(out, dtype=np.int32)


def test_head_loss_and_gradients_equal_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1100, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(33, (1100,), generator=generator)
    loss = _HeadLoss.apply(hidden, weight, targets, torch.float64)
    ours = torch.autograd.grad(loss * 3, [hidden, weight])
    expected = F.cross_entropy(hidden @ weight.T, targets)
    theirs = torch.autograd.grad(expected * 3, [hidden, weight])
    # The head computes logits and sums them in fp32, whose rounding is 6e-8 of values near 10.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_learning_rate_warms_up_and_ends_at_two_percent() -> None:
    schedule = Schedule(steps=1000, peak_lr=1.0, warmup=100)
    rates = [learning_rate(schedule, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[1000] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_carrying_rows_continue_and_others_do_not(tokens: np.ndarray) -> None:
    trainer = Trainer(CONFIG, tokens, SCHEDULE)
    first, second = trainer.windows(0), trainer.windows(1)
    assert torch.equal(first[:2, -1], second[:2, 0])
    assert not torch.equal(first[2:, -1], second[2:, 0])
    assert torch.equal(second, trainer.windows(1))


def test_a_restored_run_continues_to_the_bit(tokens: np.ndarray, tmp_path: Path) -> None:
    whole = Trainer(CONFIG, tokens, SCHEDULE)
    for _ in range(6):
        whole.advance()
    broken = Trainer(CONFIG, tokens, SCHEDULE)
    for _ in range(3):
        broken.advance()
    broken.save(tmp_path / "snapshot.safetensors")
    resumed = Trainer(CONFIG, tokens, SCHEDULE)
    resumed.restore(tmp_path / "snapshot.safetensors")
    assert resumed.step == 3
    for _ in range(3):
        resumed.advance()
    assert resumed.losses == whole.losses
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, value in whole.state.items():
        assert torch.equal(value, resumed.state[name]), name


def test_a_snapshot_of_another_run_is_refused(tokens: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.safetensors"
    trainer = Trainer(CONFIG, tokens, SCHEDULE)
    trainer.advance()
    trainer.save(path)
    other = Trainer(CONFIG, tokens, Schedule(steps=31, batch=4, window=16))
    with pytest.raises(InputError, match="another config, schedule or text"):
        other.restore(path)
    same_length = Trainer(CONFIG, tokens[::-1].copy(), SCHEDULE)
    with pytest.raises(InputError, match="another config, schedule or text"):
        same_length.restore(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a training snapshot"):
        other.restore(path)


def test_training_learns_and_uses_every_expert(tokens: np.ndarray) -> None:
    trainer = Trainer(CONFIG, tokens, SCHEDULE)
    for _ in range(30):
        trainer.advance()
    # Uniform guessing costs ln 64 = 4.16; the text's own entropy is about 2.3.
    assert np.mean(trainer.losses[:2]) > 4.0
    assert np.mean(trainer.losses[-5:]) < 3.5
    moved = MossNet(CONFIG)
    moved.reset_parameters(SCHEDULE.seed)
    for (name, now), (_, before) in zip(trainer.model.named_parameters(), moved.named_parameters(), strict=True):
        if ".w1" in name or ".x_proj" in name:
            change = (now - before).flatten(1).norm(dim=1)
            assert (change > 0).all(), name


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InputError, match="give more text"):
        Trainer(CONFIG, np.zeros(100, dtype=np.int32), SCHEDULE)


def test_a_loss_that_is_not_finite_ends_the_run(tokens: np.ndarray) -> None:
    trainer = Trainer(CONFIG, tokens, SCHEDULE)
    with torch.no_grad():
        trainer.model.norm_f.fill_(float("inf"))
    with pytest.raises(InputError, match="diverged at step 0"):
        trainer.advance()
