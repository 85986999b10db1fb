# SPDX-License-Identifier: Apache-2.0
"""Traces one block of each structure, and repeats what came of it: a program's graph takes as long as one block's.

PyTorch traces a model operator by operator, and each pass of ExecuTorch does so again; blocks that differ in nothing
but their numbers give the same operators each time. So `Traced` holds the table, the first block of every structure
and the head, and its program is brought into ExecuTorch's edge dialect; `repeated` makes the program of the whole model
from that graph: the nodes of a block once for each layer of its structure, with the layer's own tensors.

Where a block begins and ends in the graph is said by what `Traced` returns beside logits and states: the residual
stream before and after each block.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mossquant.targets.program import Model, Scan

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.graph_signature import InputSpec

_OF_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
_INNER = re.compile(r"(.+)\.parametrizations\.(\w+)\.original(\d+)")
"""How torch.export names the tensors that a quantized weight consists of."""
_OF_MODULES = set(vars(nn.Module()))


class Traced(nn.Module):
    """Table, one block of each structure, and head of a model.

    Args:
        model: the whole model.
        scan: how the recurrence runs over the tokens of a call.

    Attributes:
        order: as `Model.order`, of the traced blocks.
        kinds: for each block of the model, the number of the traced block that has its structure.
    """

    table: nn.Module
    norm_f: nn.Module
    head: nn.Module

    def __init__(self, model: Model, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        structures = []
        for *names, layer, count in model.order:
            structures.append((*names, count, *(_structure(model.get_submodule(f"{name}.{layer}")) for name in names)))
        distinct = list(dict.fromkeys(structures))
        self.kinds = [distinct.index(structure) for structure in structures]
        self.order = [model.order[structures.index(structure)] for structure in distinct]
        for name, child in model.named_children():  # in this order, which is that of the constants
            self.add_module(name, nn.ModuleDict() if isinstance(child, nn.ModuleDict) else child)
        for *names, layer, _ in self.order:
            for name in names:
                self.get_submodule(name).add_module(layer, model.get_submodule(f"{name}.{layer}"))

    def forward(
        self, tokens: Tensor, states: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """tokens [1, T], states of each traced block → logits of the last position and of all, residuals, states."""
        x = self.table(tokens[0])
        residuals, after = [x], []
        for (norms, blocks, layer, _), own in zip(self.order, states, strict=True):
            norm, block = self.get_submodule(f"{norms}.{layer}"), self.get_submodule(f"{blocks}.{layer}")
            out, own_after = block(norm(x), own, self.scan)
            x = x + out
            residuals.append(x)
            after.append(own_after)
        logits = [self.head(self.norm_f(rows)).unsqueeze(0) for rows in (x[-1:], x)]
        return logits, residuals, after


def _structure(block: nn.Module) -> str:
    """All of a block but its numbers: its modules with their settings, and type and shape of its tensors."""
    parts: list[object] = []
    for name, module in block.named_modules():
        settings = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
        parts.append((name, type(module), sorted(settings.items())))
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        inner = []
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            inner = [context, *(getattr(tensor, key).shape for key in names)]
        parts.append((name, type(tensor), tensor.dtype, tensor.shape, inner))
    return repr(parts)


def repeated(traced: "ExportedProgram", module: Traced, model: Model, *, last: bool) -> "ExportedProgram":
    """The program of a whole model.

    Args:
        traced: the program of `module`, in the edge dialect.
        module: what was traced.
        model: the whole model.
        last: logits of the last position alone.

    Returns:
        tokens [1, T], *states → logits [1, T or 1, V], *states.
    """
    from torch.export.exported_program import ExportedProgram, ModuleCallEntry, ModuleCallSignature
    from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument

    builder = _Builder(traced, module, model)
    tokens, states = builder.inputs()
    logits, after = builder.nodes(states, last=last)
    builder.graph.output((logits, *after))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in (logits, *after)]
    inside: tuple[Any, ...] = (tokens, states), {}
    outside = logits, after
    in_spec, out_spec = (pytree.tree_structure(tree) for tree in (inside, outside))
    signature = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    return ExportedProgram(
        root=GraphModule(builder.attributes, builder.graph),
        graph=builder.graph,
        graph_signature=ExportGraphSignature(builder.specs, outputs),
        state_dict=builder.tensors,
        range_constraints=traced.range_constraints,
        module_call_graph=[ModuleCallEntry("", signature)],
        constants=traced.constants,
        verifiers=[traced.verifier],
    )


class _Builder:
    """The graph of a whole model, from the one that was traced."""

    def __init__(self, traced: "ExportedProgram", module: Traced, model: Model) -> None:
        self._traced, self._model, self._order, self._kinds = traced, model, module.order, module.kinds
        self._nodes = list(traced.graph.nodes)
        count, (returned,) = len(self._order), self._nodes[-1].args
        self._logits, self._residuals = returned[:2], returned[2 : 3 + count]
        self._after = self._by_block(returned[3 + count :])
        self._shared: dict[Node, Node] = {}
        self._own: list[dict[Node, Node]] = [{} for _ in self._kinds]
        self.graph = Graph()
        self.specs: list[InputSpec] = []
        self.tensors: dict[str, Tensor] = {}
        self.attributes: dict[str, Any] = {}
        self._handles: dict[tuple[int, object], int] = {}

    def inputs(self) -> tuple[Node, list[Node]]:
        """Tensors of all layers, tokens and states, as placeholders."""
        from torch.export.graph_signature import InputKind, TensorArgument

        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        pairs = list(zip(placeholders, self._traced.graph_signature.input_specs, strict=True))
        of_blocks: dict[tuple[InputKind, str], list[tuple[Node, InputSpec]]] = {}
        for node, spec in pairs:
            if match := _OF_BLOCK.fullmatch(spec.target or ""):
                of_blocks.setdefault((spec.kind, match[1]), []).append((node, spec))
        users = []
        for node, spec in pairs:
            if spec.kind == InputKind.USER_INPUT:
                users.append((node, spec))
            elif not (match := _OF_BLOCK.fullmatch(spec.target or "")):
                self._shared[node] = self.graph.node_copy(node)
                self.specs.append(spec)
                if spec.target in self._traced.state_dict:
                    self.tensors[spec.target] = self._traced.state_dict[spec.target]
            else:  # reading back relies on the order that tracing all layers would give
                self._add_tensors(match[1], of_blocks.pop((spec.kind, match[1]), []))
        (tokens, user), *others = users
        groups = self._by_block([node for node, _ in others])
        self._shared[tokens] = self._placeholder(tokens, "tokens")
        states = []
        for layer, kind in enumerate(self._kinds):
            for node in groups[kind]:
                self._own[layer][node] = self._placeholder(node, f"block_{layer}_{node.name}")
                states.append(self._own[layer][node])
        for made in (self._shared[tokens], *states):
            self.specs.append(replace(user, arg=TensorArgument(made.name)))
        return self._shared[tokens], states

    def _add_tensors(self, name: str, of_blocks: Sequence[tuple[Node, "InputSpec"]]) -> None:
        """Parameters or buffers of the traced norms or blocks of a name, for each layer its own."""
        from torch.export.graph_signature import InputKind, TensorArgument

        for number, kind in enumerate(self._kinds):
            layer = self._model.order[number][2]
            for node, spec in of_blocks:
                match = _OF_BLOCK.fullmatch(spec.target or "")
                assert match is not None
                if name not in self._order[kind][:2] or match[2] != self._order[kind][2]:
                    continue
                target = f"{name}.{layer}.{match[3]}"
                placeholder = self._placeholder(node, re.sub(r"[^a-z0-9]+", "_", target.lower()))
                self._own[number][node] = placeholder
                self.specs.append(replace(spec, arg=TensorArgument(placeholder.name), target=target))
                tensor = _tensor(self._model.get_submodule(f"{name}.{layer}"), match[3])
                is_parameter = spec.kind == InputKind.PARAMETER
                self.tensors[target] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def _placeholder(self, node: Node, name: str) -> Node:
        placeholder = self.graph.placeholder(name)
        placeholder.meta = copy.copy(node.meta)
        return placeholder

    def nodes(self, states: Sequence[Node], *, last: bool) -> tuple[Node, list[Node]]:
        """Everything that is computed: logits, and states in the order of the inputs."""
        # What follows from the number of tokens alone is computed once, and used by all.
        lengths: list[Node] = []
        for node in self._nodes:
            computed = isinstance(node.meta.get("val"), torch.SymInt) and node.op == "call_function"
            if computed and all(taken in self._shared or taken in lengths for taken in node.all_input_nodes):
                lengths.append(node)
        before = self._copied(self._between([self._residuals[0], *lengths], []), self._shared, 0)
        x, after = before[self._residuals[0]], []
        blocks = [
            self._between([end, *own], [start, *lengths])
            for start, end, own in zip(self._residuals, self._residuals[1:], self._after, strict=False)
        ]
        for layer, kind in enumerate(self._kinds):
            known = {**before, **self._own[layer], self._residuals[kind]: x}
            copies = self._copied(blocks[kind], known, 1 + layer)
            x = copies[self._residuals[kind + 1]]
            after += [copies[node] for node in self._after[kind]]
        logits = self._logits[0 if last else 1]
        end = self._residuals[-1]
        head = self._between([logits], [end, *lengths])
        return self._copied(head, {**before, end: x}, 1 + len(self._kinds))[logits], after

    def _by_block(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """States, those of each traced block together."""
        rest = iter(nodes)
        return [list(islice(rest, count)) for *_, count in self._order]

    def _between(self, ends: Iterable[Node], starts: Iterable[Node]) -> list[Node]:
        """All that `ends` are computed from, `starts` and inputs excepted, in the order of the graph."""
        found, waiting, known = set[Node](), list(ends), set(starts)
        while waiting:
            node = waiting.pop()
            if node not in found and node not in known and node.op != "placeholder":
                found.add(node)
                waiting += node.all_input_nodes
        return [node for node in self._nodes if node in found]

    def _copied(self, nodes: Sequence[Node], known: Mapping[Node, Node], part: int) -> dict[Node, Node]:
        """Append copies of nodes; `known` are the copies of what they take."""
        copies = dict(known)
        for node in nodes:
            made = self.graph.node_copy(node, lambda taken: copies[taken])
            made.meta = copy.copy(node.meta)
            if node.op == "get_attr":  # the body of a loop, which passes change where it is
                assert isinstance(node.target, str)
                made.target = f"{node.target}_{part}"
                self.attributes[made.target] = copy.deepcopy(getattr(self._traced.graph_module, node.target))
            if "debug_handle" in node.meta:
                handle = part, node.meta["debug_handle"]
                made.meta["debug_handle"] = self._handles.setdefault(handle, 1 + len(self._handles))
            copies[node] = made
        return copies


def _tensor(block: nn.Module, name: str) -> Tensor:
    """A tensor of a block by the name that torch.export gives it."""
    match = _INNER.fullmatch(name)
    owner, _, own = (f"{match[1]}.{match[2]}" if match else name).rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(owner), own)
    if match:
        names, _ = getattr(tensor, "__tensor_flatten__")()  # noqa: B009  the stubs do not know it
        tensor = getattr(tensor, names[int(match[3])])
    return tensor
