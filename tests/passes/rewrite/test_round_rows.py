"""Rows are rounded to 8 bits once, with the norm or the activation in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cuda.quantize import round_rows
from sparsedm_compiler.passes import pipeline
from sparsedm_compiler.passes.rewrite import round_rows as rewriting
from tests.backends.cuda.here import kernels_of, on_cpu
from tests.oracle import oracle_of

Forward = Callable[..., Tensor]
KERNELS = ("cuda_fp8", "cuda_semi_fp8", "cuda_semi_int8")
RELATIVE = {"cuda_fp8": 0.08, "cuda_semi_fp8": 0.08, "cuda_semi_int8": 0.03}
"""Of the largest output, after two or three layers in 8 bits."""


class Net(nn.Module):
    """A few layers, wired by ``forward``."""

    def __init__(self, wired: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.norm, self.bare = nn.LayerNorm(32), nn.LayerNorm(32, elementwise_affine=False)
        self.rms = nn.RMSNorm(32, eps=1e-6)
        self.modulation = nn.Parameter(torch.randn(2, 2, 1, 32))
        self.wired = wired

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wired(self, self.first(x)))


def attention(net: Net, x: Tensor) -> Tensor:
    x = net.norm(x)
    return F.scaled_dot_product_attention(net.a(x), net.b(x), net.c(x))


def adaln(net: Net, x: Tensor) -> Tensor:
    scale, shift = net.modulation
    return net.a(net.bare(x) * (1 + scale) + shift)


def half_modulated(net: Net, x: Tensor) -> Tensor:
    scale, shift = net.modulation
    return net.a(net.bare(x) * (2 + scale) + shift)


def rms(net: Net, x: Tensor) -> Tensor:
    return net.a(net.rms(x))


def mlp(net: Net, x: Tensor) -> Tensor:
    return net.b(F.gelu(net.a(x), approximate="tanh"))


def own_activation(net: Net, x: Tensor) -> Tensor:
    return net.a(F.silu(x * 2))


def shared(net: Net, x: Tensor) -> Tensor:
    return net.a(x) + net.b(x)


def alone(net: Net, x: Tensor) -> Tensor:
    return net.a(x)


def read_twice(net: Net, x: Tensor) -> Tensor:
    hidden = F.gelu(net.a(x))
    return net.b(hidden) + hidden


def in_place(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x)
    x.add_(1.0)
    return net.a(y) + x


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
CASES: tuple[tuple[Forward, int, dict[str, Any]], ...] = (
    (attention, 3, {"norm": "layer"}),
    (adaln, 1, {"norm": "layer", "epsilon": 1e-5}),
    (half_modulated, 0, {}),
    (rms, 1, {"norm": "rms", "epsilon": 1e-6}),
    (mlp, 1, {"act": "gelu_tanh"}),
    (own_activation, 1, {"act": "silu"}),
    (shared, 2, {}),
    (alone, 0, {}),
    (read_twice, 0, {}),
    (in_place, 0, {}),
)


def run_rewritten(
    patch: pytest.MonkeyPatch, wired: Forward, kernel: str, backend: str = "eager"
) -> tuple[nn.Module, list[fx.Node], list[int]]:
    """A folded model whose inner layers the kernel runs, its rounding nodes, and the counts."""
    on_cpu(patch)
    nodes: list[fx.Node] = []
    counts: list[int] = []

    def watch(gm: fx.GraphModule, plan: Any) -> int:
        counts.append(rewriting.round_rows(gm, plan))
        assert rewriting.round_rows(gm, plan) == 0
        nodes.extend(node for node in gm.graph.nodes if node.target is round_rows)
        return counts[-1]

    passes = [watch if one is rewriting.round_rows else one for one in pipeline.INFER]
    patch.setattr(pipeline, "INFER", tuple(passes))
    fast = sdm.compile(
        Net(wired), "2:4", mode="infer", backend=backend, kernels={"*": kernel}, finalize=False
    )
    with torch.no_grad():
        fast(X)
    return fast, nodes, counts


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("wired", "count", "prologue"), CASES)
def test_round_rows_takes_norms_and_activations_along(
    wired: Forward, count: int, prologue: dict[str, Any], kernel: str, monkeypatch: Any
) -> None:
    fast, nodes, counts = run_rewritten(monkeypatch, wired, kernel)
    assert kernel in kernels_of(fast).values()
    assert sum(counts) == count
    assert len(nodes) == (count > 0)
    for node in nodes:
        assert prologue.items() <= node.kwargs.items()
        assert ("scale" in node.kwargs) == (wired is adaln)
    with torch.no_grad():
        out, expected = fast(X), oracle_of(fast)(X)
    assert 0 < (out - expected).abs().max() < RELATIVE[kernel] * expected.abs().max()


@pytest.mark.parametrize("wired", [attention, adaln, mlp])
def test_round_rows_leaves_the_gradient_of_x(wired: Forward, monkeypatch: Any) -> None:
    fast, _, counts = run_rewritten(monkeypatch, wired, "cuda_fp8")
    assert sum(counts)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    fast(inputs[0]).square().sum().backward()
    oracle_of(fast)(inputs[1]).square().sum().backward()
    ours, theirs = (one.grad for one in inputs)
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).abs().max() < 0.15 * theirs.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
def test_round_rows_runs_under_inductor(kernel: str, monkeypatch: Any) -> None:
    fast, _, counts = run_rewritten(monkeypatch, adaln, kernel, "inductor")
    assert sum(counts) == 1
    with torch.no_grad():
        eager, _, _ = run_rewritten(monkeypatch, adaln, kernel)
        out, expected = fast(X), eager(X)
    assert (out - expected).abs().max() < RELATIVE[kernel] * expected.abs().max()
