# SPDX-License-Identifier: Apache-2.0
"""Divergence against sums worked out by hand and against high-precision arithmetic."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from mossquant import divergence
from mossquant.divergence import Predictions

VOCABULARY = 4096


def _random_logits(rows: int, *, seed: int) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal((rows, VOCABULARY))).astype(np.float32)


def test_nll_of_hand_made_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 3.0
    found = divergence.nll(Predictions(logits), np.array([0, 2]))
    np.testing.assert_allclose(found, [math.log(2), -math.log(0.8)], rtol=1e-14)


def test_kl_of_hand_made_probabilities() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    found = divergence.kl(Predictions(np.log(p)), Predictions(np.log(q)))
    # 0.5·log(0.5/0.25) + 0.25·log 1 + 0.25·log(0.25/0.5) = 0.25·log 2
    np.testing.assert_allclose(found, [0.25 * math.log(2)], rtol=1e-14)


def test_kl_of_identical_logits_is_exactly_zero() -> None:
    logits = _random_logits(8, seed=0)
    found = divergence.kl(Predictions(logits), Predictions(logits.copy()))
    assert np.array_equal(found, np.zeros(8))


def test_kl_does_not_depend_on_a_constant_added_to_the_logits() -> None:
    logits = _random_logits(4, seed=1).astype(np.float64)
    found = divergence.kl(Predictions(logits), Predictions(logits + 100.0))
    assert np.abs(found).max() < -divergence.NEGATIVE_KL


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_kl_of_nearly_identical_logits_against_decimal_arithmetic(noise: float) -> None:
    a = _random_logits(1, seed=2)[:, :64]
    b = (a + noise * np.random.default_rng(3).standard_normal(a.shape)).astype(np.float32)
    found = divergence.kl(Predictions(a), Predictions(b))[0]
    with localcontext() as context:
        context.prec = 50
        p, q = [_softmax([Decimal(float(value)) for value in row[0]]) for row in (a, b)]
        exact = float(sum(x * (x.ln() - y.ln()) for x, y in zip(p, q, strict=True)))
    assert exact > 0
    assert abs(found - exact) <= 1e-6 * exact + 1e-15
    assert found >= divergence.NEGATIVE_KL


def _softmax(logits: list[Decimal]) -> list[Decimal]:
    powers = [value.exp() for value in logits]
    return [power / sum(powers) for power in powers]


def test_agreement_takes_the_first_of_equal_logits() -> None:
    a = Predictions(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]], np.float32))
    b = Predictions(np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]], np.float32))
    assert divergence.agreement(a, b).tolist() == [True, False]


def test_leading_axes_are_kept() -> None:
    logits = _random_logits(6, seed=4).reshape(2, 3, -1)
    log_p = Predictions(logits)
    assert divergence.nll(log_p, np.zeros((2, 3), np.int64)).shape == (2, 3)
    assert divergence.kl(log_p, log_p).shape == (2, 3)
