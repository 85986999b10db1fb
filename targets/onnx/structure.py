# SPDX-License-Identifier: Apache-2.0
"""Whether a program is, node for node, what this release lowers a model of its config to.

onnxruntime believes a graph: one with another size, attribute or operator may take any amount of memory, or read beside
its weights. So no graph is looked into or loaded but one that this release would have written itself. The formats of
the tensors are read off the initializers, the model is lowered again without its weights, and the two must be equal
byte for byte in everything but the contents of the weights. What the contents may be, `check_weights` says.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from mossquant.checkpoint.weights import Origin
from mossquant.errors import InputError
from mossquant.formats import FORMATS, NumberFormat, QuantizedTensor
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import parameter_count, tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.release import release
from mossquant.targets.onnx.file_graph import expanding, stored_array
from mossquant.targets.onnx.lower import lower
from mossquant.targets.onnx.metadata import METADATA_KEY, Opened, initializers
from mossquant.targets.onnx.packing import DTYPES
from mossquant.targets.onnx.weights import SCALE, initializer_name

__all__ = ["check_structure", "check_weights"]

_AGAIN = "Copy the artifact's folder again, or export again."
_KEPT = {kind.value: dtype for dtype, kind in DTYPES.items()}
_EXTERNAL_KEYS = ["length", "location", "offset"]


class _Different(Exception):
    """Where a program is not what it should be, in a few words."""


def check_structure(opened: Opened) -> None:
    """Hold a program against what its config and formats lower to.

    Raises:
        InputError: it differs: it was changed, or another release lowered it.
    """
    try:
        _check(opened)
    except _Different as where:
        wrote = opened.metadata.release
        other = "" if wrote == release() else f" (mossquant {wrote[:40]} wrote it, this is {release()})"
        raise InputError.listing(
            f"{opened.path} is not the program that its config lowers to{other}", [str(where)], _AGAIN
        ) from None


def check_weights(opened: Opened) -> None:
    """Look at every value of a program whose structure was checked.

    Raises:
        InputError: values or scales that are not finite, scales out of their format's range, codes that it does not
            have: all offenders at once.
    """
    formats = _Formats(opened.config, opened.proto)
    folder = opened.path.parent
    offenders = []
    for tensor in _weights(opened.proto.graph):
        array = stored_array(tensor, folder)
        owner = formats.of_initializer(tensor.name.removesuffix(SCALE))
        if tensor.name.endswith(SCALE) and owner is not None:
            scales = array.astype(np.float32)
            if not ((scales > 0) & (scales <= owner.max_scale)).all():
                offenders.append(f"{tensor.name} holds scales that are not positive and finite, or too large")
        elif tensor.data_type in _KEPT:
            if not np.isfinite(array.astype(np.float32)).all():
                offenders.append(f"{tensor.name} holds NaN or infinite values")
        elif owner is not None and owner.bits == 8 and (_signed(array) < owner.code_min).any():
            offenders.append(f"{tensor.name} holds codes below {owner.code_min}")
    if offenders:
        raise InputError.listing(f"{opened.path} is damaged", offenders, _AGAIN)


def _signed(codes: NDArray[np.generic]) -> NDArray[np.int16]:
    return codes.astype(np.int16) - (128 if codes.dtype == np.uint8 else 0)


def _check(opened: Opened) -> None:
    if [prop.key for prop in opened.proto.metadata_props] != [METADATA_KEY]:
        raise _Different("its metadata has more than one entry")
    source = _Formats(opened.config, opened.proto)
    expected, weight_bytes = _lowered(source)
    found = onnx.ModelProto()
    found.CopyFrom(opened.proto)
    del found.metadata_props[:]
    _compare(_without_contents(found), _without_contents(expected))
    if opened.metadata.weight_bytes != weight_bytes:
        raise _Different(f"its weights have {weight_bytes} bytes, its metadata says {opened.metadata.weight_bytes}")
    if opened.metadata.parameters < parameter_count(opened.config):
        raise _Different(f"its metadata says {opened.metadata.parameters} parameters, fewer than the model has")
    data_bytes = opened.metadata.data.bytes if opened.metadata.data else 0
    for tensor in _weights(opened.proto.graph):
        _check_extent(tensor, data_bytes)


def _lowered(source: "_Formats") -> tuple[onnx.ModelProto, int]:
    """The program of these formats, its weights named and sized but not there, and the bytes that they have."""
    model, weight_bytes = lower(source, list(source.specs.values()))
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(lazy := value.const_value, ir.LazyTensor):
                assert lazy.name is not None
                value.const_value = ir.ExternalTensor("-", 0, 0, lazy.dtype, shape=lazy.shape, name=lazy.name)
    return ir.to_proto(model), weight_bytes


def _weights(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The initializers that hold tensors of the model: they are called after them, other constants have no dot."""
    return [tensor for tensor in initializers(graph) if "." in tensor.name]


def _without_contents(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in _weights(model.graph):
        for field in ("raw_data", "external_data", "data_location"):
            tensor.ClearField(field)
    return model


def _compare(found: onnx.ModelProto, expected: onnx.ModelProto) -> None:
    if _bytes(found) != _bytes(expected):
        _first_difference(found.graph, expected.graph)
        raise _Different("its header is another one")


def _first_difference(found: onnx.GraphProto, expected: onnx.GraphProto) -> None:
    """Raise for the first part of a graph that is another one; of a branch or loop, the part inside it."""
    for what in ("node", "initializer", "input", "output", "value_info"):
        theirs, ours = getattr(found, what), getattr(expected, what)
        for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            if _bytes(one) == _bytes(other):
                continue
            if what == "node":
                for inner, wanted in zip(one.attribute, other.attribute, strict=False):
                    if inner.HasField("g") and wanted.HasField("g") and _bytes(inner) != _bytes(wanted):
                        _first_difference(inner.g, wanted.g)
            kind = f"{other.op_type} {other.name}".strip() if what == "node" else other.name
            raise _Different(f"{what} {index} of its graph ({kind}) is another one")
        if len(ours) != len(theirs):
            raise _Different(f"one of its graphs has {len(theirs)} entries under {what}, it should have {len(ours)}")


def _bytes(message: Message) -> bytes:
    """Unknown fields are in it, and NaN equals itself: more than comparing messages would see."""
    return bytes(message.SerializeToString(deterministic=True))


def _check_extent(tensor: onnx.TensorProto, data_bytes: int) -> None:
    """Whether a weight has as many bytes as its size and type ask for, inside the program or in the file beside it."""
    kind = ir.DataType(tensor.data_type)
    wanted = kind.bitwidth // 8
    for size in tensor.dims:
        wanted *= size
    if tensor.data_location != TensorProto.EXTERNAL:
        if tensor.external_data or len(tensor.raw_data) != wanted:
            raise _Different(f"{tensor.name} has {len(tensor.raw_data)} bytes, it should have {wanted}")
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    numbers = [entries.get("offset", ""), entries.get("length", "")]
    exact = sorted(entry.key for entry in tensor.external_data) == _EXTERNAL_KEYS and not tensor.raw_data
    if not exact or not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers):
        raise _Different(f"{tensor.name} does not say where in the file of weights it lies")
    offset, length = map(int, numbers)
    if length != wanted or offset + length > data_bytes:
        raise _Different(f"{tensor.name} lies beyond the file of weights, or has another size there")


class _Formats:
    """The formats of a program's tensors, read off its initializers, as the `Source` of a model without weights."""

    def __init__(self, config: MossNetConfig, proto: onnx.ModelProto) -> None:
        self._config = config
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in tensor_specs(config)}
        self._stored = {tensor.name: tensor for tensor in initializers(proto.graph)}
        names = {initializer_name([name]): name for name in self.specs}
        self._holder = dict(_held(self._stored, names))
        missing = [name for name in self.specs if name not in self._holder]
        if missing:
            raise _Different(f"{missing[0]} is not in it, nor {len(missing) - 1} other tensors")
        self._int8 = {self.specs[tensor].site for tensor, _ in _held(_int8_nodes(proto.graph), names)}
        self._read = {holder: self._format(holder) for holder in self._holder.values()}

    @property
    def config(self) -> MossNetConfig:
        """The model's shape."""
        return self._config

    @property
    def origin(self) -> Origin:
        """Nobody asks."""
        raise AssertionError

    def format(self, name: str) -> NumberFormat | None:
        """The number format of a tensor, None where it is kept in a float type."""
        return self._read[self._holder[name]]

    def activation(self, site: str) -> str:
        """The activation format of a site."""
        return "int8_block" if site in self._int8 else "fp32"

    def state(self, name: str) -> str:
        """fp32."""
        return "fp32"

    def quantized(self, name: str) -> QuantizedTensor:
        """Nothing is read."""
        raise AssertionError(name)

    def kept(self, name: str) -> Tensor:
        """Nothing is read but the type."""
        dtype = _KEPT[self._stored[self._holder[name]].data_type]
        return torch.empty(self.specs[name].shape, dtype=dtype, device="meta")

    def of_initializer(self, holder: str) -> NumberFormat | None:
        """The number format of the tensors that an initializer holds."""
        return self._read.get(holder)

    def _format(self, holder: str) -> NumberFormat | None:
        """By the type and innermost size of the codes, and the type of the scales.

        Small tensors in int8_g32 and int4_g32 are stored alike, a code a byte: either gives the same program.
        """
        codes, scales = self._stored[holder], self._stored.get(holder + SCALE)
        if codes.data_type in _KEPT:
            return None
        last = codes.dims[-1] if codes.dims else 0
        for known in FORMATS.values():
            packed = codes.data_type == TensorProto.UINT8 and last == known.activation_block * known.bits // 8
            single = codes.data_type == TensorProto.INT8 and known.group_size in (None, last)
            if scales is not None and scales.data_type == DTYPES[known.scale_dtype] and (packed or single):
                return known
        raise _Different(f"{holder} is in no format that this release knows")


def _held(holders: Iterable[str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(tensor, the initializer or node that stands for it), of names with and without a range of experts.

    A tensor is held once, and a range ends with the model's experts: a program may name ranges without end.
    """
    seen: set[str] = set()
    for holder in holders:
        for one in expanding(holder):
            if one not in names:
                break
            if one in seen:
                raise _Different(f"{holder[:100]} holds what is held already")
            seen.add(one)
            yield names[one], holder


def _int8_nodes(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the nodes that round their inputs to int8."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and attribute.i == 4:
                yield node.name
            if attribute.HasField("g"):
                yield from _int8_nodes(attribute.g)
