# SPDX-License-Identifier: Apache-2.0
"""How codes lie in a quantized checkpoint: compressed-tensors' `pack-quantized` convention.

A code of b bits is stored as code + 2^(b−1), first code in the lowest bits, 32/b codes in an int32. A tensor NAME
becomes NAME_packed int32 [rows, padded_columns · b / 32], NAME_scale [rows, groups] and NAME_shape int64 [2] = (rows,
padded_columns). For the weights of modules, which compressed-tensors knows, that gives weight_packed, weight_scale and
weight_shape; for the other tensors the same suffixes are ours.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mossquant.formats import NumberFormat, QuantizedTensor, get_format
from mossquant.formats.nibbles import pack_nibbles, unpack_nibbles
from mossquant.model.tensors import TensorSpec
from mossquant.plan.plan import Plan

_CONVENTION = "0.20.0"
"""Release of compressed-tensors whose convention this is."""


def stored_names(name: str) -> tuple[str, str, str]:
    """Names of the codes, the scales and the padded shape of a quantized tensor."""
    return f"{name}_packed", f"{name}_scale", f"{name}_shape"


def stored_layout(
    name: str, number_format: NumberFormat, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every stored tensor of a quantized matrix [rows, columns], by name, in their order."""
    packed, scale, shape = stored_names(name)
    words = number_format.padded_columns(columns) * number_format.bits // 32
    return {
        packed: ((rows, words), torch.int32),
        scale: ((rows, number_format.groups(columns)), number_format.scale_dtype),
        shape: ((2,), torch.int64),
    }


class PackedTensor:
    """A quantized matrix [rows, columns] as it is stored, put together from blocks of rows.

    Attributes:
        padded_shape: (rows, columns with padding).
        tensors: stored name → tensor; their content is undefined until every row was put.
    """

    def __init__(self, name: str, number_format: NumberFormat, rows: int, columns: int) -> None:
        layout = stored_layout(name, number_format, rows, columns)
        self.tensors = {stored: torch.empty(shape, dtype=dtype) for stored, (shape, dtype) in layout.items()}
        self._bits = number_format.bits
        self._words, self._scales, shape = (self.tensors[stored] for stored in stored_names(name))
        self.padded_shape = rows, number_format.padded_columns(columns)
        shape.copy_(torch.tensor(self.padded_shape))

    @property
    def payload_bytes(self) -> int:
        """Bytes of codes, padding and scales."""
        return self._words.nbytes + self._scales.nbytes

    def put(self, rows: slice, block: QuantizedTensor) -> None:
        """Pack these rows."""
        self._words[rows] = pack(block.codes, self._bits)
        self._scales[rows] = block.scales


def read_quantized(
    name: str, number_format: NumberFormat, rows: int, columns: int, tensor: Callable[[str], Tensor]
) -> QuantizedTensor:
    """The quantized matrix [rows, columns] of this name; `tensor` gives a stored tensor by its name."""
    packed, scale, _ = stored_names(name)
    return QuantizedTensor(number_format, unpack(tensor(packed), number_format.bits), tensor(scale), rows, columns)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [rows, padded_columns], whole words a row → int32 [rows, padded_columns · bits / 32]."""
    packed = torch.from_numpy(pack_nibbles(codes.numpy())) if bits == 4 else codes.view(torch.uint8) ^ 128
    return packed.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`. At 4 bits it holds half of its result on top, at 8 bits nothing."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (unsigned ^ 128).view(torch.int8)
    return torch.from_numpy(unpack_nibbles(unsigned.numpy()))


def is_module_weight(spec: TensorSpec) -> bool:
    """Whether compressed-tensors knows such a tensor: the matrix of a linear or an embedding."""
    return len(spec.shape) == 2 and spec.name.endswith(".weight")


def quantization_config(specs: Mapping[str, TensorSpec], plan: Plan) -> dict[str, Any]:
    """`quantization_config` of a config.json: which modules are stored in which format."""
    groups: dict[str, list[str]] = {}
    kept = []
    for entry in plan.tensors:
        if not is_module_weight(specs[entry.name]):
            continue
        if entry.format is None:
            kept.append(entry.name)
        else:
            groups.setdefault(entry.format, []).append(entry.name)
    modules = [name for names in (*groups.values(), kept) for name in names]
    return {
        "quant_method": "compressed-tensors",
        "version": _CONVENTION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": _targets(names, modules),
                "weights": _weight_args(get_format(name)),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, (name, names) in enumerate(groups.items())
        },
        "ignore": _targets(kept, modules),
    }


def _weight_args(number_format: NumberFormat) -> dict[str, Any]:
    return {
        "num_bits": number_format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if number_format.group_size is None else "group",
        "group_size": number_format.group_size,
        "dynamic": False,
    }


def _targets(names: list[str], everything: list[str]) -> list[str]:
    """Module names as compressed-tensors matches them: one expression for a family (layers, experts) that is whole."""
    families: dict[str, list[str]] = {}
    for name in everything:
        families.setdefault(_family(name), []).append(name)
    wanted = set(names)
    out: dict[str, None] = {}
    for name in names:
        whole = wanted.issuperset(families[_family(name)])
        out[_family(name) if whole else name.removesuffix(".weight")] = None
    return list(out)


def _family(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return "re:^" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "$"
