# SPDX-License-Identifier: Apache-2.0
"""The causal convolution with SiLU: values and all gradients, against autograd through PyTorch's own operators."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from mossquant.kernels import available, selected
from mossquant.kernels.conv import causal_conv

from .bounds import F32_UNIT, F64_RELATIVE, SILU_ULPS, f32_accumulated

NAMES = ("x", "weight", "bias", "window")
SHAPES = [  # B, T, E, W: around the vector (4, 8, 16), the tile (64), the chunk (32), and shorter than the window
    (1, 0, 7, 4),
    (3, 1, 1, 4),
    (2, 2, 33, 4),
    (1, 3, 16, 4),
    (1, 31, 16, 1),
    (1, 32, 33, 2),
    (3, 33, 7, 5),
    (3, 100, 70, 4),
    (1, 70, 130, 40),
    (0, 5, 3, 4),
]
KERNELS = available("conv")

Outputs = tuple[Tensor, Tensor]


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor, window: Tensor) -> Outputs:
    """The definition with PyTorch's convolution over window and inputs together."""
    width = weight.shape[1]
    together = torch.cat([window, x.transpose(1, 2)], dim=2)  # [B, E, W-1 + T]
    new_window = together[..., together.shape[2] - (width - 1) :]
    if x.numel() == 0:
        return x * bias, new_window
    return silu(conv1d(together, weight[:, None], bias, groups=x.shape[2])).transpose(1, 2), new_window


def make_inputs(shape: tuple[int, int, int, int], seed: int = 0) -> list[Tensor]:
    """Float64 numbers that fp32 holds exactly, in the order of NAMES."""
    B, T, E, W = shape
    random = torch.Generator().manual_seed(seed)
    sizes = [(B, T, E), (E, W), (E,), (B, E, W - 1)]
    return [torch.randn(*size, generator=random, dtype=torch.float32).double() for size in sizes]


def output_gradients(shape: tuple[int, int, int, int]) -> Outputs:
    B, T, E, W = shape
    random = torch.Generator().manual_seed(99)
    return torch.randn(B, T, E, generator=random).double(), torch.randn(B, E, W - 1, generator=random).double()


def results(run: Callable[..., Outputs], inputs: Sequence[Tensor], dy: Tensor, dnew: Tensor) -> dict[str, Tensor]:
    """Outputs of run(*inputs), and the gradients of <dy, y> + <dnew, new_window> (zeros where there is none)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y, new_window = run(*leaves)
    grads = torch.autograd.grad((y, new_window), leaves, (dy.to(y.dtype), dnew.to(new_window.dtype)), allow_unused=True)
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return dict(zip(("y", "new_window", *NAMES), [y.detach(), new_window.detach(), *filled], strict=True))


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def magnitudes(inputs: Sequence[Tensor], dy: Tensor, dnew: Tensor) -> dict[str, float]:
    """The largest value of each output and gradient when every term enters with its absolute value.

    SiLU is at most |p| and its slope at most 1.1, so what is left is the convolution.
    """

    def linear(*given: Tensor) -> Outputs:
        x, weight, bias, window = given
        together = torch.cat([window, x.transpose(1, 2)], dim=2)
        T, width = x.shape[1], weight.shape[1]
        y = bias + sum(weight[:, w] * together[..., w : w + T].transpose(1, 2) for w in range(width))
        return y, together[..., together.shape[2] - (width - 1) :]

    positive = [tensor.abs() for tensor in inputs]
    return {name: 1.1 * largest(value) for name, value in results(linear, positive, dy.abs(), dnew.abs()).items()}


def conv_with(kernel: str, threads: int = 1) -> Callable[..., Outputs]:
    return lambda *inputs: causal_conv(*inputs, threads=threads, kernel=kernel)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_torch(shape: tuple[int, int, int, int]) -> None:
    inputs, output_grads = make_inputs(shape), output_gradients(shape)
    found = results(conv_with("moss_conv_f64_scalar"), inputs, *output_grads)
    for name, expected in results(torch_conv, inputs, *output_grads).items():
        error = largest(found[name] - expected)
        assert error <= F64_RELATIVE * largest(expected), f"{name}: {error:.3e} of {largest(expected):.3e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_near_float64(kernel: str, shape: tuple[int, int, int, int]) -> None:
    inputs, output_grads = make_inputs(shape), output_gradients(shape)
    found = results(conv_with(kernel), [tensor.float() for tensor in inputs], *output_grads)
    magnitude = magnitudes(inputs, *output_grads)
    B, T, _, W = shape
    bound = f32_accumulated(B * T + W)  # the longest: dweight over batch and time, y over the width
    for name, expected in results(torch_conv, inputs, *output_grads).items():
        error = largest(found[name].double() - expected)
        assert error <= bound * magnitude[name], f"{name}: {error / max(magnitude[name], 1e-300):.3e} > {bound:.3e}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_silu_is_accurate(kernel: str) -> None:
    """Width 1, weight 1 and no bias leave SiLU alone."""
    p = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-2, 2, 2001), torch.tensor([-1e4, 200.0, 1e8])])
    E = p.numel()
    y, _ = causal_conv(p[None, None], torch.ones(E, 1), torch.zeros(E), kernel=kernel)
    expected = p.double() * torch.sigmoid(p.double())
    error = (y.flatten().double() - expected).abs()
    bound = SILU_ULPS * F32_UNIT * expected.abs() + 2.0**-125
    worst = int((error / bound).argmax())
    assert bool((error <= bound).all()), f"p {p[worst]:.9g}: {error[worst] / expected[worst].abs() / F32_UNIT:.2f} ulp"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", NAMES)
def test_nan_is_not_swallowed(kernel: str, where: str) -> None:
    inputs = [tensor.float() for tensor in make_inputs((1, 1, 20, 4))]
    inputs[NAMES.index(where)].view(-1)[0] = torch.nan
    assert causal_conv(*inputs, kernel=kernel)[0].isnan().any()


def test_gradcheck() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 5, 3, 4))]
    assert torch.autograd.gradcheck(lambda *given: causal_conv(*given, threads=1), inputs)


@pytest.mark.parametrize("kernel", [*KERNELS, "moss_conv_f64_scalar"])
def test_split_calls_equal_one(kernel: str) -> None:
    inputs = [tensor if "f64" in kernel else tensor.float() for tensor in make_inputs((2, 100, 20, 4))]
    x, weight, bias, window = inputs
    y, new_window = causal_conv(*inputs, kernel=kernel)
    for cuts in ([1], [2, 1], [32], [37, 62], [0, 99]):
        carried, pieces = window, []
        for piece in torch.split(x, [*cuts, 100 - sum(cuts)], dim=1):
            out, carried = causal_conv(piece, weight, bias, carried, kernel=kernel)
            pieces.append(out)
        assert torch.equal(torch.cat(pieces, dim=1), y)
        assert torch.equal(carried, new_window)


@pytest.mark.parametrize("kernel", [*KERNELS, "moss_conv_f64_scalar"])
def test_threads_change_nothing(kernel: str) -> None:
    shape = (3, 70, 200, 4)
    inputs = [tensor if "f64" in kernel else tensor.float() for tensor in make_inputs(shape)]
    one, two, many = (results(conv_with(kernel, n), inputs, *output_gradients(shape)) for n in (1, 2, 7))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
        assert torch.equal(value, many[name]), name


def test_no_window_means_zeros() -> None:
    x, weight, bias, window = (tensor.float() for tensor in make_inputs((2, 40, 20, 4)))
    without, zeros = causal_conv(x, weight, bias), causal_conv(x, weight, bias, torch.zeros_like(window))
    for a, b in zip(without, zeros, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_is_computed_in_float32() -> None:
    shape = (2, 40, 20, 4)
    x, weight, bias, window = make_inputs(shape)
    leaves = [x.bfloat16(), weight.float(), bias.float(), window.bfloat16()]
    found = results(causal_conv, leaves, *output_gradients(shape))
    wide = results(causal_conv, [leaf.float() for leaf in leaves], *output_gradients(shape))
    assert torch.equal(found["y"], wide["y"].bfloat16())
    assert found["new_window"].dtype == torch.float32
    assert torch.equal(found["new_window"], wide["new_window"])
    assert [found[name].dtype for name in NAMES] == [leaf.dtype for leaf in leaves]


def test_default_kernel_is_the_selected_one() -> None:
    inputs = [tensor.float() for tensor in make_inputs((1, 40, 20, 4))]
    for a, b in zip(causal_conv(*inputs), causal_conv(*inputs, kernel=selected("conv")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", lambda t: t[0], r"x: shape is \[5, 3\], must be \[B, T, E\]"),
        ("weight", lambda t: t[:, None], r"weight: shape is \[3, 1, 4\], must be \[E, W\]"),
        ("weight", lambda t: t[:2], r"weight: shape is \[2, 4\], must be \[3, 4\]"),
        ("weight", lambda t: t[:, :0], "weight: the width W is 0, must be at least 1"),
        ("bias", lambda t: t[:2], r"bias: shape is \[2\], must be \[3\]"),
        ("window", lambda t: t[..., 1:], r"window: shape is \[1, 3, 2\], must be \[1, 3, 3\]"),
        ("bias", lambda t: t.float(), "inputs must all be float64, or each float32.*bias float32"),
        ("window", lambda t: t.to("meta"), "runs on the CPU only; found window on meta"),
    ],
)
def test_wrong_input_is_refused(name: str, wrong: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = dict(zip(NAMES, make_inputs((1, 5, 3, 4)), strict=True))
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ValueError, match=message):
        causal_conv(**inputs)
