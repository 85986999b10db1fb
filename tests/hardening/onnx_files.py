# SPDX-License-Identifier: Apache-2.0
"""Damage to ONNX: nodes, attributes, initializers, constants, ports and metadata, and any field of any message."""

import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hardening.case import Damage, one_of
from hardening.json_files import mutate_json_text
from hardening.raw import mutate_bytes
from onnx import TensorProto

_INTS = (0, 1, -1, 2, 3, 7, 8, 16, 31, 64, 127, 2**20, 2**31 - 1, 2**31, -(2**31), 10**12, 10**18, 2**63 - 1, -(2**63))
_OPERATORS = (
    *("Expand", "Tile", "Range", "ConstantOfShape", "Loop", "Scan", "If", "Identity", "Gather", "ScatterND", "Reshape"),
    *("MatMulNBits", "GatherBlockQuantized", "FusedMatMul", "RandomNormal", "Pad", "Resize", "OneHot", "TopK"),
    *("Einsum", "SequenceConstruct", "QuickGelu", "EPContext", "NoSuchOperator", ""),
)
_NAMES = ("", "nothing", "tokens", "logits", "v0", "v1", "x" * 5000, "\x00", "layers.0.mlp.experts.0-999999999999.w1")
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e38)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _nodes(random: Random, model: onnx.ModelProto) -> str:
    graph = random.choice([graph for graph in _graphs(model.graph) if graph.node])
    at = random.randrange(len(graph.node))
    node = graph.node[at]
    kinds = ("operator", "domain", "input", "input", "output", "drop", "delete", "double", "order", "name")
    kind = random.choice(kinds)
    said = f"{kind} of {node.op_type} {node.name or at}"
    if kind == "operator":
        node.op_type = random.choice(_OPERATORS)
        return f"{said} → {node.op_type}"
    if kind == "domain":
        node.domain = random.choice(("", "com.microsoft", "ai.onnx.ml", "nobody", "com.microsoft.nchwc"))
    elif kind in ("input", "output"):
        names = node.input if kind == "input" else node.output
        known = [name for other in graph.node for name in (*other.input, *other.output)]
        if names:
            names[random.randrange(len(names))] = random.choice((*_NAMES, *random.sample(known, min(8, len(known)))))
    elif kind == "drop" and node.input:
        del node.input[random.randrange(len(node.input))]
    elif kind == "delete":
        del graph.node[at]
    elif kind == "double":
        graph.node.append(node)
    elif kind == "order":
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del graph.node[at]
        graph.node.insert(random.randrange(len(graph.node) + 1), copy)
    else:
        node.name = random.choice(_NAMES)
    return said


def _attributes(random: Random, model: onnx.ModelProto) -> str:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.attribute]
    # The operators that read packed memory by what their attributes say come first.
    own = [node for node in nodes if node.domain == "com.microsoft" and node.op_type != "QuickGelu"]
    node = random.choice(own if own and random.random() < 0.6 else nodes)
    at = random.randrange(len(node.attribute))
    attribute = node.attribute[at]
    said = f"attribute {attribute.name} of {node.op_type} {node.name}"
    kind = random.choice(("value", "value", "value", "delete", "name", "type"))
    if kind == "delete":
        del node.attribute[at]
    elif kind == "name":
        attribute.name = random.choice((*_NAMES, "axis", "K", "N", "bits"))
    elif kind == "type":
        attribute.type = random.choice(onnx.AttributeProto.AttributeType.values())
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = random.choice((*_INTS, attribute.i + 1, attribute.i * 2, attribute.i // 2))
        said += f" = {attribute.i}"
    elif attribute.type == onnx.AttributeProto.INTS:
        attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_INTS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = random.choice(_FLOATS)
    elif attribute.type == onnx.AttributeProto.GRAPH and random.random() < 0.3:
        attribute.g.CopyFrom(model.graph if random.random() < 0.5 else onnx.GraphProto())
    return f"{kind}: {said}"


def _initializers(random: Random, model: onnx.ModelProto) -> str:
    graph = random.choice([graph for graph in _graphs(model.graph) if graph.initializer])
    at = random.randrange(len(graph.initializer))
    tensor = graph.initializer[at]
    kind = random.choice(("dims", "dims", "type", "data", "data", "name", "external", "delete", "double", "sparse"))
    said = f"{kind} of initializer {tensor.name[:60]} {list(tensor.dims)}"
    if kind == "dims":
        choice = random.randrange(4)
        if choice == 0 or not tensor.dims:
            tensor.dims.append(random.choice(_INTS))
        elif choice == 1:
            del tensor.dims[random.randrange(len(tensor.dims))]
        else:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_INTS)
    elif kind == "type":
        tensor.data_type = random.choice((*TensorProto.DataType.values(), 99, -1))
    elif kind == "data":
        data = bytearray(tensor.raw_data)
        change = random.choice(("cut", "more", "none", "nan", "noise"))
        if change == "cut":
            data = data[: len(data) // 2]
        elif change == "more":
            data += bytes(64)
        elif change == "none":
            data = bytearray()
        elif data:
            place = random.randrange(len(data)) & ~3
            data[place : place + 4] = b"\xff\xff\xff\xff" if change == "nan" else random.randbytes(4)
        tensor.raw_data = bytes(data)
        return f"{said}: {change}"
    elif kind == "name":
        tensor.name = random.choice((*_NAMES, random.choice(graph.initializer).name))
    elif kind == "external":
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", ("/etc/passwd", "../x", "model.onnx", "model.onnx.data", "")),
                           ("offset", ("0", "-1", "10000000000000", "x", "4096")),
                           ("length", ("0", "-1", "1000000000000000000", "x", "9" * 5000))):  # fmt: skip
            chosen = random.choice(value)
            tensor.external_data.add(key=key, value=chosen)
    elif kind == "delete":
        del graph.initializer[at]
    elif kind == "double":
        graph.initializer.append(tensor)
    else:
        graph.sparse_initializer.add().values.CopyFrom(tensor)
    return said


def _constants(random: Random, model: onnx.ModelProto) -> str:
    """Sizes, axes and starts, which decide what is allocated."""
    found = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64 and len(t.raw_data) >= 8]
    if not found:
        return "no constants"
    tensor = random.choice(found)
    data = bytearray(tensor.raw_data)
    place, value = random.randrange(len(data) // 8) * 8, random.choice(_INTS)
    old = struct.unpack_from("<q", data, place)[0]
    struct.pack_into("<q", data, place, value)
    tensor.raw_data = bytes(data)
    return f"constant {tensor.name}: {old} → {value}"


def _ports(random: Random, model: onnx.ModelProto) -> str:
    ports = random.choice((model.graph.input, model.graph.output))
    if not ports:
        return "no ports"
    at = random.randrange(len(ports))
    port, kind = ports[at], random.choice(("size", "size", "type", "name", "delete", "double", "symbol"))
    said, shape = f"{kind} of port {port.name[:40]}", port.type.tensor_type.shape.dim
    if kind == "size" and shape:
        shape[random.randrange(len(shape))].dim_value = random.choice(_INTS)
    elif kind == "symbol" and shape:
        shape[random.randrange(len(shape))].dim_param = random.choice(("B", "T", "", "x" * 1000))
    elif kind == "type":
        port.type.tensor_type.elem_type = random.choice((*TensorProto.DataType.values(), 99))
    elif kind == "name":
        port.name = random.choice(_NAMES)
    elif kind == "delete":
        del ports[at]
    else:
        ports.append(port)
    return said


def _metadata(random: Random, model: onnx.ModelProto) -> str:
    props = [prop for prop in model.metadata_props if prop.key == "mossquant"]
    kind = random.choice(("value",) * 8 + ("delete", "twice", "key", "other"))
    if not props or kind == "other":
        model.metadata_props.add(key="ort_config", value='{"session_options": {"intra_op_num_threads": 100000}}')
        return "another key"
    if kind == "value":
        text, what = mutate_json_text(random, props[0].value)
        props[0].value = text.encode("utf-8", "replace").decode()
        return f"metadata: {what}"
    if kind == "twice":
        text, what = mutate_json_text(random, props[0].value)
        model.metadata_props.add(key="mossquant", value=text.encode("utf-8", "replace").decode())
        return f"metadata twice: {what}"
    if kind == "key":
        props[0].key = "other"
    else:
        model.metadata_props.remove(props[0])
    return f"metadata: {kind}"


def _model(random: Random, model: onnx.ModelProto) -> str:
    kind = random.choice(("opset", "ir", "function", "nested", "bomb", "training", "domain"))
    if kind == "opset" and model.opset_import:
        random.choice(model.opset_import).version = random.choice(_INTS)
    elif kind == "domain":
        model.opset_import.add(domain=random.choice(("", "nobody")), version=random.choice((1, 21, 99)))
    elif kind == "ir":
        model.ir_version = random.choice(_INTS)
    elif kind == "function":
        model.functions.add(name="MatMulNBits", domain="com.microsoft").node.add(op_type="MatMulNBits")
    elif kind == "training":
        model.training_info.add().algorithm.CopyFrom(model.graph)
    elif kind == "nested":
        graph = model.graph
        for _ in range(random.choice((20, 30, 200))):
            attribute = graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
            graph = attribute.g
    else:
        # Thirty doublings of a vector.
        model.graph.node.add(op_type="Shape", input=["tokens"], output=["b0"])
        for i in range(30):
            model.graph.node.add(op_type="Concat", input=[f"b{i}", f"b{i}"], output=[f"b{i + 1}"]).attribute.add(
                name="axis", type=onnx.AttributeProto.INT, i=0
            )
    return f"model: {kind}"


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for one in value if not isinstance(value, Message) else (value,):
                yield from _messages(one)


def _any_field(random: Random, model: onnx.ModelProto) -> str:
    """Any scalar field of any message, by the schema: also those that are not set."""
    choices = [
        (message, field)
        for message in _messages(model)
        for field in message.DESCRIPTOR.fields
        if field.type != FieldDescriptor.TYPE_MESSAGE
    ]
    message, field = random.choice(choices)
    value: Any
    if field.type == FieldDescriptor.TYPE_STRING:
        value = random.choice(_NAMES)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        value = random.randbytes(random.choice((0, 1, 64)))
    elif field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        value = random.choice(_FLOATS)
    elif field.type == FieldDescriptor.TYPE_ENUM:
        value = random.choice(field.enum_type.values_by_number.keys())
    else:
        value = random.choice([i for i in _INTS if -(2**31) <= i < 2**31])
    found = getattr(message, field.name)
    if hasattr(found, "append"):
        found.append(value)
    else:
        setattr(message, field.name, value)
    return f"{message.DESCRIPTOR.name}.{field.name} = {value!r:.40}"


_STRUCTURED = (_nodes, _nodes, _attributes, _attributes, _initializers, _initializers, _constants, _constants)
_STRUCTURED += (_ports, _metadata, _metadata, _metadata, _model, _any_field, _any_field)


def _fields(random: Random, data: bytes) -> Damage:
    model = onnx.ModelProto.FromString(data)
    said = [random.choice(_STRUCTURED)(random, model) for _ in range(random.choice((1, 1, 1, 2)))]
    return Damage(model.SerializeToString(), "; ".join(said))


mutate_onnx = one_of((9, _fields), (1, mutate_bytes))
