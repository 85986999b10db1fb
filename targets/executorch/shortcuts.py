# SPDX-License-Identifier: Apache-2.0
"""Shorter ways through ExecuTorch to the same program.

ExecuTorch walks a graph anew for every pass, writes Python for graphs that nobody calls, runs delegates again to learn
shapes that it knows, and compares sets of nodes pair by pair. No setting of it says otherwise (1.4.1, which
`check_packages` asks for): as long as `shortcuts` lasts, functions of its own stand replaced, each by one that comes to
the same. A test lowers a model with and without, and compares the bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, partialmethod, reduce
from operator import or_
from typing import Any, get_type_hints

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._pytree import tree_map_only


@contextmanager
def shortcuts() -> Iterator[None]:
    """Meanwhile the shorter ways are taken."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.exir import memory_planning
    from executorch.exir._serialize import _dataclass
    from executorch.exir.backend.canonical_partitioners import config_partitioner, group_partitioner
    from executorch.exir.pass_base import ExportPass
    from executorch.exir.program import _program

    is_mutable = memory_planning._is_mutable_buffer
    replaced: list[tuple[Any, str, Any]] = [
        (GraphModule, "recompile", partialmethod(_compile_when_called, GraphModule.recompile)),
        (_program, "_get_aten_to_edge_passes", _in_two_walks),
        (_program, "ReplaceViewOpsWithViewCopyOpsPass", _Nothing),
        (_program, "OpReplacePass", _Nothing),
        (_program, "MemoryFormatOpsPass", _Nothing),
        (config_partitioner, "is_constant_data", _is_constant),
        (group_partitioner, "_DependencyViewer", lambda module: None),
        (group_partitioner.GroupBasedPartitioner, "_merge_partitions", _merge),
        (xnnpack_preprocess, "XNNPACKPassManager", _NoPasses),
        (ExportPass, "call_delegate", _as_recorded),
        (memory_planning, "_is_mutable_buffer", partial(_is_mutable, is_mutable)),
        (_dataclass, "get_type_hints", cache(get_type_hints)),
    ]
    with ExitStack() as stack:
        for owner, name, shorter in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, shorter)
        yield


def _compile_when_called(self: GraphModule, recompile: Callable[[GraphModule], object]) -> None:
    """Write and compile a graph's Python when the module is called, which most are never."""

    def forward(module: GraphModule, *args: Any, **options: Any) -> Any:
        recompile(module)
        return module.forward(*args, **options)

    type(self).forward = forward  # each module has a class of its own
    self._code = ""  # is shown in messages for debugging
    if isinstance(self.graph._codegen, _PyTreeCodeGen):
        self._in_spec, self._out_spec = self.graph._codegen.pytree_info[1:]


class _Nothing:
    """A pass that another one includes."""

    def __call__(self, module: GraphModule) -> PassResult:
        return PassResult(module, False)


def _in_two_walks(config: Any) -> tuple[list[Any], list[Any]]:
    """The passes from PyTorch's dialect to the edge dialect: two walks of the graph instead of eight.

    A pass that rewrites operators hands each to `super().call_operator`: in a class that inherits from several of them
    that is the next pass. Passes that change nodes where they are stay between the two.
    """
    from executorch.exir import passes
    from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
    from torch._export.passes import replace_view_ops_with_view_copy_ops_pass as views

    class Copies(passes.ExportPass):  # type: ignore[misc]
        """`ReplaceViewOpsWithViewCopyOpsPass`, which has another base."""

        def call_operator(self, op: Any, *given: Any) -> Any:
            copies = views._NON_FUNCTIONAL_OPS_TO_FUNCTIONAL_OPS.get(op) or views.get_view_copy_of_view_op(op._schema)
            return super().call_operator(copies or op, *given)

    first = (
        Copies,
        passes.NormalizeTransposePass,
        passes.ReplaceBrokenOpsWithFunctionalOpsPass,
        passes.ScalarToTensorPass,
        passes.SymToTensorPass,
    )
    last = RemoveMixedTypeOperators, passes.OpReplacePass, passes.MemoryFormatOpsPass
    between = [passes.RemoveNoopPass(), passes.PruneEmptyTensorsPass(), passes.RemoveToCopyPass()]
    walks = [type(name, of, {})() for name, of in (("First", first), ("Last", last))]
    return [passes.ReplaceSymSizeOpPass(), walks[0], *between, walks[1]], passes.base_post_op_replace_passes


def _is_constant(program: ExportedProgram, node: Node) -> bool:
    """Whether a node is a parameter, a buffer or a constant: any input that is not the user's."""
    return node.op == "placeholder" and node.name not in program.graph_signature.user_inputs


def _is_mutable(found: Callable[..., bool], node: Node, signature: Any = None) -> bool:
    """Whether a node is a buffer that the program writes to: few programs have any, and that is asked first."""
    return signature is not None and bool(signature.buffers_to_mutate) and found(node, signature)


def _merge(self: Any, partitions: dict[int, Any], *others: Any) -> None:
    """Merge two partitions where nothing outside lies between nodes of theirs; pairs in ExecuTorch's order.

    Sets of nodes are bits of a number. ExecuTorch asks of all that follows from the users of each node whether it is
    inside: the same answer, in a time that grows with the cube of the number of layers.
    """
    nodes = list(self.graph_module.graph.nodes)
    bit = {node: 1 << place for place, node in enumerate(nodes)}
    before: dict[Node, int] = {}
    after: dict[Node, int] = {}
    for node in nodes:
        before[node] = _union(before[taken] | bit[taken] for taken in node.all_input_nodes)
    for node in reversed(nodes):
        after[node] = _union(after[user] | bit[user] for user in node.users)
    sets = {
        number: tuple(_union(of[node] for node in partition.nodes) for of in (bit, before, after))
        for number, partition in partitions.items()
    }
    waiting = list(partitions)
    while waiting:
        first, rest, waiting = waiting[0], waiting[1:], []
        for other in rest:
            own, earlier, later = both = tuple(a | b for a, b in zip(sets[first], sets[other], strict=True))
            if earlier & later & ~own:
                waiting.append(other)
            else:
                self._perform_partition_merge(first, other, partitions, *others)
                sets[first] = both


def _union(sets: Iterable[int]) -> int:
    return reduce(or_, sets, 0)


class _NoPasses:
    """In place of XNNPACK's pass over each delegate: it makes linears of products of matrices that were linears, and
    every linear is kept as it is.
    """

    def __init__(self, program: ExportedProgram, passes: object = None) -> None:
        self._program = program

    def transform(self) -> ExportedProgram:
        return self._program


def _as_recorded(self: Any, delegate: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], meta: Any) -> Any:
    """Call a delegate in a walk of the graph: it gives what it gave when it was cut out, and is not walked itself."""
    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.pass_base import ProxyValue

    proxies = tree_map_only(ProxyValue, lambda value: value.proxy, ((delegate, *args), kwargs))
    called = self.tracer.create_proxy("call_function", executorch_call_delegate, *proxies)
    called.node.meta.update(meta.data)
    self.tracer.set_metadata(called.node, meta["val"])
    return ProxyValue(meta["val"], called)
