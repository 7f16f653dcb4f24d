"""Convs compute the norm, activation and embedded time in front of them, where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.norm_conv import nm_norm_conv2d_op
from sparsedm_compiler.passes import pipeline
from sparsedm_compiler.passes.rewrite.fuse_norms import fuse_norms
from tests.oracle import assert_same

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="needs a C++ compiler")
Wired = Callable[[Any, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Three convs and what may lie between them, wired by ``wired``."""

    def __init__(self, wired: Wired) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm, self.other = nn.GroupNorm(4, 8), nn.GroupNorm(2, 8, affine=False)
        self.time, self.drop, self.act = nn.Linear(8, 8), nn.Dropout(0.5), nn.SiLU()
        self.wired = wired
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.wired(self, self.first(x), self.time(t)[:, :, None, None]) + 1)


def block(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.drop(net.act(net.norm(x + t)))) + x


def turned_sum(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.act(net.other(t + x)))


def norm_alone(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.norm(x)) + t


def images_added(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.act(net.norm(x + 2 * x)))


def tokens(net: Net, x: Tensor, t: Tensor) -> Tensor:
    """As attention leaves images: channels_last."""
    turned = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape)
    return net.conv(net.act(net.norm(turned)))


def two_in_a_row(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.act(net.norm(net.conv(net.act(net.other(x))) + t)))


def written_silu(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(F.silu(net.norm(x), inplace=True))


def read_twice(net: Net, x: Tensor, t: Tensor) -> Tensor:
    hidden = net.act(net.norm(x))
    return net.conv(hidden) + hidden


def sum_read_twice(net: Net, x: Tensor, t: Tensor) -> Tensor:
    x = x + t
    return net.conv(net.act(net.norm(x))) + x


def another_norm(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.act(F.instance_norm(x)))


def another_activation(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(F.gelu(net.norm(x)))


def written_between(net: Net, x: Tensor, t: Tensor) -> Tensor:
    hidden = net.norm(x)
    x += 1
    return net.conv(net.act(hidden)) + x


def written_behind_the_sum(net: Net, x: Tensor, t: Tensor) -> Tensor:
    hidden = x + t
    x += 1
    return net.conv(net.act(net.norm(hidden))) + x


def cast_between(net: Net, x: Tensor, t: Tensor) -> Tensor:
    return net.conv(net.act(net.norm(x.double().float()).double()).float())


def run(
    wired: Wired, monkeypatch: pytest.MonkeyPatch, *, training: bool = False, **options: Any
) -> tuple[list[fx.Node], Tensor, Tensor]:
    """Returns the fused nodes of the graph, its output and that of the dense masked model."""
    found: list[fx.Node] = []

    def spy(gm: fx.GraphModule, plan: Any) -> int:
        changes = fuse_norms(gm, plan)
        mine = [node for node in gm.graph.nodes if node.target is nm_norm_conv2d_op]
        assert len(mine) == changes
        found.extend(mine)
        return changes

    passes = tuple(spy if rewrite is fuse_norms else rewrite for rewrite in pipeline.INFER)
    monkeypatch.setattr(pipeline, "INFER", passes)
    net, x, t = Net(wired).train(training), torch.randn(2, 8, 6, 5), torch.randn(2, 8)
    options = {"backend": "eager", "kernels": {"*": "sparse"}, **options}
    student = sdm.compile(net, "2:4", mode="infer", inplace=False, **options)
    with torch.no_grad():
        out = student(x, t)
        masked = sdm.compile(net, "2:4", mode="infer", backend="eager", kernels={"*": "dense"})
        expected = masked(x, t)
    return found, out, expected


@pytest.mark.parametrize(
    ("wired", "norms"),
    [
        *((block, 1), (turned_sum, 1), (norm_alone, 1), (images_added, 1), (tokens, 1)),
        *((two_in_a_row, 2), (written_silu, 1), (sum_read_twice, 1)),
        *((read_twice, 0), (another_norm, 0), (another_activation, 0), (written_between, 0)),
        *((written_behind_the_sum, 0), (cast_between, 0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_norms_are_fused_where_the_model_stays_the_same(
    wired: Wired, norms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out, expected = run(wired, monkeypatch)
    assert_same(out, expected, tolerance=2e-5)
    assert len(found) == norms
    with_time = {block: [True], turned_sum: [True], two_in_a_row: [False, True]}
    assert all(node.args[0].meta["example_value"].is_contiguous() for node in found)
    told = [node.args[4] is not None for node in found]
    assert told == with_time.get(wired, [False] * norms)


def test_norms_under_gradients_are_not_fused() -> None:
    net, x, t = Net(block).eval(), torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(2, 8)
    student = sdm.compile(net, "2:4", mode="infer", backend="eager", kernels={"*": "sparse"})
    with torch.no_grad():
        fused = student(x, t)
    out = student(x, t)
    assert_same(out, fused, tolerance=2e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.abs().min() > 0


def test_dropout_that_drops_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    found, out, _ = run(block, monkeypatch, training=True)
    assert found == []
    assert out.isfinite().all()


def test_norms_are_fused_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    found, out, expected = run(two_in_a_row, monkeypatch, backend="inductor")
    assert len(found) == 2
    assert_same(out, expected, tolerance=2e-5)
