# SPDX-License-Identifier: Apache-2.0
"""The selective scan: values and all gradients, against autograd through a plain loop over time."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mossquant.kernels import available, selected
from mossquant.kernels.scan import selective_scan

from .bounds import F32_UNIT, F64_RELATIVE, SOFTPLUS_ULPS, exp_relative, f32_accumulated

NAMES = ("x", "dt", "A", "Bm", "Cm", "D", "h0")
SHAPES = [  # B, T, E, N: around the vector (4, 8, 16), the tile (64), the chunk (32), the group of states (4)
    (1, 0, 7, 5),
    (3, 1, 1, 1),
    (1, 31, 16, 16),
    (1, 32, 33, 5),
    (3, 33, 7, 17),
    (1, 100, 70, 16),
    (3, 100, 130, 4),
    (2, 65, 64, 3),
    (0, 5, 3, 2),
]
KERNELS = available("scan")

Outputs = tuple[Tensor, Tensor]


def loop_scan(
    x: Tensor, dt_decay: Tensor, dt_input: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor, h0: Tensor
) -> Outputs:
    """The definition, one step after the other. dt comes twice: for the decay and for the input."""
    zero = torch.zeros((), dtype=x.dtype)
    decay = torch.exp(torch.logaddexp(dt_decay, zero)[..., None] * A)  # [B, T, E, N]
    written = (torch.logaddexp(dt_input, zero) * x)[..., None] * Bm[:, :, None, :]
    h, y = h0, []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + written[:, t]
        y.append((h * Cm[:, t, None, :]).sum(-1) + D * x[:, t])
    return (torch.stack(y, dim=1) if y else x.sum() * x), h


def make_inputs(shape: tuple[int, int, int, int], seed: int = 0) -> list[Tensor]:
    """Float64 numbers that fp32 holds exactly, in the order of NAMES."""
    B, T, E, N = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float32).double()

    A = -torch.exp(normal(E, N)).float().double()
    return [normal(B, T, E), 2 * normal(B, T, E) - 2, A, normal(B, T, N), normal(B, T, N), normal(E), normal(B, E, N)]


def gradients(
    run: Callable[..., Outputs], inputs: Sequence[Tensor], dy: Tensor, dhT: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of run(*inputs), and the gradients of <dy, y> + <dhT, hT> (zeros where there is none)."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = run(*leaves)
    found = torch.autograd.grad(outputs, leaves, [dy.to(outputs[0].dtype), dhT.to(outputs[1].dtype)], allow_unused=True)
    return [output.detach() for output in outputs], [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)
    ]


def reference(inputs: Sequence[Tensor], dy: Tensor, dhT: Tensor) -> dict[str, Tensor]:
    x, dt, *rest = inputs
    outputs, (dx, d_decay, d_input, *others) = gradients(loop_scan, [x, dt, dt, *rest], dy, dhT)
    return dict(zip(("y", "hT", *NAMES), [*outputs, dx, d_decay + d_input, *others], strict=True))


def magnitudes(inputs: Sequence[Tensor], dy: Tensor, dhT: Tensor) -> dict[str, float]:
    """The largest value of each output and gradient when every term enters with its absolute value."""
    x, dt, A, *rest = inputs
    positive = [x.abs(), dt, dt, A, *(tensor.abs() for tensor in rest)]
    outputs, (dx, d_decay, d_input, *others) = gradients(loop_scan, positive, dy.abs(), dhT.abs())
    values = [*outputs, dx, d_decay.abs() + d_input.abs(), *others]
    return {name: largest(value) for name, value in zip(("y", "hT", *NAMES), values, strict=True)}


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def output_gradients(shape: tuple[int, int, int, int]) -> Outputs:
    B, T, E, N = shape
    random = torch.Generator().manual_seed(99)
    return (
        torch.randn(B, T, E, generator=random).double(),
        torch.randn(B, E, N, generator=random).double(),
    )


def scan_with(kernel: str, threads: int = 1) -> Callable[..., Outputs]:
    return lambda *inputs: selective_scan(*inputs, threads=threads, kernel=kernel)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_loop(shape: tuple[int, int, int, int]) -> None:
    inputs, (dy, dhT) = make_inputs(shape), output_gradients(shape)
    outputs, grads = gradients(scan_with("moss_scan_f64_scalar"), inputs, dy, dhT)
    found = dict(zip(("y", "hT", *NAMES), [*outputs, *grads], strict=True))
    for name, expected in reference(inputs, dy, dhT).items():
        error = largest(found[name] - expected)
        assert error <= F64_RELATIVE * largest(expected), f"{name}: {error:.3e} of {largest(expected):.3e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_near_float64(kernel: str, shape: tuple[int, int, int, int]) -> None:
    inputs, (dy, dhT) = make_inputs(shape), output_gradients(shape)
    outputs, grads = gradients(scan_with(kernel), [tensor.float() for tensor in inputs], dy, dhT)
    found = dict(zip(("y", "hT", *NAMES), [*outputs, *grads], strict=True))
    magnitude = magnitudes(inputs, dy, dhT)
    B, T, E, N = shape
    bound = f32_accumulated(B * T + E + N)  # the longest: dA over batch and time, dBm over channels, y over states
    for name, expected in reference(inputs, dy, dhT).items():
        error = largest(found[name].double() - expected)
        assert error <= bound * magnitude[name], f"{name}: {error / max(magnitude[name], 1e-300):.3e} > {bound:.3e}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_softplus_is_accurate(kernel: str) -> None:
    """From h = 0, one step with x = Bm = 1 leaves delta in the state."""
    dt = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-2, 2, 2001), torch.tensor([200.0, 1e4, 1e8])])
    E = dt.numel()
    ones = torch.ones(1, 1, 1)
    _, hT = selective_scan(
        torch.ones(1, 1, E), dt[None, None], -torch.ones(E, 1), ones, ones, torch.zeros(E), kernel=kernel
    )
    expected = torch.logaddexp(dt.double(), torch.zeros((), dtype=torch.float64))
    relative = (hT.flatten().double() - expected).abs() / expected
    worst = int(relative.argmax())
    assert relative[worst] <= SOFTPLUS_ULPS * F32_UNIT, f"dt {dt[worst]:.9g}: {relative[worst] / F32_UNIT:.2f} ulp"


@pytest.mark.parametrize("kernel", KERNELS)
def test_decay_is_accurate(kernel: str) -> None:
    """From h = 1, one step with x = 0 leaves exp(delta A) in the state; where that underflows, 0 or next to it."""
    A = -torch.cat([torch.linspace(0, 100, 5001), torch.logspace(-9, 9, 1001)])
    E = A.numel()
    dt = torch.full((1, 1, E), 0.75)
    zeros = torch.zeros(1, 1, 1)
    _, hT = selective_scan(
        torch.zeros(1, 1, E), dt, A[:, None], zeros, zeros, torch.zeros(E), torch.ones(1, E, 1), kernel=kernel
    )
    exponent = -A.double() * torch.logaddexp(dt.double(), torch.zeros((), dtype=torch.float64)).flatten()
    error = (hT.flatten().double() - torch.exp(-exponent)).abs()
    for i, z in enumerate(exponent.tolist()):
        bound = exp_relative(z) * torch.exp(torch.tensor(-z, dtype=torch.float64)).item() + 2.0**-125
        assert error[i] <= bound, f"exp(-{z:.9g}): error {error[i]:.3e} > {bound:.3e}"


@pytest.mark.parametrize("dt", [-100.0, 50.0, 200.0])
@pytest.mark.parametrize("kernel", [*KERNELS, "moss_scan_f64_scalar"])
def test_extreme_time_steps(kernel: str, dt: float) -> None:
    shape = (1, 40, 20, 16)
    inputs, (dy, dhT) = make_inputs(shape), output_gradients(shape)
    inputs[1] = torch.full_like(inputs[1], dt)
    narrow = inputs if "f64" in kernel else [tensor.float() for tensor in inputs]
    outputs, grads = gradients(scan_with(kernel), narrow, dy, dhT)
    magnitude = magnitudes(inputs, dy, dhT)
    bound = F64_RELATIVE if "f64" in kernel else f32_accumulated(40 + 20 + 16)
    found = dict(zip(("y", "hT", *NAMES), [*outputs, *grads], strict=True))
    for name, expected in reference(inputs, dy, dhT).items():
        assert found[name].isfinite().all(), name
        error = largest(found[name].double() - expected)
        assert error <= bound * magnitude[name] + (2.0**-125 if "f32" in kernel else 0), f"{name}: {error:.3e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["x", "dt", "A", "Bm", "h0"])
def test_nan_is_not_swallowed(kernel: str, where: str) -> None:
    inputs = [tensor.float() for tensor in make_inputs((1, 1, 20, 5))]
    index = NAMES.index(where)
    inputs[index].view(-1)[0] = torch.nan
    y, hT = selective_scan(*inputs, kernel=kernel)
    assert y.isnan().any()
    assert hT.isnan().any()


def test_gradcheck() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs((2, 4, 3, 2))]
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, threads=1), inputs)


@pytest.mark.parametrize("kernel", [*KERNELS, "moss_scan_f64_scalar"])
def test_split_calls_equal_one(kernel: str) -> None:
    """Where the split is at a chunk's end the operations are the very same; elsewhere too, for the forward."""
    inputs = [tensor if "f64" in kernel else tensor.float() for tensor in make_inputs((2, 100, 20, 16))]
    x, dt, A, Bm, Cm, D, h0 = inputs
    y, hT = selective_scan(*inputs, kernel=kernel)
    for cut in (1, 32, 37, 99):
        first, h = selective_scan(x[:, :cut], dt[:, :cut], A, Bm[:, :cut], Cm[:, :cut], D, h0, kernel=kernel)
        second, h = selective_scan(x[:, cut:], dt[:, cut:], A, Bm[:, cut:], Cm[:, cut:], D, h, kernel=kernel)
        assert torch.equal(torch.cat([first, second], dim=1), y)
        assert torch.equal(h, hT)


@pytest.mark.parametrize("kernel", [*KERNELS, "moss_scan_f64_scalar"])
def test_threads_change_nothing(kernel: str) -> None:
    shape = (3, 70, 200, 16)
    inputs = [tensor if "f64" in kernel else tensor.float() for tensor in make_inputs(shape)]
    one, two, many = (gradients(scan_with(kernel, n), inputs, *output_gradients(shape)) for n in (1, 2, 7))
    for other in (two, many):
        for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(a, b)


def test_no_first_state_means_zeros() -> None:
    *inputs, h0 = (tensor.float() for tensor in make_inputs((2, 40, 20, 5)))
    for a, b in zip(selective_scan(*inputs), selective_scan(*inputs, torch.zeros_like(h0)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", ["y", "hT"])
def test_only_one_output_used(used: str) -> None:
    shape = (2, 40, 20, 5)
    inputs, (dy, dhT) = make_inputs(shape), output_gradients(shape)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    y, hT = selective_scan(*leaves)
    found = torch.autograd.grad(*((y, leaves, dy) if used == "y" else (hT, leaves, dhT)), allow_unused=True)
    expected = reference(
        [leaf.detach() for leaf in leaves],
        dy if used == "y" else torch.zeros_like(dy),
        dhT if used == "hT" else torch.zeros_like(dhT),
    )
    for name, grad in zip(NAMES, found, strict=True):
        assert grad is not None, name
        assert largest(grad - expected[name]) <= F64_RELATIVE * largest(expected[name]), name


def test_bfloat16_is_computed_in_float32() -> None:
    shape = (2, 40, 20, 16)
    inputs = make_inputs(shape)
    narrow = {"x": torch.bfloat16, "Bm": torch.bfloat16, "Cm": torch.float16}
    leaves = [tensor.to(narrow.get(name, torch.float32)) for name, tensor in zip(NAMES, inputs, strict=True)]
    wide = [tensor.float() for tensor in leaves]
    (y, hT), grads = gradients(selective_scan, leaves, *output_gradients(shape))
    (wide_y, wide_hT), _ = gradients(selective_scan, wide, *output_gradients(shape))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wide_y.bfloat16())
    assert hT.dtype == torch.float32
    assert torch.equal(hT, wide_hT)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


def test_layout_does_not_matter() -> None:
    """Slices and transposes are copied, and their gradients go back where they came from."""
    x, dt, A, Bm, Cm, D, h0 = make_inputs((2, 40, 20, 16))
    both = torch.cat([Bm, Cm], dim=-1).requires_grad_()
    flipped = x.transpose(1, 2).contiguous().requires_grad_()
    y, hT = selective_scan(flipped.transpose(1, 2), dt, A, both[..., :16], both[..., 16:], D, h0)
    plain_y, plain_hT = selective_scan(x, dt, A, Bm, Cm, D, h0)
    assert torch.equal(y, plain_y)
    assert torch.equal(hT, plain_hT)
    y.sum().backward()
    assert flipped.grad is not None
    assert flipped.grad.shape == flipped.shape
    assert both.grad is not None
    assert bool((both.grad != 0).all())


def test_default_kernel_is_the_selected_one() -> None:
    inputs = [tensor.float() for tensor in make_inputs((1, 40, 20, 16))]
    for a, b in zip(selective_scan(*inputs), selective_scan(*inputs, kernel=selected("scan")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", lambda t: t[0], r"x: shape is \[4, 3\], must be \[B, T, E\]"),
        ("A", lambda t: t[0], r"A: shape is \[2\], must be \[E, N\]"),
        ("A", lambda t: t[:2], r"A: shape is \[2, 2\], must be \[3, 2\]"),
        ("dt", lambda t: t[:, :3], r"dt: shape is \[1, 3, 3\], must be \[1, 4, 3\]"),
        ("Bm", lambda t: t[..., :1], r"Bm: shape is \[1, 4, 1\], must be \[1, 4, 2\]"),
        ("Cm", lambda t: t[:, :0], r"Cm: shape is \[1, 0, 2\], must be \[1, 4, 2\]"),
        ("D", lambda t: t[:2], r"D: shape is \[2\], must be \[3\]"),
        ("h0", lambda t: t[..., None], r"h0: shape is \[1, 3, 2, 1\], must be \[1, 3, 2\]"),
        ("D", lambda t: t.float(), "inputs must all be float64, or each float32.*D float32"),
        ("x", lambda t: t.long(), "inputs must all be float64, or each float32.*x int64"),
        ("h0", lambda t: t.to("meta"), "runs on the CPU only; found h0 on meta"),
    ],
)
def test_wrong_input_is_refused(name: str, wrong: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = dict(zip(NAMES, make_inputs((1, 4, 3, 2)), strict=True))
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_wrong_choices_are_refused() -> None:
    inputs = make_inputs((1, 4, 3, 2))
    with pytest.raises(ValueError, match="threads: must be at least 1, is 0"):
        selective_scan(*inputs, threads=0)
    with pytest.raises(ValueError, match=r"'moss_scan_f32_scalar' is not one of those .* moss_scan_f64_scalar"):
        selective_scan(*inputs, kernel="moss_scan_f32_scalar")
