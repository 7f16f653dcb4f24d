"""The rules of single ops: how channels pass products, norms, attention and resizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .op_rules import Operand, attend, combine, contract, multiply, reduce, within_slices
from .propagate import Propagation, get_name, make_fixed
from .weight_value import WeightValue

Rule = Callable[[Propagation, fx.Node], Any]


def bind(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of a node by name, with the defaults of its op's schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = {}
    for k, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        known = node.args[k] if k < len(node.args) else default
        values[argument.name] = node.kwargs.get(argument.name, known)
    return values


def get_shape(node: fx.Node) -> torch.Size:
    """Returns the shape of the result of a node."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def stop(walk: Propagation, node: fx.Node) -> Any:
    """Follows no channel through the op."""
    walk.stop(node)
    return walk.values[node]


def read_matrix(value: Any, dims: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Returns the labels of a weight along two of its dimensions; None where it is no matrix there.

    The weight may have been turned, cut or reshaped, as long as both have labels of their own.
    """
    if not isinstance(value, WeightValue) or value.stored.state or len(value.stored.shape) < 2:
        return None
    planes = value.get_planes()
    if planes[0].dim() <= max(dims):
        return None
    for first, second in (planes, planes[::-1]):
        corner = [0] * first.dim()
        along = []
        for labels, dim in ((first, dims[0]), (second, dims[1])):
            index: list[Any] = list(corner)
            index[dim] = slice(None)
            vector = labels[tuple(index)]
            view = [1] * labels.dim()
            view[dim] = -1
            if not bool((labels == vector.view(view)).all()):
                break
            along.append(vector)
        if len(along) == 2:
            return along[0], along[1]
    return None


def apply_bias(walk: Propagation, node: fx.Node, rows: Tensor, bias: Any) -> None:
    """Adds a bias to the rows of a product."""
    if isinstance(bias, fx.Node):
        operands = [Operand(rows, node.name), walk.get_operand(bias)]
        combine(walk.log, f"{node.name}/bias", operands)


def apply_linear(walk: Propagation, node: fx.Node) -> Any:
    """Applies linear(x, w, b): columns of w meet the last dimension of x, rows are new channels."""
    bound = bind(node)
    axes = read_matrix(walk.get(bound["weight"]), (0, 1))
    if axes is None:
        return stop(walk, node)
    rows, columns = axes
    x = walk.get_operand(bound["input"])
    contract(walk.log, node.name, x.labels, -1, columns, x.origin)
    walk.log.record(rows, f"{node.name}/rows")
    apply_bias(walk, node, rows, bound["bias"])
    return rows.expand(get_shape(node))


def apply_conv(walk: Propagation, node: fx.Node) -> Any:
    """Applies conv(x, w, b): columns of w meet the channels of x at every position."""
    bound, turned = bind(node), "transpose" in get_name(node)
    weight = walk.get(bound["weight"])
    axes = read_matrix(weight, (1, 0) if turned else (0, 1))
    x = walk.get_operand(bound["input"])
    dim = 1 - len(get_shape(bound["weight"]))
    grouped = bound["groups"] != 1
    depthwise = bound["groups"] == x.labels.shape[dim] == get_shape(bound["weight"])[0]
    if axes is None or (grouped and (turned or not depthwise)):
        return stop(walk, node)
    rows, columns = axes
    if grouped:
        walk.log.pin(columns, "a depthwise convolution has one column")
        contract(walk.log, node.name, x.labels, dim, rows, x.origin)
    else:
        contract(walk.log, node.name, x.labels, dim, columns, x.origin)
    walk.log.record(rows, f"{node.name}/rows")
    apply_bias(walk, node, rows, bound["bias"])
    return rows.view(-1, *[1] * (-dim - 1)).expand(get_shape(node))


def apply_matmul(walk: Propagation, node: fx.Node) -> Any:
    """Applies a @ b of two activations, or x @ w with a weight w [in, out]."""
    arguments = [walk.get(n) for n in node.args[:2]]
    if isinstance(arguments[1], WeightValue) and isinstance(arguments[0], Tensor):
        stacked = len(get_shape(node.args[1])) != 2  # type: ignore[arg-type]
        axes = None if stacked else read_matrix(arguments[1], (1, 0))
        if axes is None:
            return stop(walk, node)
        rows, columns = axes
        x = walk.get_operand(node.args[0])  # type: ignore[arg-type]
        contract(walk.log, node.name, x.labels, -1, columns, x.origin)
        walk.log.record(rows, f"{node.name}/rows")
        return rows.expand(get_shape(node))
    if not all(isinstance(value, Tensor) and value.dim() > 1 for value in arguments):
        return stop(walk, node)
    first, second = (walk.get_operand(n) for n in node.args[:2])  # type: ignore[arg-type]
    return multiply(walk.log, node.name, first, second)


def apply_embedding(walk: Propagation, node: fx.Node) -> Any:
    """Applies embedding(w, index): rows of w are looked up, its columns are the channels."""
    value = walk.get(node.args[0])
    axes = read_matrix(value, (0, 1))
    if axes is None:
        return stop(walk, node)
    walk.log.pin(axes[0], "they are looked up by number")
    walk.log.pin(walk.get_labels(node.args[1]), "they are numbers of embeddings")
    walk.log.record(axes[1], node.name)
    return axes[1].expand(get_shape(node))


def apply_norm(walk: Propagation, node: fx.Node) -> Any:
    """Applies a layer or RMS norm: statistics of the last dimensions, then scale and shift."""
    bound = bind(node)
    x = walk.get_operand(bound["input"])
    lead = range(x.labels.dim() - len(bound["normalized_shape"]))
    within_slices(walk.log, f"{node.name}/slices", x.labels, lead)
    affine = [bound[name] for name in ("weight", "bias") if isinstance(bound.get(name), fx.Node)]
    return combine(walk.log, node.name, [x, *(walk.get_operand(n) for n in affine)])


def view_channels(operand: Operand, dim: int) -> Operand:
    """Returns a vector over channels as it meets an activation [N, C, ...] of that many dims."""
    return Operand(operand.labels.view(-1, *[1] * (dim - 2)), operand.origin)


def apply_group_norm(walk: Propagation, node: fx.Node) -> Any:
    """Applies group_norm(x, groups, w, b): channels may mix within the groups alone."""
    bound = bind(node)
    x = walk.get_operand(bound["input"])
    batch, channels = x.labels.shape[:2]
    groups = torch.arange(channels, device="cpu") // (channels // bound["num_groups"])
    keys = torch.arange(batch, device="cpu").view(-1, 1) * bound["num_groups"] + groups
    keys = keys.view(batch, channels, *[1] * (x.labels.dim() - 2))
    walk.log.record(x.labels, f"{node.name}/groups", keys)
    affine = [bound[name] for name in ("weight", "bias") if isinstance(bound[name], fx.Node)]
    vectors = [view_channels(walk.get_operand(n), x.labels.dim()) for n in affine]
    return combine(walk.log, node.name, [x, *vectors])


def apply_batch_norm(walk: Propagation, node: fx.Node) -> Any:
    """Applies batch_norm in eval mode: its running statistics belong to the channels."""
    bound = bind(node)
    if bound["training"]:
        return stop(walk, node)
    x = walk.get_operand(bound["input"])
    vectors = []
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(bound[name], fx.Node):
            value = walk.get(bound[name])
            labels = value.get_state() if isinstance(value, WeightValue) else value
            operand = Operand(labels, walk.origins[bound[name]])
            vectors.append(view_channels(operand, x.labels.dim()))
    return combine(walk.log, node.name, [x, *vectors])


def apply_softmax(walk: Propagation, node: fx.Node) -> Any:
    """Applies softmax along a dimension: channels along it may mix within a slice."""
    labels = walk.get_labels(node.args[0])
    dim = bind(node)["dim"] % labels.dim()
    within_slices(walk.log, node.name, labels, [d for d in range(labels.dim()) if d != dim])
    return labels


def apply_attention(walk: Propagation, node: fx.Node) -> Any:
    """Applies attention, softmax(q k^T + mask) v of every head."""
    bound = bind(node)
    query, key, value = (walk.get_operand(bound[name]) for name in ("query", "key", "value"))
    if bound.get("enable_gqa"):
        return stop(walk, node)
    if isinstance(bound["attn_mask"], fx.Node):
        walk.log.pin(walk.get_labels(bound["attn_mask"]), "they mask attention")
    return attend(walk.log, node.name, query, key, value)


def apply_reduction(walk: Propagation, node: fx.Node) -> Any:
    """Applies a sum, mean or other statistic over dimensions."""
    bound = bind(node)
    x = walk.get_labels(node.args[0])
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    if not isinstance(node.meta["val"], Tensor):
        return stop(walk, node)
    return reduce(walk.log, node.name, x, dims, keep=bool(bound.get("keepdim", False)))


def apply_resize(walk: Propagation, node: fx.Node) -> Any:
    """Applies pooling, interpolation or padding of the positions of [N, C, ...]."""
    x, shape = walk.get_labels(node.args[0]), node.meta["val"]
    if not isinstance(shape, Tensor) or shape.shape[:2] != x.shape[:2] or x.dim() < 3:
        return stop(walk, node)
    corner = x[(slice(None), slice(None), *[slice(0, 1)] * (x.dim() - 2))]
    walk.log.join(x, corner, "they differ from position to position")
    walk.log.record(corner, node.name)
    return corner.expand(shape.shape)


def apply_einsum(walk: Propagation, node: fx.Node) -> Any:
    """Applies an einsum of one tensor that sums nothing, which only turns it."""
    equation, tensors = str(node.args[0]), node.args[1]
    letters, arrow, result = equation.replace(" ", "").partition("->")
    assert isinstance(tensors, list | tuple)
    if len(tensors) != 1 or not arrow or sorted(letters) != sorted(result):
        return stop(walk, node)
    labels = walk.get_labels(tensors[0])
    if "." in letters or len({*letters}) != len(letters):
        return stop(walk, node)
    return labels.permute([letters.index(letter) for letter in result])


def make_constant(walk: Propagation, node: fx.Node) -> Any:
    """Returns the labels of a new tensor that takes no elements of others."""
    return make_fixed(node.meta["val"])


RULES: Mapping[str, Rule] = {
    "linear": apply_linear,
    **{f"conv{d}d": apply_conv for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": apply_conv for d in (1, 2, 3)},
    **dict.fromkeys(("matmul", "mm", "bmm"), apply_matmul),
    "embedding": apply_embedding,
    **dict.fromkeys(("layer_norm", "rms_norm"), apply_norm),
    "group_norm": apply_group_norm,
    "batch_norm": apply_batch_norm,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), apply_softmax),
    "scaled_dot_product_attention": apply_attention,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm"), apply_reduction
    ),
    **dict.fromkeys(
        (
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
            *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
            *("avg_pool1d", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
            *("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"),
        ),
        apply_resize,
    ),
    "einsum": apply_einsum,
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
        make_constant,
    ),
}
"""By the name of an aten op."""
