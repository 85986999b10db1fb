# SPDX-License-Identifier: Apache-2.0
"""Modelled activations against scalar arithmetic, and against what onnxruntime does."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mossquant.errors import InputError
from mossquant.formats.activations import ACTIVATION_FORMATS, get_activation_format, int8_block, int8_row_asym

Floats = NDArray[np.float32]


def vectors(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * size


def scalar_block(x: Floats, block: int) -> Floats:
    """One number at a time in numpy's float32."""
    out = np.zeros_like(x)
    for row, values in enumerate(x):
        for start in range(0, len(values), block):
            part = values[start : start + block]
            largest = np.float32(max(abs(value) for value in part))
            if largest == 0:
                continue
            scale, reciprocal = largest / np.float32(127), np.float32(127) / largest
            for i, value in enumerate(part):
                out[row, start + i] = np.rint(value * reciprocal) * scale
    return out


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("columns", [1, 24, 32, 33, 48, 200])
def test_block_is_the_scalar_form(columns: int, block: int) -> None:
    x = vectors(5, columns)
    x[1] = 0
    assert np.array_equal(int8_block(x, block).numpy(), scalar_block(x.numpy(), block))


def test_block_keeps_shape_and_type() -> None:
    x = vectors(6, 40).double().view(2, 3, 40)
    assert int8_block(x, 32).shape == x.shape
    assert int8_block(x, 32).dtype == torch.float64
    assert torch.equal(int8_block(x, 32), int8_block(x.float(), 32).double())
    assert int8_block(torch.empty(0, 40), 32).shape == (0, 40)


def test_block_ignores_a_positive_gate_on_codes() -> None:
    """A gated input and an expert's own quantize to the same codes where the gate is a power of two."""
    x = vectors(50, 64)
    assert torch.equal(int8_block(x * 0.25, 32), int8_block(x, 32) * 0.25)


def test_row_asym_holds_zero_and_both_ends() -> None:
    x = vectors(200, 48)
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
    out = int8_row_asym(x)
    step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255
    # Half a step of rounding; the zero point's own rounding can push the ends out by another half.
    assert bool(((out - x).abs() <= 1.001 * step).all())
    assert not out[0].any()
    zeroed = torch.where(torch.arange(48) % 2 == 0, 0.0, x)
    assert not int8_row_asym(zeroed)[:, ::2].any()
    assert len(set(out[5].tolist())) > 30


def test_row_asym_by_hand() -> None:
    """x in −1…3: u = 63.75, z = −64 (−128 + 63.75, rounded), codes round(63.75 x) − 64."""
    x = torch.tensor([[-1.0, 0.0, 0.3, 3.0]])
    assert torch.allclose(int8_row_asym(x), torch.tensor([[-64.0, 0.0, 19.0, 191.0]]) / 63.75, rtol=1e-6)


def onnx_codes(x: torch.Tensor, *, bits: int, block: int) -> NDArray[np.float64]:
    """The codes to which MatMulNBits rounds its input: weights are the identity, so that output / scale is the code."""
    columns = x.shape[1]
    blocks = -(-columns // block)
    codes = np.zeros((columns, blocks * block), np.uint8)
    codes[np.arange(columns), np.arange(columns)] = 1
    codes += np.uint8(1 << (bits - 1))
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=columns,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    shape: list[str | int | None] = ["rows", columns]
    graph = helper.make_graph(
        [node],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(codes.reshape(columns, blocks, -1), "codes"),
            numpy_helper.from_array(np.ones((columns, blocks), np.float32), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    largest = torch.nn.functional.pad(x.abs(), (0, blocks * block - columns)).view(len(x), blocks, block).amax(-1)
    scale = (largest / 127).repeat_interleave(block, 1)[:, :columns].numpy()
    read: NDArray[np.float64] = np.rint(session.run(None, {"x": x.numpy()})[0] / scale.astype(np.float64))
    return read


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block"), [(256, 32), (24, 32), (40, 32), (264, 128)])
@pytest.mark.parametrize("rows", [1, 3, 400])
def test_block_is_what_onnxruntime_does(bits: int, columns: int, block: int, rows: int) -> None:
    """Code for code: some 10⁵ values a case, among which dividing by the scale would miss one in 10⁵ to 10⁶."""
    for seed in range(1 if rows > 3 else 30):
        x = vectors(rows, columns, seed=seed)
        padded = torch.nn.functional.pad(x, (0, -columns % block))
        scale = padded.view(rows, -1, block).abs().amax(-1, keepdim=True) / 127
        mine = torch.nn.functional.pad(int8_block(x, block), (0, -columns % block)).view(rows, -1, block)
        codes = torch.round(mine.double() / scale.double()).flatten(1)[:, :columns]
        assert np.array_equal(codes.numpy(), onnx_codes(x, bits=bits, block=block))


def test_registry() -> None:
    assert list(ACTIVATION_FORMATS) == ["fp32", "int8_block", "int8_row_asym"]
    x = vectors(3, 40)
    assert get_activation_format("fp32").apply(x, 32) is x
    assert torch.equal(get_activation_format("int8_block").apply(x, 16), int8_block(x, 16))
    with pytest.raises(InputError, match="unknown activation format 'int7'; known formats: fp32, int8_block"):
        get_activation_format("int7")


def test_row_asym_near_the_smallest_floats() -> None:
    """255 / range overflows there: such a row counts as zero, and is a number."""
    for size in (1e-38, 1e-37, 1e-45):
        assert not int8_row_asym(torch.tensor([[size, 0.0, -size]])).any()
    assert int8_row_asym(torch.tensor([[1e-30, 0.0]]))[0, 0] > 0
