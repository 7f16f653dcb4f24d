"""``conv(silu(group_norm(x + t))) -> norm_conv(x, t)``: no normalized tensor is written.

A kernel that copies its input before it multiplies normalizes and activates on the way. The norm of
a residual block reads ``x + t``, t one number per channel (the embedded timestep): it is part, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ...backends.registry import find_norm_ops
from ...graph.effects import may_draw, may_write_in_place
from ...graph.flat_graph import get_example_value
from ..planned_weight import Plan
from .match import commute, share_dtype

_NORM_NAMES = ("input", "num_groups", "weight", "bias", "eps")


@dataclass(frozen=True, slots=True)
class _Prologue:
    """What lies in front of a conv: ``pre_act(group_norm(source + offset))``.

    Attributes:
        nodes: The nodes that compute it, the last one first.
        source: What the norm reads.
        arguments: Those of the op behind (x, weight, bias, rows).
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    arguments: tuple[Any, ...]


def fuse_norms(gm: fx.GraphModule, plan: Plan) -> int:
    """Lets convs compute the GroupNorm and activation in front of them; returns how many do.

    The convs are those that a kernel family declares in its ``norm_ops``. Only where no gradient is
    asked for, which the op has not, where nothing else reads what lies in between, and where
    nothing is changed in place there.
    """
    ops = find_norm_ops()
    changes = 0
    for conv in [node for node in gm.graph.nodes if node.target in ops]:
        prologue = _find_prologue(conv)
        if prologue is not None:
            _fuse(conv, prologue, ops[conv.target])
            changes += 1
    return changes


def _fuse(conv: fx.Node, prologue: _Prologue, op: Any) -> None:
    graph, (_, *rest) = conv.graph, conv.args
    with graph.inserting_before(conv):
        x = graph.call_method("contiguous", (prologue.source,))  # the kernel reads planes
        x.meta["example_value"] = get_example_value(prologue.source).contiguous()
        fused = graph.call_function(op, (x, *rest, *prologue.arguments), conv.kwargs)
    value = get_example_value(conv)
    fused.meta = {**conv.meta, "example_value": value.contiguous()}
    conv.replace_all_uses_with(fused)
    for node in (conv, *prologue.nodes):
        graph.erase_node(node)


def _find_prologue(conv: fx.Node) -> _Prologue | None:
    """Returns what a conv can compute of what lies in front of it; None for nothing."""
    out: Any = get_example_value(conv)
    if not isinstance(out, Tensor) or out.dim() != 4 or out.requires_grad:
        return None
    if not isinstance(conv.args[0], fx.Node):
        return None
    nodes = list(_walk_back(conv.args[0]))
    norm = nodes[-1] if nodes else conv
    if norm.target is not F.group_norm:
        return None
    values: dict[str, Any] = {**dict(zip(_NORM_NAMES, norm.args, strict=False)), **norm.kwargs}
    source, offset = _split_offset(values["input"])
    if offset is not None:
        nodes.append(values["input"])
    if not _is_alone(nodes, conv) or not share_dtype(source, *nodes, conv):
        return None
    act = "silu" if any(node.target is F.silu for node in nodes) else "none"
    affine = values.get("weight"), values.get("bias")
    arguments = offset, *affine, values["num_groups"], values.get("eps", 1e-5), act
    return _Prologue(tuple(nodes), source, arguments)


def _walk_back(node: fx.Node) -> Iterator[fx.Node]:
    """Yields a dropout that drops nothing, an activation and a norm, as far as they are there."""
    if node.target is F.dropout and not may_draw(node) and isinstance(node.args[0], fx.Node):
        yield node
        node = node.args[0]
    if node.target is F.silu and isinstance(node.args[0], fx.Node):
        yield node
        node = node.args[0]
    if node.target is F.group_norm:
        yield node


def _split_offset(summed: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Returns (x, t) of x + t, t one number for each channel; else the node and None."""
    if len(summed.users) == 1:
        for x, t in commute(summed, operator.add):
            if _is_per_channel(t, x):
                return x, t
    return summed, None


def _is_per_channel(t: Any, x: Any) -> bool:
    """Returns whether t is [N, C, 1, 1] or [1, C, 1, 1] beside x [N, C, H, W]."""
    if not isinstance(t, fx.Node) or not isinstance(x, fx.Node):
        return False
    small, large = get_example_value(t), get_example_value(x)
    if not isinstance(small, Tensor) or not isinstance(large, Tensor) or large.dim() != 4:
        return False
    images, *rest = small.shape
    shared = images == 1 or str(images) == str(
        large.shape[0]
    )  # as text: no guard on a dynamic size
    return shared and rest == [large.shape[1], 1, 1] and small.dtype == large.dtype


def _is_alone(nodes: list[fx.Node], conv: fx.Node) -> bool:
    """Returns whether each node has one reader, and nothing is written until the conv reads."""
    if any(len(node.users) != 1 for node in nodes):
        return False
    node = nodes[-1]
    while node is not conv:
        if may_write_in_place(node) and node not in nodes:
            return False
        node = node.next
    return True
