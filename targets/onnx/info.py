# SPDX-License-Identifier: Apache-2.0
"""What an .onnx is, and what each byte of it is for. The file is read, not run."""

import onnx

from mossquant.checkpoint.locate import Located
from mossquant.targets.info_report import InfoReport, program_info
from mossquant.targets.onnx.initializers import SCALE, SESSION
from mossquant.targets.onnx.metadata import Opened, graphs, initializers
from mossquant.targets.onnx.open import open_program
from mossquant.targets.onnx.structure import data_bytes
from mossquant.targets.onnx.target import TARGET

_CODES = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


def info(located: Located) -> InfoReport:
    """Say what an .onnx is. Raises `InputError` where it is none of ours, or not what its manifest says."""
    opened = open_program(located.path)
    metadata = opened.metadata
    return program_info(
        located,
        metadata,
        opened.config,
        active_share=TARGET.active_share(opened.config),
        weight_bytes=metadata.weight_bytes,
        files=opened.hashes,
        sections=sections(opened),
        facts=[("runs on", f"onnxruntime {metadata.runtime_minimum} and later"), ("session", _session(opened))],
    )


def _session(opened: Opened) -> str:
    """What a session must have on, by the matmuls in the graph: older releases made codes alone constant,
    and with int8 activations (accuracy level 4) onnxruntime then reads zeros for scales that are not folded."""
    stored = {tensor.name for tensor in initializers(opened.proto.graph)}
    nodes = [node for graph in graphs(opened.proto.graph) for node in graph.node if node.op_type == "MatMulNBits"]
    older = [node for node in nodes if node.input[1] in stored and node.input[2] not in stored]
    if any(attribute.name == "accuracy_level" and attribute.i == 4 for node in older for attribute in node.attribute):
        return "constant folding on, else logits are zero: export again"
    needs = SESSION["initializers" if nodes and all(node.input[2] in stored for node in nodes) else "folded"]
    return f"{' and '.join(needs)} on, else right but slow"


def sections(opened: Opened) -> dict[str, int]:
    """What the bytes of a program and its external weights are for; they add up to the files' size."""
    codes = scales = kept = constants = frames = 0
    tensors = initializers(opened.proto.graph)
    for tensor in tensors:
        size = data_bytes(tensor)
        frames += tensor.ByteSize() - (0 if tensor.external_data else size)
        if tensor.name.endswith(SCALE):
            scales += size
        elif "." not in tensor.name:
            # Tensors of the model are called after it; what else the graph needs has a name without a dot.
            constants += size
        elif tensor.data_type in _CODES:
            codes += size
        else:
            kept += size
    inside = sum(tensor.ByteSize() for tensor in tensors) - sum(t.ByteSize() for t in opened.proto.graph.initializer)
    nodes = sum(node.ByteSize() for node in opened.proto.graph.node) - inside
    metadata = sum(prop.ByteSize() for prop in opened.proto.metadata_props)
    parts = {
        "codes, padding included": codes,
        "scales": scales,
        "tensors kept in a float type": kept,
        "constants of the graph": constants,
        "names and shapes of the above": frames,
        "nodes": nodes,
        "metadata: config, recipe, hashes": metadata,
    }
    return {**parts, "inputs, outputs, alignment, headers": opened.bytes - sum(parts.values())}
