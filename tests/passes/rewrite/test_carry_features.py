"""carry_features: what stays feature-major between V:n:m layers, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsedm_compiler.backends.vnm.ops import vnm_linear_op
from sparsedm_compiler.passes.rewrite.carry_features import carry_features
from tests.backends.vnm.vnm_cases import held
from tests.oracle import assert_same

CASE = held("64:2:8", 64, 64, torch.bfloat16)
Body = Callable[[Callable[..., Tensor], Tensor], Any]


def graph_of(body: Body) -> fx.GraphModule:
    """``body`` traced; what it calls as its first argument becomes one vnm_linear."""

    def product(x: Any) -> Any:
        return x.tracer.create_proxy(
            "call_function",
            vnm_linear_op,
            (x, packed, None, 64),
            {"act": "silu", **CASE.arguments()},
        )

    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, packed = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", "packed"))
    out = body(product, x)  # type: ignore[arg-type]
    graph.output(tuple(each.node for each in out) if isinstance(out, tuple) else out.node)
    return fx.GraphModule(torch.nn.Module(), graph)


def list_layouts(gm: fx.GraphModule) -> list[bool]:
    """Which products of a graph write feature-major, in order."""
    return [node.kwargs["feature_major"] for node in gm.graph.nodes if node.target is vnm_linear_op]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda f, x: f(f(x)), [1, 0]),
        (lambda f, x: f(F.dropout(F.gelu(f(x)), 0.1, training=False)), [1, 0]),
        (lambda f, x: f(f(f(x))), [1, 1, 0]),
        (lambda f, x: (lambda y: (f(y), f(F.silu(y))))(f(x)), [1, 0, 0]),
        (lambda f, x: (lambda y: (f(y), y))(f(x)), [0, 0]),  # the caller reads it, too
        (lambda f, x: f(f(x) + x), [0, 0]),
        (lambda f, x: f(F.softmax(f(x), -1)), [0, 0]),
        (lambda f, x: f(x), [0]),
    ],
)
def test_only_what_its_like_reads_is_carried(body: Body, expected: list[int]) -> None:
    gm = graph_of(body)
    code, x = gm.code, torch.randn(9, 64).bfloat16()
    before = gm(x, CASE.packed)
    assert carry_features(gm, ()) == sum(expected)
    gm.recompile()
    assert list_layouts(gm) == expected
    assert (gm.code == code) == (not any(expected))
    after = gm(x, CASE.packed)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (before, after)), strict=True):
        assert_same(a, b)
    assert carry_features(gm, ()) == 0
