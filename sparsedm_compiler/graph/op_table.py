"""The op table: what each call target multiplies, and with how many MACs.

One entry serves Dynamo graphs (``torch._C._nn.linear``), exported graphs (``aten.linear.default``)
and eager calls seen by a torch function mode. Adding an op means adding an entry here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication inside a call.

    ``factors``: names of the arguments that may hold a weight; ``fixed`` says that the first one
    is the weight by the op's definition, otherwise the product is of two activations
    ("attention") unless a factor turns out to be a parameter. ``macs``: exact count, computed on
    demand (shapes may be symbolic). ``refusal``: why this op's weight is never pruned.
    """

    factors: tuple[str, ...]
    macs: Callable[[], int]
    kind: str = "linear"
    fixed: bool = True
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class OpEntry:
    """A known op: its name in reports, its argument names in order, and its products."""

    name: str
    arguments: tuple[str, ...]
    products: Callable[[Arguments, Any], tuple[Product, ...]]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name; positional ones beyond the known names are left out."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


def _linear(a: Arguments, out: Any) -> tuple[Product, ...]:
    return (Product(("weight",), lambda: out.numel() * a["weight"].shape[1]),)


def _conv(a: Arguments, out: Any) -> tuple[Product, ...]:
    weight, groups = a["weight"], a.get("groups", 1)
    refusal = None
    if groups != 1:
        depthwise = groups == a["input"].shape[-weight.dim() + 1]
        refusal = "depthwise convolution" if depthwise else f"grouped convolution ({groups} groups)"
    macs = lambda: out.numel() * math.prod(weight.shape[1:])  # noqa: E731
    return (Product(("weight",), macs, "conv", refusal=refusal),)


def _conv_transpose(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: a["input"].numel() * math.prod(a["weight"].shape[1:])  # noqa: E731
    return (Product(("weight",), macs, "conv", refusal="transposed convolution"),)


def _bilinear(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: out.numel() * math.prod(a["weight"].shape[1:])  # noqa: E731
    return (Product(("weight",), macs, refusal="bilinear layer"),)


def _matmul(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: out.numel() * a["input"].shape[-1]  # noqa: E731
    return (Product(("other", "input"), macs, "attention", fixed=False),)


def _einsum_sizes(equation: str, operands: tuple[Any, ...]) -> tuple[dict[str, int], str]:
    inputs, _, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):
        head, _, tail = term.partition("...")
        sizes.update(zip(head, operand.shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(operand.shape), strict=False))
    if "->" not in equation:
        letters = inputs.replace(",", "").replace("...", "")
        output = "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    return sizes, output


def _einsum(a: Arguments, out: Any) -> tuple[Product, ...]:
    operands = a["input"] if isinstance(a["input"], (tuple, list)) else (a["input"], a.get("other"))
    if len(operands) != 2 or operands[1] is None:
        return ()
    sizes, output = _einsum_sizes(a["equation"], tuple(operands))
    summed = [size for letter, size in sizes.items() if letter not in output]
    if not summed:
        return ()  # an outer product accumulates nothing
    macs = lambda: out.numel() * math.prod(summed)  # noqa: E731
    return (Product(("other", "input"), macs, "attention", fixed=False),)


def _attention_macs(query: Any, key: Any, value: Any) -> int:
    """QK and AV. query [..., L, E], key [..., S, E], value [..., S, Ev]."""
    return int(
        query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    )


def _sdpa(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: _attention_macs(a["query"], a["key"], a["value"])  # noqa: E731
    return (Product((), macs, "attention", fixed=False),)


def _tokens(x: Any) -> int:
    return int(x.numel() // x.shape[-1])


def _heads_macs(query: Any, key: Any, extra: int = 0, source: int = -2) -> int:
    """QK and AV of all heads. query [..., E]; the keys lie along dimension ``source`` of key."""
    width = query.shape[-1]
    return int(2 * _tokens(query) * (key.shape[source] + extra) * width)


def _multi_head_attention(a: Arguments, out: Any) -> tuple[Product, ...]:
    """query [L, B, E] or [L, E]; key and value [S, B, E'] or [S, E']."""
    q, k, v = a["query"], a["key"], a["value"]
    width = q.shape[-1]
    extra = (a.get("bias_k") is not None) + bool(a.get("add_zero_attn"))
    projections = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    if not a.get("use_separate_proj_weight"):
        rows = lambda: sum(map(_tokens, (q, k, v))) * width * width  # noqa: E731
        found = [Product(("in_proj_weight",), rows)]
    else:
        found = [
            Product((name,), lambda x=x: x.numel() * width)  # type: ignore[misc]
            for name, x in projections.items()
        ]
    found.append(Product(("out_proj_weight",), lambda: q.numel() * width))
    attention = lambda: _heads_macs(q, k, extra, source=0)  # noqa: E731
    return (*found, Product((), attention, "attention", fixed=False))


def _native_attention(a: Arguments, out: Any) -> tuple[Product, ...]:
    """The inference fast path of nn.MultiheadAttention. query [B, L, E]."""
    q, k = a["query"], a["key"]
    width = q.shape[-1]
    return (
        Product(("qkv_weight",), lambda: 3 * q.numel() * width),
        Product(("proj_weight",), lambda: q.numel() * width),
        Product((), lambda: _heads_macs(q, k), "attention", fixed=False),
    )


def _encoder_layer(a: Arguments, out: Any) -> tuple[Product, ...]:
    """The inference fast path of nn.TransformerEncoderLayer. query [B, L, E]."""
    q, hidden = a["query"], a["ffn_weight_1"].shape[0]
    return (
        *_native_attention({**a, "key": q}, out),
        Product(("ffn_weight_1",), lambda: q.numel() * hidden),
        Product(("ffn_weight_2",), lambda: q.numel() * hidden),
    )


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
_MHA = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight"),
    *("out_proj_bias", "training", "key_padding_mask", "need_weights", "attn_mask"),
    *("use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
)
_NATIVE = ("query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias")
_LAYER = (
    *("query", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    *("use_gelu", "norm_first", "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2"),
    *("norm_bias_2", "ffn_weight_1", "ffn_bias_1", "ffn_weight_2", "ffn_bias_2"),
)
_PAIR = ("input", "other")
_ADDED = ("added", "input", "other")
_QKV = ("query", "key", "value")
_aten = torch.ops.aten


def _entries() -> dict[Any, OpEntry]:
    table: dict[Any, OpEntry] = {}

    def add(name: str, arguments: tuple[str, ...], products: Any, *targets: Any) -> None:
        table.update(dict.fromkeys(targets, OpEntry(name, arguments, products)))

    add("linear", ("input", "weight", "bias"), _linear, F.linear, _aten.linear.default)
    for d in (1, 2, 3):
        aten, name = getattr(_aten, f"conv{d}d"), f"conv{d}d"
        add(name, _CONV, _conv, getattr(torch, name), aten.default, aten.padding)
        add(f"conv_transpose{d}d", _TRANSPOSE, _conv_transpose, getattr(F, f"conv_transpose{d}d"))
    add("bilinear", ("input1", "input2", "weight", "bias"), _bilinear, F.bilinear)
    add("matmul", _PAIR, _matmul, torch.matmul, operator.matmul, Tensor.matmul, "matmul")
    add("matmul", _PAIR, _matmul, Tensor.__matmul__, _aten.matmul.default)
    add("mm", _PAIR, _matmul, torch.mm, Tensor.mm, "mm", torch.mv, Tensor.mv, "mv")
    add("bmm", _PAIR, _matmul, torch.bmm, Tensor.bmm, "bmm", _aten.bmm.default)
    add("addmm", _ADDED, _matmul, torch.addmm, Tensor.addmm, "addmm", _aten.addmm.default)
    add("baddbmm", _ADDED, _matmul, torch.baddbmm, Tensor.baddbmm, "baddbmm")
    add("einsum", ("equation", "input", "other"), _einsum, torch.einsum)
    add("attention", _QKV, _sdpa, F.scaled_dot_product_attention)
    add("attention", _QKV, _sdpa, _aten.scaled_dot_product_attention.default)
    add("attention", _QKV, _sdpa, torch.ops.higher_order.flex_attention)
    add("multi_head_attention", _MHA, _multi_head_attention, F.multi_head_attention_forward)
    native = (*_NATIVE, "proj_weight", "proj_bias")
    add("multi_head_attention", native, _native_attention, torch._native_multi_head_attention)
    add("encoder_layer", _LAYER, _encoder_layer, torch._transformer_encoder_layer_fwd)
    return table


OP_TABLE: Mapping[Any, OpEntry] = _entries()
"""Call target (function, overload or method name) to Entry."""
