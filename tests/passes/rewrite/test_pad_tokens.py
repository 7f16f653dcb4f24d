"""Tokens are padded once, carried through what acts on each row, and cut where rows meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cusparselt.ops import semi_linear
from sparsedm_compiler.passes import pipeline
from sparsedm_compiler.passes.rewrite.pad_tokens import pad_tokens
from tests.backends.cuda.here import semi_on_cpu
from tests.oracle import assert_same

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A few layers, wired by ``forward``."""

    def __init__(self, wired: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.two = nn.Linear(32, 16)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.5)
        self.rms = nn.RMSNorm(16)
        self.scale = nn.Parameter(torch.randn(16))
        self.wired = wired

    def forward(self, x: Tensor) -> Tensor:
        return self.wired(self, x)


def mlp(net: Net, x: Tensor) -> Tensor:
    return net.b(F.gelu(net.a(x)))


def long_mlp(net: Net, x: Tensor) -> Tensor:
    hidden = net.drop(torch.tanh(net.a(x)) * net.scale + 0.5)
    return net.c(net.norm(1 - net.b(hidden)))


def attention(net: Net, x: Tensor) -> Tensor:
    x = net.norm(x)
    return F.scaled_dot_product_attention(net.a(x), net.b(x), net.c(x))


def residual(net: Net, x: Tensor) -> Tensor:
    for layer in (net.a, net.b, net.c):
        x = x + layer(net.norm(x))
    return x


def rms(net: Net, x: Tensor) -> Tensor:
    return net.b(net.rms(net.a(x)))


def skip(net: Net, x: Tensor) -> Tensor:
    first = net.a(x)
    return net.two(torch.cat([net.b(first), first], dim=-1))


def meeting(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).flip(1))


def turned(net: Net, x: Tensor) -> Tensor:
    """The sum lies in memory as the turned operand does, and is viewed so."""
    first = net.a(x)
    total = first.transpose(0, 1).contiguous().transpose(0, 1) + first
    return net.b(total).sum() + total.transpose(0, 1).view(-1)


def modulated(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x) * x.mean(1, keepdim=True))


WIRED = (mlp, long_mlp, attention, residual, rms, skip, meeting, turned, modulated)


@pytest.fixture(autouse=True)
def _semi(monkeypatch: pytest.MonkeyPatch) -> None:
    semi_on_cpu(monkeypatch)
    torch._dynamo.reset()  # it remembers by line of code which sizes have varied


def run(wired: Forward, x: Tensor, **options: Any) -> tuple[Tensor, fx.GraphModule]:
    """The output, and the graph that ran."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm

    net = options.pop("net", None) or Net(wired).eval()
    fast = sdm.compile(
        net.to(x.dtype),
        "2:4",
        mode="infer",
        policy="all",
        backend=backend,
        kernels={"*": "sparse"},
    )
    with torch.no_grad():
        return fast(x), graphs[-1]


def unpadded(wired: Forward, x: Tensor, patch: pytest.MonkeyPatch) -> tuple[Tensor, fx.GraphModule]:
    with patch.context() as off:
        off.setattr(pipeline, "INFER", (pipeline.lower_sparse, pipeline.carry_features))
        return run(wired, x)


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=semi_linear)


def pads(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=F.pad))


@pytest.mark.parametrize("wired", WIRED)
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 77, 16), (3, 3, 3, 16)])
def test_every_value_is_what_it_was(
    wired: Forward, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(shape) > 3 and wired is attention:
        pytest.skip("needs one dimension of tokens")
    x = x_of(*shape)
    expected, plain = unpadded(wired, x, monkeypatch)
    out, padded = run(wired, x)
    assert_same(out, expected)
    assert out.stride() == expected.stride()
    assert pads(plain) == 0 < pads(padded)
    for call in calls(padded):
        rows = call.args[0].meta["example_value"]
        assert rows.dim() == 2
        assert rows.shape[0] % 16 == 0
        assert call.meta["example_value"].shape[0] == rows.shape[0]


@pytest.mark.parametrize(
    ("wired", "count"),
    [
        (mlp, 1),
        (long_mlp, 1),
        (attention, 1),
        (residual, 2),
        (rms, 1),
        (skip, 1),
        (meeting, 2),
        (turned, 2),
    ],
)
def test_how_often_it_is_padded(wired: Forward, count: int) -> None:
    _, gm = run(wired, x_of(2, 5, 16))
    assert pads(gm) == count


def test_the_laws_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = unpadded(mlp, x_of(2, 5, 16), monkeypatch)
    before = plain.code
    assert pad_tokens(plain, ()) == 2
    plain.recompile()
    assert (after := plain.code) != before
    assert pad_tokens(plain, ()) == 0
    plain.recompile()
    assert plain.code == after
    _, whole = unpadded(mlp, x_of(2, 8, 16), monkeypatch)
    before = whole.code
    assert pad_tokens(whole, ()) == 0
    whole.recompile()
    assert whole.code == before


def test_the_graph_of_an_mlp() -> None:
    _, gm = run(mlp, x_of(2, 5, 16))
    lines = [f"{node.op}[{node}]" for node in gm.graph.nodes if node.op.startswith("call")]
    assert lines == [
        "call_method[reshape]",
        "call_function[pad]",
        "call_function[semi_linear_2]",
        "call_function[semi_linear_3]",
        "call_function[getitem]",
        "call_method[reshape_1]",
    ]


def test_what_is_changed_in_place_is_left_alone() -> None:
    def added(net: Net, x: Tensor) -> Tensor:
        hidden = net.a(x)
        hidden += 1
        return net.b(hidden)

    def method(net: Net, x: Tensor) -> Tensor:
        return net.b(net.a(x).mul_(2))

    def flag(net: Net, x: Tensor) -> Tensor:
        return net.b(F.relu(net.a(x), inplace=True))

    for wired in (added, method, flag):
        out, gm = run(wired, x_of(2, 5, 16))
        assert pads(gm) == 0
        assert out.shape == (2, 5, 16)


def test_dropout_that_drops_is_not_carried_over() -> None:
    net = Net(lambda net, x: net.b(net.drop(net.a(x))))
    assert pads(run(mlp, x_of(2, 5, 16), net=net.train())[1]) == 2
    assert pads(run(mlp, x_of(2, 5, 16), net=net.eval())[1]) == 1


def test_symbolic_numbers_of_tokens_are_left_to_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm

    fast = sdm.compile(
        Net(mlp).bfloat16(),
        "2:4",
        mode="infer",
        policy="all",
        backend=backend,
        kernels={"*": "sparse"},
    )
    with torch.no_grad():
        for batch in (2, 3, 5):
            fast(x_of(batch, 5, 16))
    assert [pads(gm) for gm in graphs] == [1, 0]
