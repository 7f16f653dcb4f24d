"""weight -> WeightUse: every call that multiplies by a folded weight, as a kernel would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ...backends.custom_op import is_channels_last
from ...backends.kernel_family import MatmulProblem
from ...graph.flat_graph import get_example_value
from ...graph.op_table import OP_TABLE
from ..planned_weight import Refusal, WeightUse


def find_uses(weight: fx.Node) -> tuple[WeightUse, ...] | Refusal:
    """Finds every use of a weight as a kernel would run it.

    One use that no kernel can run refuses them all: the placeholder stands for one thing.

    Args:
        weight: The placeholder that stands for the weight.

    Returns:
        The uses, at least one, or why no kernel can run them.
    """
    uses = []
    for node in weight.users:
        use = _describe_use(node, weight)
        if isinstance(use, Refusal):
            return use
        uses.append(use)
    return tuple(uses) or Refusal("nothing reads it in this graph")


def bind_operands(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of a use's node by name: input, weight, bias, ..."""
    return OP_TABLE[node.target].bind(node.args, node.kwargs)


def _describe_use(node: fx.Node, weight: fx.Node) -> WeightUse | Refusal:
    entry = OP_TABLE.get(node.target) if node.op == "call_function" else None
    if entry is None or entry.name not in ("linear", "conv2d"):
        return Refusal(f"read by {_name(node)}, for which there is no sparse kernel")
    args = bind_operands(node)
    x, bias = args["input"], args.get("bias")
    if args["weight"] is not weight or weight in (x, bias):
        return Refusal(f"read by {_name(node)} as another argument than the weight")
    seen, out = get_example_value(x), get_example_value(node)
    if not isinstance(seen, Tensor) or not isinstance(out, Tensor):
        return Refusal(f"the shapes of {_name(node)} are not known")
    if bias is not None and get_example_value(bias).shape != get_example_value(weight).shape[:1]:
        return Refusal(f"read by {_name(node)} with a bias that is not one value per row")
    shape = _read_shape(seen)
    if shape is None:
        return Refusal(f"a size of the input of {_name(node)} depends on the data")
    conv: dict[str, tuple[int, ...]] = {}
    if entry.name == "conv2d":
        if len(shape) != 4 or args.get("groups", 1) != 1:
            return Refusal("no sparse kernel for a convolution without a batch dimension")
        conv = _geometry(args, tuple(get_example_value(weight).shape[2:]))
        if not conv:
            return Refusal("no sparse kernel for padding given as a word")
    act, last = _activation(node)
    channels_last = seen.dim() == 4 and is_channels_last(seen)
    return WeightUse(node, last, MatmulProblem(shape, out.dtype, channels_last, act=act, **conv))


def _geometry(args: Mapping[str, Any], kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    padding = args.get("padding", 0)
    if isinstance(padding, str):
        if padding != "valid":
            return {}
        padding = 0
    sizes = {"stride": args.get("stride", 1), "padding": padding}
    sizes["dilation"] = args.get("dilation", 1)
    pairs = {
        name: (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
        for name, value in sizes.items()
    }
    return {"kernel": kernel, **pairs}


def _activation(node: fx.Node) -> tuple[str, fx.Node]:
    """The activation that alone reads the product, by the name kernels know it, and its node."""
    user = next(iter(node.users), node)
    if len(node.users) != 1 or user.op != "call_function" or user.args[:1] != (node,):
        return "none", node
    if user.target is F.silu:
        return "silu", user
    if user.target is F.gelu:
        form = user.kwargs.get("approximate", "none")
        return ("gelu_tanh" if form == "tanh" else "gelu"), user
    return "none", node


def _read_shape(x: Tensor) -> tuple[int, ...] | None:
    """Returns a shape, dynamic sizes as in the first call; None if one depends on values."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in x.shape]
    return None if None in sizes else tuple(int(size) for size in sizes)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
