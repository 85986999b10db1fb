# SPDX-License-Identifier: Apache-2.0
"""torchao's weight-only methods on the linears of a MossNet: what each makes of them, dequantized, in fp32.

Every matrix [N, K], an expert's alone, is one `nn.Linear` for torchao, in 4 bits with groups of 32 columns; K that 32
does not divide (dt_proj's) is padded with zeros, as our formats pad it. Symmetric methods have bf16 scales: 4.5 bits,
ours too. "-zp" have zero points as well, and their bits count. Inputs are those of the rows that chose an expert,
without gates but where the model multiplies them before (dt_proj).

What is replaced, and only while a method runs:

    gptq   `gptq_quantize` is compiled anew without its assertion of CUDA and without `torch.cuda.synchronize`; its
           codes are not packed. mslk, which chooses scale and zero point of a group, needs CUDA: "gptq" takes torchao's
           own symmetric choice, "gptq-zp" mslk's formula as `Int4WeightFakeQuantizer` has it, in fp16.
    awq    `AWQObserver` searches as it is; the weight type that `AWQConfig` would convert to does not run on a CPU in
           fp32, so that q(W · s) / s is computed here. s takes 16 bits an input, which count.
    hqq    "hqq-zp" is `_choose_qparams_and_quantize_affine_hqq` with fp16 scales and zero points, its default.
    qat    `IntxFakeQuantizer` in the place of our student: our tokens, loss, optimizer and schedule. Adam's rate is
           chosen by KL on held-out calibration text: after an eighth of the tokens, of `QAT_RATES` and threefolds or
           thirds of them where the best lies at an end; then the best and a third of it, each over all tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchao.prototype.gptq.api as gptq_api
from torch import Tensor, nn
from torchao.prototype.awq.core import AWQObserver
from torchao.prototype.gptq.observer import GPTQObserverTensor
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_and_quantize_affine_hqq,
    choose_qparams_affine,
)
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm

import mossquant.calibration.recover as recovery
from mossquant.calibration.meter import Meter
from mossquant.calibration.options import dtypes_of
from mossquant.calibration.recover import Rates, recover
from mossquant.calibration.statistics import Input, inputs_of
from mossquant.calibration.text import CalibrationText
from mossquant.checkpoint.checkpoint import load_model
from mossquant.checkpoint.weights import View, Weights, value
from mossquant.formats import NumberFormat
from mossquant.model.forward import Forward
from mossquant.model.tensors import TensorSpec, Use
from mossquant.plan.plan import make_plan
from mossquant.plan.recipe import load_recipe

GROUP = 32
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
QAT_RATES = (1e-4, 3e-4, 1e-3)
AWQ_TOKENS = 32768
"""AWQ holds the inputs of a layer, and multiplies them 40 times."""
_PASS_WINDOWS = 4
_SCALE_BITS = 16
_MOST_RATES = 6

Values = dict[str, Tensor]
"""Tensor's name → its fp32 values in the checkpoint's shape, of those that changed."""


class Made(NamedTuple):
    """What a method made.

    Attributes:
        values: of the tensors that changed.
        bits: of all linears, stored.
        notes: what was done otherwise for some of them.
    """

    values: Values
    bits: int
    notes: list[str]


class Replaced(View):
    """A full-precision model with other values of some tensors."""

    def __init__(self, weights: Weights, values: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self._values = values

    def format(self, name: str) -> NumberFormat | None:
        """None: everything is values."""
        return None

    def kept(self, name: str) -> Tensor:
        """The values."""
        return self._values[name] if name in self._values else self._weights.kept(name)


def linears_of(weights: Weights) -> list[TensorSpec]:
    """The matrices of all linears of blocks: not the table, the head, routers and small tensors."""
    uses = {Use.LINEAR, Use.SUMMED}
    return [spec for spec in weights.specs.values() if spec.layer is not None and spec.use & uses]


def rtn(weights: Weights) -> Made:
    """Round to nearest."""
    return _each(weights, lambda matrix: _quantized(matrix, _intx()))


def rtn_zp(weights: Weights) -> Made:
    """Round to nearest with zero points of 4 bits."""
    return _each(weights, lambda matrix: _quantized(matrix, _intx(MappingType.ASYMMETRIC)), zero_bits=4)


def hqq(weights: Weights) -> Made:
    """HQQ's scales."""
    config = _intx(algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY)
    return _each(weights, lambda matrix: _quantized(matrix, config))


def hqq_zp(weights: Weights) -> Made:
    """HQQ's scales and zero points, both fp16."""

    def solve(matrix: Tensor) -> Tensor:
        codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
            matrix, nbits=4, group_size=GROUP, compute_dtype=torch.float16, device="cpu"
        )
        groups = (codes.float() - 8).view(-1, GROUP)  # tinygemm's way: (code − 8) · scale + zero
        values: Tensor = groups * scale.float().view(-1, 1) + zero.float().view(-1, 1)
        return values.view(matrix.shape)

    return _each(weights, solve, zero_bits=16)


def gptq(weights: Weights, windows: Tensor) -> Made:
    """GPTQ, symmetric."""
    return _gptq(weights, windows, _symmetric, zero_bits=0)


def gptq_zp(weights: Weights, windows: Tensor) -> Made:
    """GPTQ with zero points of 16 bits."""
    return _gptq(weights, windows, _min_and_max, zero_bits=16)


def awq(weights: Weights, windows: Tensor) -> Made:
    """AWQ, symmetric."""
    return _awq(weights, windows, _intx(), zero_bits=0)


def awq_zp(weights: Weights, windows: Tensor) -> Made:
    """AWQ with zero points of 4 bits."""
    return _awq(weights, windows, _intx(MappingType.ASYMMETRIC), zero_bits=4)


def qat(
    weights: Weights, text: CalibrationText, judged: Tensor, tokens: int, said: Callable[[str], None] = print
) -> Made:
    """Quantization-aware training of everything, linears through fake quantizers.

    Args:
        weights: the model.
        text: what is learned from.
        judged: held-out windows [W, T] of the same text, by which the rate is chosen.
        tokens: how many to learn from.
        said: called with a line about each rate.
    """
    meter = Meter(weights, judged)
    # The student is another, so that nothing of a plan is used; a run is told from others by it.
    plan = make_plan(weights.config, dtypes_of(weights), load_recipe("int4-uniform"))

    def kl(values: Values) -> float:
        return float(meter.kl({weights.specs[name]: tensor for name, tensor in values.items()}).mean())

    def trained(rate: float, count: int) -> Values:
        with mock.patch.object(recovery, "Student", FakeQuantized):
            rates = Rates(codes=rate, small=rate, scales=rate, kept=rate)
            made = recover(weights, plan, {}, text, tokens=count, rates=rates)
        return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)}

    found, best = dict[float, float](), 0.0
    tried = list(QAT_RATES)
    while tried and len(found) < _MOST_RATES:
        for rate in tried:
            found[rate] = kl(trained(rate, max(1, tokens // 8)))
            said(f"QAT, rate {rate:.2g}: KL {found[rate]:.3e}")
        best = min(found, key=found.__getitem__)
        ends = {min(found): best / 3, max(found): best * 3}
        tried = [ends[best]] if best in ends else []
    rounded, runs = rtn(weights), dict[float, Values]()
    for rate in (best, best / 3):  # what is best over few tokens may be too much over many
        runs[rate] = trained(rate, tokens)
        found[rate] = kl(runs[rate])
        said(f"QAT, rate {rate:.2g}, all tokens: KL {found[rate]:.3e}")
    best = min(runs, key=found.__getitem__)
    values, notes = runs[best], [f"rate {best:.2g}"]
    if found[best] >= kl(rounded.values):
        values, notes = rounded.values, ["training raised KL on held-out calibration text: left out"]
    return Made(values, rounded.bits, notes)


class FakeQuantized:
    """In the place of `mossquant.calibration.student.Student`: weights behind torchao's fake quantizers."""

    def __init__(self, weights: Weights, plan: object, solved: object, *, codes: bool, device: str = "cpu") -> None:
        linear = {spec.name for spec in linears_of(weights)}
        of_parameter: dict[tuple[int | None, str], list[TensorSpec]] = {}
        for spec in weights.specs.values():
            of_parameter.setdefault((spec.layer, spec.role), []).append(spec)
        self._specs = {specs[0].name: specs for specs in of_parameter.values()}
        self._leaves, self._quantizers = dict[str, nn.Parameter](), dict[str, IntxFakeQuantizer]()
        for name, specs in self._specs.items():
            stacked = torch.stack([value(weights, spec.name) for spec in specs])
            self._leaves[name] = nn.Parameter(stacked.to(device))
            if name in linear:
                config = IntxFakeQuantizeConfig(INT4, group_size=GROUP, scale_precision=torch.bfloat16)
                self._quantizers[name] = IntxFakeQuantizer(config)
        self.groups = {"codes": list(self._leaves.values())}
        self._values: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Quantize anew: scales follow the weights."""
        self._values = {name: self._value(name) for name in self._leaves}

    def parameter(self, names: Sequence[str], parameter: Tensor) -> Tensor:
        """What is computed with in place of a parameter."""
        return self._values[names[0]].view(parameter.shape)

    def stay_in_range(self) -> None:
        """Scales follow."""

    def tensors(self) -> Values:
        """Every tensor's values."""
        with torch.no_grad():
            self.refresh()
        return {
            spec.name: tensor.float().clone()
            for name, specs in self._specs.items()
            for spec, tensor in zip(specs, self._values[name], strict=True)
        }

    def _value(self, name: str) -> Tensor:
        leaf = self._leaves[name]
        if name not in self._quantizers:
            return leaf
        matrices = leaf.flatten(0, 1)
        made: Tensor = self._quantizers[name](_padded(matrices))
        return made[:, : matrices.shape[1]].reshape(leaf.shape)


def _padded(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[1] % GROUP))


def _stored_bits(specs: Sequence[TensorSpec], zero_bits: int) -> int:
    """Codes with their padding, scales and zero points."""
    groups = sum(spec.matrix_shape[0] * -(-spec.matrix_shape[1] // GROUP) for spec in specs)
    return groups * (4 * GROUP + _SCALE_BITS + zero_bits)


def _intx(
    mapping: MappingType = MappingType.SYMMETRIC,
    algorithm: IntxChooseQParamsAlgorithm = IntxChooseQParamsAlgorithm.AFFINE,
) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=INT4,
        granularity=PerGroup(GROUP),
        mapping_type=mapping,
        scale_dtype=torch.bfloat16,
        intx_choose_qparams_algorithm=algorithm,
    )


def _quantized(matrix: Tensor, config: IntxWeightOnlyConfig) -> Tensor:
    """What `quantize_` makes of a linear with this weight, dequantized."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    quantize_(linear, config)
    values: Tensor = linear.weight.dequantize()
    return values.float()


def _each(weights: Weights, solve: Callable[[Tensor], Tensor], *, zero_bits: int = 0) -> Made:
    """A method that knows the weights alone."""
    specs, values = linears_of(weights), Values()
    for spec in specs:
        matrix = value(weights, spec.name)
        values[spec.name] = solve(_padded(matrix))[:, : matrix.shape[1]].contiguous()
    return Made(values, _stored_bits(specs, zero_bits), [])


def _gptq(weights: Weights, windows: Tensor, choose: Callable[..., Any], *, zero_bits: int) -> Made:
    specs, entries = linears_of(weights), _inputs(weights)
    observers = {
        entry.name: GPTQObserverTensor.from_hp(torch.zeros(1, entry.width + -entry.width % GROUP)) for entry in entries
    }
    for entry, x in _observed(weights, windows):
        observers[entry.name].update_2d(x)
    values, notes = Values(), list[str]()
    with mock.patch.object(gptq_api, "int4_row_quantize_zp", choose):
        config = gptq_api.GPTQConfig(step="convert", base_config=Int4WeightOnlyConfig(group_size=GROUP))
        solve = _gptq_quantize(choose)
    for entry in entries:
        observed = observers.pop(entry.name)
        for name in entry.tensors:
            matrix = value(weights, name)
            if int(observed.total_batches) == 0:
                notes.append(f"{name}: no input came, rounded to nearest")
                solved = _quantized(_padded(matrix), _intx())
            else:
                with torch.no_grad():
                    solved = solve(observed.hessian.clone(), _padded(matrix).clone(), config)
            values[name] = solved[:, : matrix.shape[1]].contiguous()
    return Made(values, _stored_bits(specs, zero_bits), notes)


def _gptq_quantize(choose: Callable[..., Any]) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """torchao's `gptq_quantize` for the CPU: its source, of which each part that is replaced is there once."""
    source = inspect.getsource(gptq_api.gptq_quantize)
    for part in ('assert device.type == "cuda", "GPTQ only supports CUDA currently"', "torch.cuda.synchronize()"):
        if source.count(part) != 1:
            raise RuntimeError(f"this torchao's gptq_quantize is another: {part!r} is not in it once")
        source = source.replace(part, "pass")

    def dequantized(*, qdata: Tensor, scale: Tensor, zero_point: Tensor, **_: object) -> Tensor:
        values: Tensor = gptq_api._int4_row_dequantize_zp(qdata, scale, zero_point, GROUP)
        return values

    known = {**vars(gptq_api), "int4_row_quantize_zp": choose, "pack_int4": lambda codes: codes}
    known["Int4Tensor"] = dequantized
    constants = compile(source, gptq_api.__file__, "exec").co_consts
    code = next(one for one in constants if isinstance(one, CodeType) and one.co_name == "gptq_quantize")
    solve: Callable[[Tensor, Tensor, Any], Tensor] = FunctionType(code, known)
    return solve


def _symmetric(x: Tensor, group_size: int) -> tuple[None, Tensor, Tensor]:
    """(codes, scales [groups, N], zero points) of x [N, K] as `IntxWeightOnlyConfig` chooses them, in bf16."""
    scale, _ = choose_qparams_affine(
        x, MappingType.SYMMETRIC, (1, group_size), torch.int8, -8, 7, zero_point_dtype=torch.int8, keepdim=True
    )
    scale = scale.bfloat16().float().T.contiguous()
    return None, scale, torch.zeros_like(scale)


def _min_and_max(x: Tensor, group_size: int) -> tuple[None, Tensor, Tensor]:
    """The same as mslk's `int4_row_quantize_zp`, in fp16: the zero point is what code 0 of −8…7 means."""
    groups = x.float().reshape(len(x), -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low).clamp_min(1e-6) / 15).half().float()
    zero = (low + scale * 8).half().float()
    return None, scale.T.contiguous(), zero.T.contiguous()


def _awq(weights: Weights, windows: Tensor, config: IntxWeightOnlyConfig, *, zero_bits: int) -> Made:
    specs, values, notes = linears_of(weights), Values(), list[str]()
    windows = windows[: max(1, AWQ_TOKENS // windows.shape[1])]
    for layer in sorted({spec.layer for spec in specs if spec.layer is not None}):
        entries, inputs = [entry for entry in _inputs(weights) if entry.layer == layer], dict[str, list[Tensor]]()
        for entry, x in _observed(weights, windows, layer=layer):
            inputs.setdefault(entry.name, []).append(x)
        for entry in entries:
            for name in entry.tensors:
                matrix = value(weights, name)
                if entry.name not in inputs:
                    notes.append(f"{name}: no input came, rounded to nearest")
                    values[name] = _quantized(_padded(matrix), config)[:, : matrix.shape[1]].contiguous()
                    continue
                padded = _padded(matrix)
                observer = AWQObserver(padded, None, config)
                observer.inputs = [torch.cat(inputs[entry.name])]
                scale = observer.calculate_qparams()
                values[name] = (_quantized(padded * scale, config) / scale)[:, : matrix.shape[1]].contiguous()
    scale_bits = _SCALE_BITS * sum(spec.matrix_shape[1] for spec in specs)
    return Made(values, _stored_bits(specs, zero_bits) + scale_bits, notes)


def _inputs(weights: Weights) -> list[Input]:
    return inputs_of(linears_of(weights))


def _observed(weights: Weights, windows: Tensor, *, layer: int | None = None) -> Iterator[tuple[Input, Tensor]]:
    """(input, rows [n, K padded]) of every linear's inputs, of one layer or all, over windows [W, T]."""
    model, seen = load_model(weights), list[tuple[Input, Tensor]]()
    readers = {entry.tensors[0]: entry for entry in _inputs(weights) if layer in (None, entry.layer)}

    def observe(names: Sequence[str], x: Tensor, rows: Tensor | None, gates: Tensor | None, out: Tensor) -> None:
        entry = readers.get(names[0])
        if entry is not None and len(x):
            seen.append((entry, _padded(x)))

    for part in torch.split(windows, _PASS_WINDOWS):
        with torch.no_grad():
            model.hidden(part, model.initial_state(len(part)), Forward(observe=observe))
        yield from seen
        seen.clear()
