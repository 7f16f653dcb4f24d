"""The op table: the products that each call target computes, and their MACs.

One entry serves Dynamo graphs (``torch._C._nn.linear``), exported graphs (``aten.linear.default``)
and eager calls that a torch function mode reports. Adding an op means adding an entry here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .einsum import EINSUM
from .op_entry import Arguments, OpEntry, Product


def _describe_linear(a: Arguments, out: Any) -> tuple[Product, ...]:
    return (Product(("weight",), lambda: out.numel() * a["weight"].shape[1]),)


def _describe_conv(a: Arguments, out: Any) -> tuple[Product, ...]:
    weight, groups = a["weight"], a.get("groups", 1)
    refusal = None
    if groups != 1:
        depthwise = groups == a["input"].shape[-weight.dim() + 1]
        refusal = "depthwise convolution" if depthwise else f"grouped convolution ({groups} groups)"
    macs = lambda: out.numel() * math.prod(weight.shape[1:])  # noqa: E731
    return (Product(("weight",), macs, "conv", refusal=refusal),)


def _describe_conv_transpose(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: a["input"].numel() * math.prod(a["weight"].shape[1:])  # noqa: E731
    return (Product(("weight",), macs, "conv", refusal="transposed convolution"),)


def _describe_bilinear(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: out.numel() * math.prod(a["weight"].shape[1:])  # noqa: E731
    return (Product(("weight",), macs, refusal="bilinear layer"),)


def _describe_matmul(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: out.numel() * a["input"].shape[-1]  # noqa: E731
    return (Product(("other", "input"), macs, "attention", fixed=False),)


def _describe_tensordot(a: Arguments, out: Any) -> tuple[Product, ...]:
    dims = a.get("dims", 2)
    summed = range(-dims, 0) if isinstance(dims, int) else dims[0]
    macs = lambda: out.numel() * math.prod(a["input"].shape[d] for d in summed)  # noqa: E731
    return (Product(("other", "input"), macs, "attention", fixed=False, refusal="tensordot"),)


def _describe_inner(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: out.numel() * a["input"].shape[-1]  # noqa: E731
    return (Product(("other", "input"), macs, "attention", fixed=False, refusal="inner product"),)


def _describe_grouped_mm(a: Arguments, out: Any) -> tuple[Product, ...]:
    """Returns the product of every group. input [M, K] or [G, M, K], other [K, N] or [G, K, N]."""
    x, other = a["input"], a["other"]
    groups = out.shape[0] if x.dim() == other.dim() == 2 else 1  # which share the K columns
    macs = lambda: out.numel() // groups * x.shape[-1]  # noqa: E731
    refusal = "a factor of grouped_mm"
    return (Product(("other", "input"), macs, "attention", fixed=False, refusal=refusal),)


def _count_attention_macs(query: Any, key: Any, value: Any) -> int:
    """Returns the MACs of QK and AV. query [..., L, E], key [..., S, E], value [..., S, Ev]."""
    return int(
        query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    )


def _describe_sdpa(a: Arguments, out: Any) -> tuple[Product, ...]:
    macs = lambda: _count_attention_macs(a["query"], a["key"], a["value"])  # noqa: E731
    return (Product((), macs, "attention", fixed=False),)


def _count_tokens(x: Any) -> int:
    return int(x.numel() // x.shape[-1])


def _count_heads_macs(query: Any, key: Any, extra: int = 0, source: int = -2) -> int:
    """Returns the MACs of QK and AV of all heads.

    query [..., E]; the keys lie along dimension ``source`` of key.
    """
    width = query.shape[-1]
    return int(2 * _count_tokens(query) * (key.shape[source] + extra) * width)


def _describe_multi_head_attention(a: Arguments, out: Any) -> tuple[Product, ...]:
    """Returns the products of attention with its projections.

    query [L, B, E] or [L, E]; key and value [S, B, E'] or [S, E'].
    """
    q, k, v = a["query"], a["key"], a["value"]
    width = q.shape[-1]
    extra = (a.get("bias_k") is not None) + bool(a.get("add_zero_attn"))
    projections = {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
    if not a.get("use_separate_proj_weight"):
        rows = lambda: sum(map(_count_tokens, (q, k, v))) * width * width  # noqa: E731
        products = [Product(("in_proj_weight",), rows)]
    else:
        products = [
            Product((name,), lambda x=x: x.numel() * width)  # type: ignore[misc]
            for name, x in projections.items()
        ]
    out_proj = lambda: _count_tokens(q) * a["out_proj_weight"].numel()  # noqa: E731
    products.append(Product(("out_proj_weight",), out_proj))
    attention = lambda: _count_heads_macs(q, k, extra, source=0)  # noqa: E731
    return (*products, Product((), attention, "attention", fixed=False))


def _describe_native_attention(a: Arguments, out: Any) -> tuple[Product, ...]:
    """Returns the products of nn.MultiheadAttention's fast path. query [B, L, E]."""
    q, k = a["query"], a["key"]
    width = q.shape[-1]
    return (
        Product(("qkv_weight",), lambda: 3 * q.numel() * width),
        Product(("proj_weight",), lambda: q.numel() * width),
        Product((), lambda: _count_heads_macs(q, k), "attention", fixed=False),
    )


def _describe_encoder_layer(a: Arguments, out: Any) -> tuple[Product, ...]:
    """Returns the products of nn.TransformerEncoderLayer's fast path. query [B, L, E]."""
    q, hidden = a["query"], a["ffn_weight_1"].shape[0]
    return (
        *_describe_native_attention({**a, "key": q}, out),
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


def _build_table() -> dict[Any, OpEntry]:
    """Returns the entries of all known ops, by call target."""
    table: dict[Any, OpEntry] = {}

    def add(name: str, arguments: tuple[str, ...], products: Any, *targets: Any) -> None:
        table.update(dict.fromkeys(targets, OpEntry(name, arguments, products)))

    add("linear", ("input", "weight", "bias"), _describe_linear, F.linear, _aten.linear.default)
    for d in (1, 2, 3):
        aten, name = getattr(_aten, f"conv{d}d"), f"conv{d}d"
        add(name, _CONV, _describe_conv, getattr(torch, name), aten.default, aten.padding)
        add(
            f"conv_transpose{d}d",
            _TRANSPOSE,
            _describe_conv_transpose,
            getattr(F, f"conv_transpose{d}d"),
        )
    add("bilinear", ("input1", "input2", "weight", "bias"), _describe_bilinear, F.bilinear)
    add("matmul", _PAIR, _describe_matmul, torch.matmul, operator.matmul, Tensor.matmul, "matmul")
    add("matmul", _PAIR, _describe_matmul, Tensor.__matmul__, _aten.matmul.default)
    add("mm", _PAIR, _describe_matmul, torch.mm, Tensor.mm, "mm", torch.mv, Tensor.mv, "mv")
    add("bmm", _PAIR, _describe_matmul, torch.bmm, Tensor.bmm, "bmm", _aten.bmm.default)
    add("addmm", _ADDED, _describe_matmul, torch.addmm, Tensor.addmm, "addmm", _aten.addmm.default)
    add("baddbmm", _ADDED, _describe_matmul, torch.baddbmm, Tensor.baddbmm, "baddbmm")
    table[torch.einsum] = EINSUM
    add("tensordot", (*_PAIR, "dims"), _describe_tensordot, torch.tensordot)
    add("inner", _PAIR, _describe_inner, torch.inner, Tensor.inner, "inner")
    grouped = (_aten._grouped_mm.default, torch._grouped_mm, getattr(F, "grouped_mm", None))
    add("grouped_mm", _PAIR, _describe_grouped_mm, *filter(None, grouped))
    add("attention", _QKV, _describe_sdpa, F.scaled_dot_product_attention)
    add("attention", _QKV, _describe_sdpa, _aten.scaled_dot_product_attention.default)
    add("attention", _QKV, _describe_sdpa, torch.ops.higher_order.flex_attention)
    add(
        "multi_head_attention", _MHA, _describe_multi_head_attention, F.multi_head_attention_forward
    )
    native = (*_NATIVE, "proj_weight", "proj_bias")
    add(
        "multi_head_attention",
        native,
        _describe_native_attention,
        torch._native_multi_head_attention,
    )
    add("encoder_layer", _LAYER, _describe_encoder_layer, torch._transformer_encoder_layer_fwd)
    return table


OP_TABLE: Mapping[Any, OpEntry] = _build_table()
"""The entry of each call target: a function, an overload or the name of a method."""
