"""MACs of every op of the table, against counts worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm


class Call(nn.Module):
    """Calls a function of (input, weight), with the weight as its only parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def counted(function: Any, weight: tuple[int, ...], x: tuple[int, ...]) -> sdm.MacsReport:
    return sdm.count_macs(Call(function, *weight), torch.randn(x), policy="all")


OFFSETS = torch.arange(1, 5, dtype=torch.int32) * 8


@pytest.mark.parametrize(
    ("function", "weight", "x", "dense", "sparse"),
    [
        (F.linear, (8, 16), (3, 5, 16), 3 * 5 * 8 * 16, 3 * 5 * 8 * 8),
        (F.linear, (8, 16), (0, 16), 0, 0),
        (F.conv1d, (8, 4, 3), (2, 4, 10), 2 * 8 * 8 * 4 * 3, 2 * 8 * 8 * 2 * 3),
        (F.conv2d, (8, 4, 3, 3), (2, 4, 6, 5), 2 * 8 * 4 * 3 * 36, 2 * 8 * 4 * 3 * 18),
        (F.conv3d, (8, 4, 1, 2, 2), (1, 4, 2, 3, 3), 8 * 2 * 2 * 2 * 16, 8 * 2 * 2 * 2 * 8),
        (
            lambda x, w: F.conv2d(x, w, stride=2, padding=1, dilation=1),
            (8, 4, 3, 3),
            (1, 4, 6, 6),
            3 * 3 * 8 * 36,
            3 * 3 * 8 * 18,
        ),
        (lambda x, w: F.conv2d(x, w, padding="same"), (8, 4, 3, 3), (1, 4, 6, 6), 10368, 5184),
        (lambda x, w: F.conv2d(x, w, groups=4), (8, 1, 3, 3), (1, 4, 5, 5), 9 * 72, 9 * 72),
        (F.conv_transpose1d, (4, 8, 3), (1, 4, 6), 6 * 4 * 8 * 3, 6 * 4 * 8 * 3),
        (
            lambda x, w: F.conv_transpose2d(x, w, stride=2),
            (4, 8, 2, 2),
            (1, 4, 3, 3),
            9 * 128,
            9 * 128,
        ),
        (lambda x, w: x @ w.t(), (8, 16), (3, 16), 3 * 8 * 16, 3 * 8 * 8),
        (lambda x, w: torch.matmul(x, w.T), (8, 16), (2, 3, 16), 6 * 8 * 16, 6 * 8 * 8),
        (lambda x, w: x @ w, (16, 8), (3, 16), 3 * 16 * 8, 3 * 16 * 8),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), (8, 16), (3, 16), 384, 384),
        (lambda x, w: torch.einsum("bi,oi->bo", [x, w]), (8, 16), (3, 16), 384, 384),
        (lambda x, w: torch.einsum("bi,oi,bi->bo", x, w, x), (8, 16), (3, 16), 384, 384),
        (lambda x, w: torch.tensordot(x, w, 1), (16, 8), (3, 16), 384, 384),
        (lambda x, w: torch.tensordot(x, w, ([1], [1])), (8, 16), (3, 16), 384, 384),
        (lambda x, w: torch.inner(x, w), (8, 16), (3, 16), 384, 384),
        (lambda x, w: x.inner(w), (8, 16), (3, 16), 384, 384),
        (
            lambda x, w: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=OFFSETS),
            (4, 16, 8),
            (32, 16),
            32 * 16 * 8,
            32 * 16 * 8,
        ),
        (lambda x, w: F.linear(x, w.to(x.dtype)), (8, 16), (3, 16), 384, 192),
        (lambda x, w: F.linear(x, w[:4]), (8, 16), (3, 16), 192, 96),
        (lambda x, w: F.linear(x, w.squeeze(-1)), (8, 16, 1), (3, 16), 384, 192),
        (lambda x, w: F.linear(x, w[:, :8]), (8, 16), (3, 8), 3 * 8 * 8, 3 * 8 * 8),
        (lambda x, w: F.linear(x, w * 2), (8, 16), (3, 16), 384, 384),
        (lambda x, w: F.bilinear(x, x, w), (3, 4, 4), (2, 4), 2 * 3 * 16, 2 * 3 * 16),
    ],
)
def test_count_macs_of_weight_products(
    function: Any, weight: tuple[int, ...], x: tuple[int, ...], dense: int, sparse: int
) -> None:
    report = counted(function, weight, x)
    assert (report.dense, report.sparse, report.attention) == (dense, sparse, 0)


@pytest.mark.parametrize(
    ("function", "attention"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x[..., :3]), 2 * 5 * 5 * (4 + 3)),
        (lambda x: x @ x.transpose(-1, -2), 2 * 5 * 5 * 4),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), 2 * 5 * 5 * 4),
        (lambda x: torch.einsum("bid,bjd->bij", x, x), 2 * 5 * 5 * 4),
        (lambda x: torch.einsum("...id,...jd->...ij", x, x), 2 * 5 * 5 * 4),
        (lambda x: torch.einsum("bid,bjd", x, x), 5 * 5 * 2 * 4),
        (lambda x: torch.einsum("bi,bj->bij", x[..., 0], x[..., 1]), 0),
        (lambda x: torch.einsum("bid,bjd,bkd->bijk", x, x, x), 2 * 5 * 5 * 5 * 4),
        (lambda x: torch.einsum("...d,...d,...d->...", [x, x, x]), 10 * 4),
        (lambda x: torch.einsum("bid,bjd,bj->bi", x, x, x[..., 0]), 2 * 5 * 5 * 4 + 2 * 5 * 5),
        (lambda x: torch.einsum(x, [0, 1, 2], x, [0, 3, 2], [0, 1, 3]), 0),
        (lambda x: torch.baddbmm(x @ x.mT, x, x.mT), 2 * 2 * 5 * 5 * 4),
    ],
)
def test_count_macs_of_products_of_activations(function: Any, attention: int) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    report = sdm.count_macs(Net(), torch.randn(2, 5, 4))
    assert (report.dense, report.attention) == (0, attention)


@pytest.mark.parametrize("training", [True, False])
def test_count_macs_of_multi_head_attention_in_train_and_eval(training: bool) -> None:
    """Train keeps F.multi_head_attention_forward, eval the fused encoder layer."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train(training)
    tokens = 3 * 5
    with torch.no_grad():
        report = sdm.count_macs(layer, torch.randn(3, 5, 16), policy="all")
    assert report.dense == tokens * (4 * 16 * 16 + 2 * 16 * 32)
    assert report.sparse == report.dense // 2
    assert report.attention == 3 * 2 * 5 * 5 * (8 + 8)


def test_count_macs_of_cross_attention_with_other_key_widths() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, kdim=8, vdim=24, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attn(q, k, v)[0]

    report = sdm.count_macs(
        Net(), torch.randn(2, 3, 16), torch.randn(2, 7, 8), torch.randn(2, 7, 24), policy="all"
    )
    queries, keys = 2 * 3, 2 * 7
    assert report.dense == queries * 16 * 16 * 2 + keys * 16 * (8 + 24)
    assert report.attention == queries * 7 * 16 * 2
    assert {row.name for row in report.rows if row.pattern} >= {"attn.q_proj_weight"}


class Pooled(nn.Module):
    """Attention whose last projection has fewer rows than columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, rows) for rows in (8, 8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        weights = {f"{k}_proj_weight": getattr(self, k).weight for k in "qkv"}
        fixed = (x, 8, 2, None, biases, None, None, False, 0.0, self.out.weight, self.out.bias)
        return F.multi_head_attention_forward(
            x[:1], x, *fixed, training=False, use_separate_proj_weight=True, **weights
        )[0]


def test_count_macs_of_attention_with_a_narrow_last_projection() -> None:
    report = sdm.count_macs(Pooled(), torch.randn(5, 1, 8), policy="all")
    assert report.dense == (1 + 5 + 5) * 8 * 8 + 8 * 4


class Picked(nn.Module):
    """Attends between the rows that are chosen by their values, beside as many others."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x[torch.nonzero(x[:, 0] > 0).flatten()]
        both = torch.cat([rows, x])[None]
        return F.scaled_dot_product_attention(both, both, both)


def test_count_macs_of_sizes_that_depend_on_values() -> None:
    x = torch.linspace(-1, 1, 40).reshape(10, 4)
    rows = 10 + int((x[:, 0] > 0).sum())
    assert sdm.count_macs(Picked(), x).attention == 2 * rows * rows * 4
