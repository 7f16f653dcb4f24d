"""A captured graph as one flat list of ops, with weights traced to parameters.

Gradient checkpointing, autocast regions and branches put layers into sub-GraphModules. ``flatten``
inlines them, so that every analysis is a walk along one list.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .op_entry import Product
from .op_table import OP_TABLE

_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"}
_CASTS |= {"contiguous", "clone", "detach"}
_VIEWS = {
    *("squeeze", "unsqueeze", "view", "reshape", "flatten", "chunk", "split", "narrow", "unbind"),
    *("getitem", "__getitem__", "select", "view_as", "reshape_as", "tensor_split", "unflatten"),
}
_WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod"}
_WRITES |= {"iand", "ior", "ixor"}
"""In-place operators, which eager code calls by names like ``__iadd__``."""
_TURNS = {"t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"}
_TURNS |= {"T", "numpy_T", "mT", "H", "matrix_H", "mH"}  # w.T is aten.numpy_T since torch 2.14


@dataclass(slots=True, eq=False)
class Op:
    """One node of the flat graph.

    Attributes:
        name: The node's name, prefixed by the names of the sub-graphs around it.
        node: The node of the FX graph.
        args: The node's positional arguments, with Ops instead of nodes.
        kwargs: The node's keyword arguments, with Ops instead of nodes.
        users: Ops that have this one among their arguments.
    """

    name: str
    node: fx.Node
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    users: list[Op] = field(default_factory=list, repr=False)

    @property
    def value(self) -> Any:
        """The example value, e.g. a FakeTensor; None if the node has none."""
        return get_example_value(self.node)

    @property
    def inputs(self) -> tuple[Op, ...]:
        """All Ops among the arguments, in order."""
        return tuple(_iterate_ops((self.args, self.kwargs)))

    def list_products(self) -> tuple[tuple[Product, tuple[Op, ...]], ...]:
        """Returns the products that this op computes, with the Ops that may hold the weight."""
        entry = OP_TABLE.get(self.node.target)
        if entry is None or self.node.op not in ("call_function", "call_method"):
            return ()
        bound = entry.bind(self.args, self.kwargs)
        values = {name: _map_ops(arg, lambda op: op.value) for name, arg in bound.items()}
        products = []
        for product in entry.products(values, self.value):
            factors = (bound.get(name) for name in product.factors)
            products.append((product, tuple(f for f in factors if isinstance(f, Op))))
        return tuple(products)


def get_example_value(node: fx.Node) -> Any:
    """Returns the example value in the metadata of a Dynamo or exported node, or None."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def flatten(gm: fx.GraphModule) -> tuple[Op, ...]:
    """Returns all ops of ``gm`` and its sub-graphs in execution order; the last is the output."""
    ops = tuple(_inline(gm, "", None)[0])
    link_users(ops)
    return ops


def link_users(ops: Iterable[Op]) -> None:
    """Tells every op which of these ops have it among their arguments."""
    for op in ops:
        for source in op.inputs:
            source.users.append(op)


def _inline(
    gm: fx.GraphModule, prefix: str, bound: Iterable[Any] | None
) -> tuple[list[Op], dict[fx.Node, Any]]:
    """Returns the ops of a graph whose placeholders are bound to ``bound``, and all by node.

    None for ``bound`` keeps the placeholders as ops.
    """
    ops: list[Op] = []
    env: dict[fx.Node, Any] = {}
    incoming = None if bound is None else iter(bound)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and incoming is not None:
            env[node] = next(incoming)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            env[node] = args[0][args[1]]
            continue
        if node.op == "output" and bound is not None:
            env[node] = args[0]
            continue
        inner, args = _inline_subgraphs(gm, node, args, prefix)
        ops.extend(inner.ops)
        if inner.result is not None:
            env[node] = inner.result
            continue
        env[node] = Op(prefix + node.name, node, tuple(args), dict(kwargs))
        ops.append(env[node])
    return ops, env


@dataclass(slots=True)
class _Inlined:
    """The ops of a node's sub-graphs, and their output where there is just one sub-graph."""

    ops: list[Op] = field(default_factory=list)
    result: Any = None


def _inline_subgraphs(
    gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], prefix: str
) -> tuple[_Inlined, tuple[Any, ...]]:
    """Inlines the sub-graphs that a higher-order node calls.

    The outputs of several, such as branches, become arguments of the node.
    """
    graphs = [] if node.op != "call_function" else list(find_subgraphs(gm, node.args))
    if node.target is torch.ops.higher_order.autograd_function_apply:
        graphs = graphs[:1]  # the second one is the backward
    inner, results = _Inlined(), []
    for name, graph in graphs:
        operands = list(_iterate_leaves(args))
        wanted = sum(inner_node.op == "placeholder" for inner_node in graph.graph.nodes)
        if wanted > len(operands):
            continue  # called in a way we do not know: its weights are seen as read by this node
        ops, env = _inline(graph, f"{prefix}{name}/", operands[len(operands) - wanted :])
        inner.ops.extend(ops)
        results.append(env[next(iter(reversed(graph.graph.nodes)))])
    if len(results) == len(graphs) == 1:
        inner.result = results[0]
        return inner, args
    return inner, (*args, *results)


def find_subgraphs(gm: fx.GraphModule, args: Any) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yields (name, GraphModule) of the sub-graphs among a node's arguments."""
    for arg in _iterate_leaves(args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            try:
                graph = gm.get_submodule(str(arg.target))
            except AttributeError:
                continue
            if isinstance(graph, fx.GraphModule):
                yield str(arg.target), graph


def _iterate_leaves(tree: Any) -> Iterator[Any]:
    """Yields the leaves of nested tuples, lists, dictionaries and slices, in order."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _iterate_leaves(part)
    elif isinstance(tree, dict):
        yield from _iterate_leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from _iterate_leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def _iterate_ops(tree: Any) -> Iterator[Op]:
    """Yields the Ops among the leaves."""
    return (leaf for leaf in _iterate_leaves(tree) if isinstance(leaf, Op))


def _map_ops(tree: Any, change: Any) -> Any:
    """Returns nested tuples and lists with ``change(op)`` for every Op in them."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_ops(part, change) for part in tree)
    return change(tree) if isinstance(tree, Op) else tree


@dataclass(frozen=True, slots=True)
class ParameterRead:
    """An operand that is a cast or view of a parameter.

    Attributes:
        parameter: The parameter.
        layout: "same" after casts, row slices and trailing ones, where dimension 1 is still the
            input channels; "transposed"; or "view" for anything else.
    """

    parameter: Op
    layout: str


def trace_parameter(operand: Op, parameters: Collection[Op]) -> ParameterRead | None:
    """Returns the parameter that ``operand`` is a cast or view of; None for an activation."""
    turned = False
    op = operand
    while op not in parameters:
        step = _name_step(op)
        if step is None:
            return None
        turned |= step in _TURNS
        op = op.inputs[0]
    return ParameterRead(op, _classify_layout(operand.value, op.value, turned))


def _name_step(op: Op) -> str | None:
    """Returns the name of a cast, view or turn of a single tensor; None for any other op."""
    if op.node.op not in ("call_function", "call_method") or not op.inputs:
        return None
    return classify_step(str(op.args[1]) if op.node.target is getattr else op.node.target)


def classify_step(target: Any) -> str | None:
    """Returns the name of a target that casts, views or turns one tensor; None for any other."""
    name = name_target(target)
    return name if name in _CASTS | _VIEWS | _TURNS else None


def name_target(target: Any) -> str:
    """Returns the name of what a node calls, without an op's overload; "" where it has none."""
    if isinstance(target, torch._ops.OpOverload):
        target = target._opname
    name: str = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name


def _classify_layout(seen: Any, parameter: Any, turned: bool) -> str:
    if not isinstance(seen, Tensor) or parameter.dim() < 2 or seen.dim() < 2:
        return "view"
    if turned:
        flipped = parameter.dim() == 2 and tuple(seen.shape) == tuple(parameter.shape)[::-1]
        return "transposed" if flipped else "view"
    return "same" if _strip_trailing_ones(seen) == _strip_trailing_ones(parameter) else "view"


def _strip_trailing_ones(weight: Tensor) -> tuple[int, ...]:
    """Returns the shape after the rows without trailing ones: [out, in, 1] is as [out, in]."""
    shape = list(weight.shape[1:])
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def iterate_written(op: Op) -> Iterator[Op]:
    """Yields what an op writes to in place: its first input, and what that is a view of.

    ``h[mask] = layer(h[mask])`` is setitem(h, mask, product): later readers of h come after it.
    """
    if op.node.op not in ("call_function", "call_method"):
        return
    written = op.inputs[0] if may_write(op.node.target) and op.inputs else None
    while written is not None:
        yield written
        written = written.inputs[0] if _name_step(written) else None


def may_write(target: Any) -> bool:
    """Returns whether a target, by its name, writes to its first input in place."""
    name = name_target(target)
    inplace = name.endswith("_") and not name.endswith("__") and name not in dir(operator)
    return inplace or name.strip("_") in _WRITES


def find_readers(parameter: Op) -> Iterator[tuple[Op, Op]]:
    """Yields (reader, operand) for the ops that consume the parameter or a cast or view of it."""
    pending = [parameter]
    while pending:
        operand = pending.pop(0)
        for user in operand.users:
            if user.node.op != "output" and _name_step(user) and user.inputs[0] is operand:
                pending.append(user)
            elif user.node.op == "output" or _holds_tensor(user.value):
                yield user, operand


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in _iterate_leaves(value))
