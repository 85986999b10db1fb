# SPDX-License-Identifier: Apache-2.0
"""Checks of a program that need no run: inputs and outputs, operators, sizes, and where its weights lie.

onnxruntime does not check these: a graph with other sizes or operators may take any amount of memory, or read outside
its weights. So a graph must have the inputs and outputs of a model of its config, only operators that lowering uses,
and every tensor of the model once, in a size that some format gives it; no other number in it may be larger than a
size of the model. Names, order and wiring of its nodes are free, so that programs of other releases open. What a graph
takes when it runs is found in the child process (`mossquant.targets.onnx.session`), what it computes by `verify`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from mossquant.errors import InputError
from mossquant.formats import FORMATS
from mossquant.model.config import MossNetConfig
from mossquant.model.mossnet import parameter_count, state_specs, tensor_specs
from mossquant.model.tensors import TensorSpec
from mossquant.release import release
from mossquant.targets.onnx.file_graph import FileGraph, expanded, stored_array
from mossquant.targets.onnx.graph import MICROSOFT
from mossquant.targets.onnx.initializers import SCALE, initializer_name
from mossquant.targets.onnx.metadata import METADATA_KEY, DataFile, Opened, graphs
from mossquant.targets.onnx.packing import DTYPES, blocks_of
from mossquant.targets.onnx.ports import FIRST_LOGIT, LOGITS, STATE_OUT, TOKENS, state_shape

OPERATORS = {
    "": {
        "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Exp", "Expand", "Gather", "Gemm", "Identity", "If",
        "Log", "Max", "Min", "Mul", "Neg", "NonZero", "Pad", "Pow", "ReduceMax", "ReduceMean", "ReduceProd",
        "ReduceSum", "Reshape", "Scan", "ScatterElements", "ScatterND", "Shape", "Slice", "Softmax", "Split",
        "Sqrt", "Sub", "Sum", "TopK", "Transpose", "Unsqueeze",
    },
    MICROSOFT: {"FusedMatMul", "GatherBlockQuantized", "MatMulNBits", "QuickGelu"},
}  # fmt: skip
"""By domain: what any release has lowered to. None of them reads a file or loops without end."""

_AGAIN = "Copy the artifact's folder again, or export again."
_KEPT = [kind.value for kind in DTYPES.values()]
_CODES = [TensorProto.INT8, TensorProto.UINT8]
_CONSTANTS = [TensorProto.INT64, TensorProto.FLOAT]
_EXTERNAL_KEYS = ["length", "location", "offset"]
_LAST = np.iinfo(np.int64).max
_LARGEST_BLOCK = 256

Port = tuple[str, int, list[int | None]]


def check_structure(opened: Opened) -> None:
    """Compare a program with its config.

    Raises:
        InputError: it differs: it was changed, or a newer release wrote it.
    """
    offenders = [*_headers(opened), *_ports(opened), *_nodes(opened), *_initializers(opened)]
    if not offenders:  # what these look at lies where it should
        offenders = [*_constants(opened), *_matmuls(opened)]
    if offenders:
        wrote = opened.metadata.release
        other = "" if wrote == release() else f" (mossquant {wrote[:40]} wrote it, this is {release()})"
        raise InputError.listing(f"{opened.path} is not a program of its config{other}", offenders, _AGAIN)


def check_values(opened: Opened) -> None:
    """Look at every scale and kept value of a program whose structure was checked.

    Raises:
        InputError: some are not finite, or scales not positive: all offenders at once.
    """
    offenders = []
    for tensor in _stored(opened.proto.graph).values():
        if tensor.data_type in _KEPT:
            values = stored_array(tensor, opened.path.parent).astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                offenders.append(f"{tensor.name} holds NaN or infinite values")
            elif tensor.name.endswith(SCALE) and not (values > 0).all():
                offenders.append(f"{tensor.name} holds scales that are not positive")
    if offenders:
        raise InputError.listing(f"{opened.path} is damaged", offenders, _AGAIN)


def _headers(opened: Opened) -> Iterator[str]:
    proto = opened.proto
    if [prop.key for prop in proto.metadata_props] != [METADATA_KEY]:
        yield "its metadata has more than one entry"
    if proto.functions or proto.training_info:
        yield "it has functions or a training of its own"
    weight_bytes = sum(data_bytes(tensor) for tensor in _stored(proto.graph).values() if "." in tensor.name)
    if opened.metadata.weight_bytes != weight_bytes:
        yield f"its weights have {weight_bytes} bytes, its metadata says {opened.metadata.weight_bytes}"
    if opened.metadata.parameters < parameter_count(opened.config):
        yield f"its metadata says {opened.metadata.parameters} parameters, fewer than the model has"


def _ports(opened: Opened) -> Iterator[str]:
    """Inputs and outputs must be those of `mossquant.targets.onnx.ports`; batch, length and what grows are free."""
    states: list[Port] = []
    for spec in state_specs(opened.config):
        sizes = [size if isinstance(size, int) else None for size in state_shape(spec, out=False)]
        states.append((spec.name, TensorProto.FLOAT, sizes))
    inputs: list[Port] = [(TOKENS, TensorProto.INT64, [None, None]), (FIRST_LOGIT, TensorProto.INT64, [1]), *states]
    logits: Port = (LOGITS, TensorProto.FLOAT, [None, None, opened.config.vocab_size])
    outputs = [logits, *((name + STATE_OUT, kind, shape) for name, kind, shape in states)]
    graph = opened.proto.graph
    for which, here, expected in (("takes", graph.input, inputs), ("gives", graph.output, outputs)):
        if [_port(value) for value in here] != expected:
            yield f"it {which} other arrays than a model of its config"


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    return value.name, tensor.elem_type, sizes


def _nodes(opened: Opened) -> Iterator[str]:
    """Operators and their attributes; every value and initializer has a name of its own, in branches too."""
    largest, seen = _largest_number(opened.config), set[str]()
    for graph in graphs(opened.proto.graph):
        if graph.sparse_initializer:
            yield "it has sparse weights"
        names = [tensor.name for tensor in graph.initializer] + [value.name for value in graph.input]
        for node in graph.node:
            names += filter(None, node.output)
            title = f"{node.op_type[:40]} {node.name[:80]}".strip()
            if node.op_type not in OPERATORS.get(node.domain, ()):
                yield f"{title} is an operator that no program of ours has"
            for attribute in node.attribute:
                numbers = [attribute.i, *attribute.ints, *attribute.t.dims]
                if max(map(abs, numbers)) > largest or attribute.t.external_data:
                    yield f"{attribute.name[:40]} of {title} is larger than any size of the model"
                if attribute.tensors or attribute.graphs or attribute.HasField("sparse_tensor"):
                    yield f"{attribute.name[:40]} of {title} is of a kind that no program of ours has"
        twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        yield from (f"{name[:80]} is there twice" for name in twice)


def _largest_number(config: MossNetConfig) -> int:
    """No size, axis or count in a graph is larger: experts stand side by side, each padded to whole blocks."""
    specs = tensor_specs(config)
    experts = 1 + max((spec.expert or 0) for spec in specs)
    return (experts + 1) * max(_LARGEST_BLOCK, *(size for spec in specs for size in spec.shape))


def _initializers(opened: Opened) -> Iterator[str]:
    """Every tensor of the model must be held once; types, sizes and places of all initializers."""
    specs = {initializer_name([spec.name]): spec for spec in tensor_specs(opened.config)}
    stored, seen = _stored(opened.proto.graph), set[str]()
    for holder, tensor in stored.items():
        if tensor.data_type not in (*_KEPT, *_CODES, *_CONSTANTS):
            yield f"{holder[:80]} has a type that no program of ours has"
        elif not _lies_inside(tensor, opened.metadata.data):
            yield f"{holder[:80]} does not lie where it says, or has another size there"
        members = []
        for name in expanded(holder):
            if name not in specs:
                break
            if name in seen:
                yield f"{holder[:80]} holds what is held already"
                return
            seen.add(name)
            members.append(specs[name])
        if members and not _is_in_a_format(tensor, stored.get(holder + SCALE), members):
            yield f"{holder[:80]} has a type or size that no format gives it"
    missing = [name for name in specs if name not in seen]
    if missing:
        yield f"{missing[0]} is not in it, nor {len(missing) - 1} other tensors"


def _stored(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for inner in graphs(graph) for tensor in inner.initializer}


def _is_in_a_format(tensor: onnx.TensorProto, scales: onnx.TensorProto | None, members: list[TensorSpec]) -> bool:
    """Whether codes and scales, or values, have as many elements as these tensors of one size need in some format."""
    rows, columns = members[0].matrix_shape
    rows *= len(members)
    count, last = math.prod(tensor.dims), tensor.dims[-1] if tensor.dims else 0
    if tensor.data_type in _KEPT:
        return scales is None and count == rows * columns
    if scales is None:
        return False
    for known in FORMATS.values():
        width = known.activation_block * known.bits // 8
        packed = (TensorProto.UINT8, width, rows * blocks_of(known, columns) * width)
        single = (TensorProto.INT8, last, rows * known.padded_columns(columns))
        own = DTYPES[known.scale_dtype], rows * known.groups(columns)
        spread = TensorProto.FLOAT, rows * blocks_of(known, columns)
        held = scales.data_type, math.prod(scales.dims)
        if (tensor.data_type, last, count) in (packed, single) and held in (own, spread):
            return True
    return False


def data_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer's values, by its sizes and type; 0 for a type that no program of ours has."""
    if tensor.data_type not in (*_KEPT, *_CODES, *_CONSTANTS):
        return 0
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * itemsize


def _lies_inside(tensor: onnx.TensorProto, data: DataFile | None) -> bool:
    """Whether an initializer has its bytes inside the program or in its file of external weights."""
    if any(size < 0 for size in tensor.dims):
        return False
    if tensor.data_location != TensorProto.EXTERNAL:
        return not tensor.external_data and len(tensor.raw_data) == data_bytes(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    numbers = [entries.get("offset", ""), entries.get("length", "")]
    exact = sorted(entry.key for entry in tensor.external_data) == _EXTERNAL_KEYS and not tensor.raw_data
    if data is None or not exact or entries["location"] != data.name:
        return False
    if not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers):
        return False
    offset, length = map(int, numbers)
    return length == data_bytes(tensor) and offset + length <= data.bytes


def _constants(opened: Opened) -> Iterator[str]:
    """Initializers without a dot in their name are no weights: sizes, axes and numbers of formulas."""
    largest = _largest_number(opened.config)
    for tensor in _stored(opened.proto.graph).values():
        if "." in tensor.name:
            continue
        values = stored_array(tensor, Path())
        small = tensor.data_type == TensorProto.FLOAT or ((values == _LAST) | (np.abs(values) <= largest)).all()
        if tensor.data_type not in _CONSTANTS or tensor.external_data or values.size > _LARGEST_BLOCK or not small:
            yield f"{tensor.name[:80]} is no constant that a model of its config needs"


def _matmuls(opened: Opened) -> Iterator[str]:
    """onnxruntime packs codes and scales when it loads them, as many as the attributes say."""
    graph = FileGraph(opened)
    for node in graph.nodes("MatMulNBits"):
        attributes: Mapping[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
        columns, rows, bits, block = (attributes.get(name, 0) for name in ("K", "N", "bits", "block_size"))
        codes, scales = (graph.value(name) for name in node.input[1:3]) if len(node.input) > 2 else (None, None)
        blocks = -(-columns // block) if block > 0 else 0
        sizes = None if codes is None or scales is None else (codes.shape, scales.size)
        if sizes != ((rows, blocks, block * bits // 8), rows * blocks):
            yield f"MatMulNBits {node.name[:80]} has other sizes than its weights"
        graph.forget()
