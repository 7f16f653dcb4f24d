"""aten graph -> ChannelLog: follows the channels of every parameter through the call of a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .aten_graph import AtenGraph
from .channel_log import ChannelLog, compact
from .op_rules import Operand, combine
from .weight_value import StoredTensor, WeightValue

MOVES = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"),
        *("permute", "transpose", "t", "movedim", "swapaxes", "squeeze", "unsqueeze", "flip"),
        *("expand", "expand_as", "repeat", "tile", "repeat_interleave", "roll", "unfold"),
        *("slice", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind"),
        *("narrow", "diagonal", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("cat", "concat", "stack", "hstack", "vstack"),
    }
)
"""Ops whose results hold elements of their inputs, by their names without overloads."""
JOINING = frozenset(["cat", "concat", "stack", "hstack", "vstack"])
CASTS = frozenset(
    {
        *("to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias"),
        *("lift_fresh_copy", "lift_fresh", "float", "half", "bfloat16", "double"),
        *("dropout", "native_dropout", "feature_dropout", "alpha_dropout"),
    }
)
"""Ops that give their first input back, in eval mode."""
WRITES = frozenset({"copy_", "fill_", "masked_fill_"})


class Propagation:
    """One walk along a graph.

    Attributes:
        log: What was seen of channels.
        values: By node: a label tensor, a WeightValue, a number, or lists of them.
        origins: By node, where the values of its fixed elements come from, as a phrase.
    """

    def __init__(self, graph: AtenGraph) -> None:
        self.graph, self.log = graph, ChannelLog()
        self.values: dict[fx.Node, Any] = {}
        self.origins: dict[fx.Node, str] = {}
        self.stored: dict[str, StoredTensor] = {}

    def run(self, rules: Mapping[str, Callable[[Propagation, fx.Node], Any]]) -> ChannelLog:
        """Follows the channels through all nodes.

        rules: By the name of an op, what returns the labels of its result. Of an op without one,
        that is not elementwise, all channels of the inputs stay.
        """
        for node in self.graph.gm.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.open_placeholder(node)
            elif node.op == "get_attr":
                self.set_fixed(node, "a constant")
            elif node.op == "output":
                self.pin_all(node, "they are in the model's output")
            elif node.target is operator.getitem:
                self.values[node] = self.get(node.args[0])[node.args[1]]
                self.origins[node] = self.origins[node.args[0]]
            else:
                self.apply(node, rules)
        self.pin_unread()
        return self.log

    def pin_unread(self) -> None:
        """Makes stay what the call read only a part of, such as the first few positions.

        Another call may read the rest. Of a matrix it is the unread rows and columns that stay; the
        others are in their sets as a whole.
        """
        read = self.log.find_read()
        for stored in self.stored.values():
            reason = f"the call reads only a part of {stored.name}"
            for axis in (*(stored.matrix or ()), stored.elements):
                if axis is None or read[axis.first : axis.first + axis.size].all():
                    continue
                atoms = np.arange(axis.first, axis.first + axis.size)
                own = atoms if axis.dim is None else atoms[~read[atoms]]
                self.log.pin(torch.from_numpy(own), reason)

    def apply(
        self, node: fx.Node, rules: Mapping[str, Callable[[Propagation, fx.Node], Any]]
    ) -> None:
        """Finds the labels of one op's result."""
        name = get_name(node)
        self.origins[node] = self.describe_origin(node)
        if name in MOVES and not changes_dtype(node):
            self.values[node] = self.move(node, name)
        elif name in CASTS:
            self.values[node] = self.get(node.args[0])
        elif name in rules:
            self.values[node] = rules[name](self, node)
        elif is_pointwise(node) or name in WRITES:
            inplace = name.endswith("_")
            self.values[node] = combine(
                self.log, node.name, self.list_operands(node), inplace=inplace
            )
        else:
            self.stop(node)

    def stop(self, node: fx.Node) -> None:
        """Follows no channel through an op that has no rule."""
        self.pin_all(node, f"they go through {get_name(node) or node.name}, which has no rule")
        self.set_fixed(node, f"the output of {get_name(node) or node.name}")

    def open_placeholder(self, node: fx.Node) -> Any:
        """Returns the value of an input of the graph."""
        buffer = self.graph.buffers.get(node)
        name = self.graph.parameters.get(node, buffer)
        if name is None:
            self.set_fixed(node, "an input of the call or a constant")
            return self.values[node]
        self.origins[node] = f"the buffer {name}" if buffer else name
        shape = tuple(node.meta["val"].shape)
        stored = self.stored.setdefault(name, StoredTensor(name, shape, buffer is not None))
        return WeightValue(stored, self.log)

    def set_fixed(self, node: fx.Node, origin: str) -> None:
        """Gives a node labels of 0."""
        self.values[node] = tree_map(make_fixed, node.meta.get("val"))
        self.origins[node] = origin

    def get(self, argument: Any) -> Any:
        """Returns the value of an argument."""
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def get_labels(self, argument: Any) -> Tensor:
        """Returns the labels of an argument that is a tensor."""
        value = self.get(argument)
        labels = value.get_elements() if isinstance(value, WeightValue) else value
        assert isinstance(labels, Tensor)
        return labels

    def get_operand(self, argument: fx.Node) -> Operand:
        """Returns the labels of an argument, and what it is."""
        return Operand(self.get_labels(argument), self.origins[argument])

    def list_operands(self, node: fx.Node) -> list[Operand]:
        """Returns all tensors among the arguments of a node."""
        nodes = [
            leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)
        ]
        return [self.get_operand(n) for n in nodes if isinstance(self.get(n), Tensor | WeightValue)]

    def move(self, node: fx.Node, name: str) -> Any:
        """Moves labels as an op moves elements."""
        source, target = self.get(node.args[0]), cast(Callable[..., Any], node.target)
        if name in ("view", "_unsafe_view"):  # labels have strides of their own
            target = torch.ops.aten.reshape.default
        elif name == "view_as":
            target = torch.ops.aten.reshape_as.default
        if isinstance(source, WeightValue) and name not in JOINING:
            args, kwargs = tree_map(self.get_label_argument, (node.args[1:], dict(node.kwargs)))

            def change(labels: Tensor) -> Any:
                return target(labels, *args, **kwargs)

            example = node.meta["val"]
            if isinstance(example, Tensor):
                return source.move(change)
            return [source.move(partial(take, change, k)) for k in range(len(example))]
        args, kwargs = tree_map(self.get_label_argument, (list(node.args), dict(node.kwargs)))
        moved = target(*args, **kwargs)
        return tree_map(lambda x: compact(x) if isinstance(x, Tensor) else x, moved)

    def get_label_argument(self, leaf: Any) -> Any:
        """Returns an argument of an op that is called with labels: the labels of a tensor."""
        return self.get_labels(leaf) if is_tensor(self.get(leaf)) else self.get(leaf)

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Makes all channels among the arguments of a node stay."""
        for leaf in tree_leaves((node.args, node.kwargs)):
            for value in tree_leaves(self.get(leaf)) if isinstance(leaf, fx.Node) else ():
                if isinstance(value, WeightValue):
                    if len(value.stored.shape) > 1 and not value.stored.state:
                        value.get_planes()
                    value.pin(reason)
                elif isinstance(value, Tensor):
                    self.log.pin(value, reason)

    def describe_origin(self, node: fx.Node) -> str:
        """Returns where the elements of a result come from: its first input, or the op itself."""
        sources = [n for n in tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]
        if get_name(node) in MOVES | CASTS or is_pointwise(node):
            fixed = [n for n in sources if is_fixed(self.get(n))]
            if fixed or sources:
                return self.origins[(fixed or sources)[0]]
        return f"the output of {get_name(node) or node.name}"


def get_name(node: fx.Node) -> str:
    """Returns the name of an aten op without its overload; "" for any other target."""
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else ""


def is_pointwise(node: fx.Node) -> bool:
    """Returns whether an op works on elements of the same index alone."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def changes_dtype(node: fx.Node) -> bool:
    """Returns whether a view reads the bytes of its input as numbers of another kind."""
    return any(isinstance(argument, torch.dtype) for argument in node.args)


def is_tensor(value: Any) -> bool:
    """Returns whether a value is that of a tensor."""
    return isinstance(value, Tensor | WeightValue)


def is_fixed(value: Any) -> bool:
    """Returns whether all elements of a value are fixed."""
    if isinstance(value, WeightValue):
        return value.stored.state
    return isinstance(value, Tensor) and not bool((value > 0).any())


def make_fixed(value: Any) -> Any:
    """Returns labels of 0 for a tensor; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros((1,) * value.dim(), dtype=torch.int64, device="cpu").expand(value.shape)


def take(change: Callable[[Tensor], Any], k: int, labels: Tensor) -> Tensor:
    """Returns one part of labels that an op cuts."""
    part: Tensor = change(labels)[k]
    return part
