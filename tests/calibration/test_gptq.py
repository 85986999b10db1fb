# SPDX-License-Identifier: Apache-2.0
"""GPTQ against Optimal Brain Surgeon column by column, what it promises to lower, and inputs that are awkward."""

from dataclasses import replace

import bounds
import pytest
import torch
from torch import Tensor

from mossquant.calibration.gptq import DAMPINGS, DEFAULT_DAMPING, GPTQ, POWER, shrunk
from mossquant.calibration.nearest import mse_scales, nearest, nearest_mse
from mossquant.calibration.statistics import Hessian
from mossquant.formats import FORMATS, NumberFormat, QuantizedTensor

EVERY = pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))


def inputs(tokens: int, columns: int, *, seed: int = 0) -> Tensor:
    """Rows that depend on one another, of unequal sizes: float64 [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mixed + torch.ones(1)) * sizes


def weights(rows: int, columns: int) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(9))


def hessian(x: Tensor, held_out: Tensor | None = None, *, effective: float = 1e6) -> Hessian:
    """Of inputs x [n, K]; the quota is 4 · K."""
    sketch = torch.zeros(1, x.shape[1], dtype=torch.float64) if held_out is None else held_out
    return Hessian(x.T @ x / len(x), effective, 4.0 * x.shape[1], sketch)


def solved(form: NumberFormat, matrix: Tensor, known: Hessian | None) -> QuantizedTensor:
    return GPTQ.prepare(form, {"hessian": known, "rows": matrix[:64]})(matrix)


def loss(found: QuantizedTensor, matrix: Tensor, moments: Tensor) -> float:
    """tr(E H Eᵀ)."""
    error = found.dequantize().double() - matrix.double()
    return float(((error @ moments) * error).sum())


def square_root(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix, by Denman and Beavers' iteration (1976)."""
    root, inverse = matrix, torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(60):
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    return root


def surgeon(form: NumberFormat, matrix: Tensor, moments: Tensor, damping: float) -> Tensor:
    """Codes by Optimal Brain Surgeon (Hassibi & Stork 1993), a row at a time, the inverse made anew for each column."""
    moments = moments / moments.diagonal().mean()
    half = square_root(moments)
    power = {0.5: half, 0.75: half @ square_root(half), 1.0: moments}[POWER]
    damped = power + damping * power.diagonal().mean() * torch.eye(len(power), dtype=power.dtype)
    scales = mse_scales(form, matrix, damped.diagonal().float()).double()
    order = sorted(range(len(moments)), key=lambda k: -float(moments[k, k]))
    size = form.padded_columns(matrix.shape[1]) // scales.shape[1]
    codes = torch.zeros(matrix.shape)
    for row, w in enumerate(matrix.double().clone()):
        for at, j in enumerate(order):
            scale, rest = scales[row, j // size], order[at:]
            inverse = torch.linalg.inv(damped[rest][:, rest])
            code = torch.round(w[j] / scale).clamp(form.code_min, form.code_max)
            codes[row, j] = code
            w[rest] -= (w[j] - code * scale) / inverse[0, 0] * inverse[0]
    return codes


@EVERY
@pytest.mark.parametrize("columns", [5, 40, 130])
def test_codes_are_those_of_the_surgeon(form: NumberFormat, columns: int) -> None:
    matrix, known = weights(3, columns), hessian(inputs(400, columns))
    expected = surgeon(form, matrix, known.mean, DEFAULT_DAMPING)
    found = solved(form, matrix, known).codes
    assert torch.equal(found[:, :columns].float(), expected)
    assert not found[:, columns:].any()


@EVERY
def test_what_it_promises_to_lower_is_lower(form: NumberFormat) -> None:
    """The error at the outputs, on the inputs it was made from and on others."""
    x, matrix = inputs(2000, 96), weights(50, 96)
    found = solved(form, matrix, hessian(x[:1000], x[1000:1500]))
    plain = nearest_mse(form, matrix)
    for part in (x[:1000], x[1500:]):
        assert loss(found, matrix, part.T @ part) < 0.7 * loss(plain, matrix, part.T @ part)


def test_weighed_scales_cost_less_where_it_counts() -> None:
    form, matrix = FORMATS["int4_g32"], weights(64, 96)
    costs = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-4
    moments = torch.diag(costs.double())
    weighed, plain = nearest_mse(form, matrix, costs), nearest_mse(form, matrix)
    assert loss(weighed, matrix, moments) < 0.97 * loss(plain, matrix, moments)
    same = nearest_mse(form, matrix, torch.ones(96))
    assert torch.equal(same.codes, plain.codes)
    assert torch.equal(same.scales, plain.scales)


def test_the_damping_is_the_one_that_held_out_inputs_want() -> None:
    """Few inputs say little: much damping; many of the same kind say all: little."""
    form, matrix, x = FORMATS["int4_g32"], weights(64, 64), inputs(4000, 64)
    for learned in (x[:70], x[:3000]):
        found = solved(form, matrix, hessian(learned, x[3000:]))
        moments = x[3000:].T @ x[3000:]
        fixed = []
        for damping in DAMPINGS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("mossquant.calibration.gptq.DAMPINGS", (damping,))
                fixed.append(loss(solved(form, matrix, hessian(learned, x[3000:])), matrix, moments))
        assert loss(found, matrix, moments) == min(fixed)


def test_too_little_text_is_shrunk_and_named() -> None:
    form, matrix, x = FORMATS["int4_g32"], weights(20, 32), inputs(500, 32)
    few = hessian(x[:4], effective=4)
    own = few.mean
    assert torch.equal(shrunk(few), own * (4 / 128) + torch.diag(own.diagonal()) * (1 - 4 / 128))
    pooled = replace(few, others=x.T @ x / len(x))
    assert pooled.others is not None
    assert torch.equal(shrunk(pooled), own * (4 / 128) + pooled.others * (1 - 4 / 128))
    assert torch.equal(shrunk(hessian(x)), hessian(x).mean)
    said = GPTQ.note({"hessian": pooled})
    assert said is not None
    assert "4 of 128 effective tokens: H shrunk toward that of all experts of its layer" in said
    assert "nothing was held out for it" in said
    assert "its own diagonal" in str(GPTQ.note({"hessian": few}))
    assert GPTQ.note({"hessian": hessian(x, x)}) is None
    moments = x.T @ x
    assert loss(solved(form, matrix, pooled), matrix, moments) < loss(solved(form, matrix, few), matrix, moments)


def _awkward() -> dict[str, tuple[Tensor, str | None]]:
    """Inputs [n, 48], and what the ledger must say of them."""
    x = inputs(300, 48)
    column, outliers, huge = x.clone(), x.clone(), x.clone()
    column[:, 7] = 0
    outliers[::50, 3] = 1e4
    huge[:, :] *= 1e15
    return {
        "one column is zero": (column, None),
        "constant": (torch.ones_like(x), None),
        "rank one": (x[:1].expand(300, 48), None),
        "fewer tokens than columns": (x[:10], None),
        "one token": (x[:1], "1 of 192"),
        "outliers of 1e4": (outliers, None),
        "the largest of fp32 squared": (huge, None),
        "tiny": (x * 1e-20, None),
        "all zero": (torch.zeros_like(x), "all its inputs were zero: nearest-mse"),
    }


@EVERY
@pytest.mark.parametrize("kind", list(_awkward()))
def test_awkward_inputs(form: NumberFormat, kind: str) -> None:
    x, said = _awkward()[kind]
    matrix = weights(9, 48).half().float()
    matrix[0] = 0
    known = hessian(x, x, effective=len(x) if len(x) < 192 else 1e6)
    found = solved(form, matrix, known)
    assert bool(torch.isfinite(found.scales.float()).all())
    assert bool((found.scales > 0).all())
    assert bool(torch.isfinite(found.dequantize()).all())
    # What the inputs do not tell of stays as near as rounding brings it.
    assert float((found.dequantize() - matrix).norm() / matrix.norm()) < (0.35 if form.bits == 4 else 0.05)
    if said is not None:
        assert said in str(GPTQ.note({"hessian": known}))
    plain, moments = nearest_mse(form, matrix), shrunk(known)
    assert loss(found, matrix, moments) <= loss(plain, matrix, moments) * (1 + bounds.SUM_ROUNDING)


def test_nothing_measured_is_nearest_mse_and_said() -> None:
    form, matrix = FORMATS["int4_g32"], weights(9, 48)
    empty = hessian(torch.zeros(1, 48, dtype=torch.float64), effective=0)
    for known, said in ((None, "no linear multiplies it"), (empty, "no calibration text reached it")):
        assert torch.equal(solved(form, matrix, known).codes, nearest_mse(form, matrix).codes)
        assert said in str(GPTQ.note({"hessian": known}))
    assert not torch.equal(nearest(form, matrix).codes, nearest_mse(form, matrix).codes)
