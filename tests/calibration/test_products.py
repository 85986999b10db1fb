# SPDX-License-Identifier: Apache-2.0
"""Products by oneDNN are PyTorch's, whatever the number of rows, and so are their gradients, rounded where they are."""

import bounds
import pytest
import torch
import torch.nn.functional as F
from small import difference
from torch import Tensor

from mossquant.calibration import products
from mossquant.calibration.products import gradient, linear, product


@pytest.fixture
def exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MULTIPLIES_BF16", False)


@pytest.mark.usefixtures("exact_gradients")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (31,), (32,), (2, 33)])
def test_products_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 13, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(5, 13, dtype=dtype, generator=generator, requires_grad=True)
    exact = F.linear(x.double(), weight.double())
    found = linear(x, weight)
    assert found.dtype == dtype
    assert difference(found.detach().double(), exact.detach()) < bounds.FORMS_FLOAT32
    assert torch.equal(product(x.detach().reshape(-1, 13), weight.detach()), found.detach().reshape(-1, 5))
    gradients = torch.autograd.grad(found.sin().sum(), (x, weight))
    expected = torch.autograd.grad(exact.sin().sum(), (x, weight))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert difference(ours.double(), theirs.double()) < bounds.FORMS_FLOAT32


@pytest.mark.usefixtures("exact_gradients")
def test_gradient_of_one_alone() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert difference(x.grad, weight.sum(0).expand(4, 3)) < bounds.FORMS_FLOAT32


@pytest.mark.skipif(not products.MULTIPLIES_BF16, reason="this machine multiplies no bf16")
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_gradients_in_bf16(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, 70, generator=generator), torch.randn(9, 70, generator=generator)
    found = gradient(a, b)
    assert found.dtype == torch.float32
    error = (found.double() - a.double() @ b.double().T).abs()
    assert bool((error <= most_in_bf16(a, b, found)).all())
    assert float(error.max()) > bounds.FORMS_FLOAT32, "nothing was rounded"
    assert torch.equal(gradient(a.double(), b.double()), product(a.double(), b.double()))


@pytest.mark.skipif(not products.MULTIPLIES_BF16, reason="this machine multiplies no bf16")
@pytest.mark.parametrize("rows", [1, 33])
def test_a_linear_s_gradients_in_bf16(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 13, generator=generator, requires_grad=True)
    weight = torch.randn(5, 13, generator=generator, requires_grad=True)
    grad = torch.randn(rows, 5, generator=generator)
    d_x, d_weight = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    for found, a, b in ((d_x, grad, weight.detach().T), (d_weight, grad.T, x.detach().T)):
        error = (found.double() - a.double() @ b.double().T).abs()
        assert bool((error <= most_in_bf16(a, b, found)).all())


def most_in_bf16(a: Tensor, b: Tensor, found: Tensor) -> Tensor:
    """Two factors, each rounded by at most 2⁻⁸ of itself, and the sum once more."""
    return (2 * 2**-8 + 2**-16) * (a.double().abs() @ b.double().abs().T) + 2**-8 * found.abs()
