"""Weights that an op outside the table reads: dense, and said to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.graph.op_table import OP_TABLE
from sparsedm_compiler.graph.unknown_ops import _PRODUCTS
from tests.oracle import OPTIONS


@torch.library.custom_op("sdm_tests::multiply", mutates_args=())
def multiply(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@multiply.register_fake
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Net(nn.Module):
    """Two linear layers around a product of another kind."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.position = nn.Parameter(torch.randn(1, 16))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(self.a(x) + self.position, self.b.weight)
        return self.c(x)  # type: ignore[no-any-return]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sdm_tests.multiply.default": lambda x, w: multiply(x, w),
    "aten.linear": lambda x, w: torch.ops.aten.linear(x, w),
    "aten.mm": lambda x, w: torch.ops.aten.mm(x, w.t()),
    "linalg_multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w.t()]),
}


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_weight_that_an_unknown_op_reads_is_explained(name: str, mode: str) -> None:
    student = sdm.compile(
        Net(PRODUCTS[name]), "2:4", policy="all", backend="eager", **OPTIONS[mode]
    )
    student(torch.randn(4, 16))
    explained = sdm.explain(student)
    rows = {row.weight: row for row in explained.rows}
    assert set(rows) == {"a.weight", "b.weight", "c.weight"}  # and no learned position
    assert rows["b.weight"].refusal == f"it is read by {name}, an op that is not known here"
    assert rows["b.weight"].op == name
    assert set(explained.masked) == {"a.weight", "c.weight"}


def test_weight_that_an_unknown_op_reads_besides_is_said_to_have_another_reader() -> None:
    net = Net(lambda x, w: multiply(x, w) + x @ w.t())
    student = sdm.compile(net, "2:4", policy="all", backend="eager")
    student(torch.randn(4, 16))
    (row,) = (row for row in sdm.explain(student).rows if row.weight == "b.weight")
    assert "it is also read by" in str(row.refusal)


def test_named_products_are_not_in_the_table() -> None:
    named = {getattr(target, "__name__", "") for target in OP_TABLE}
    assert named.isdisjoint(_PRODUCTS)
    assert all(hasattr(torch, name) or hasattr(torch._C._linalg, name) for name in _PRODUCTS)


def test_recurrent_layer_is_explained() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.c = nn.Linear(16, 16), nn.GRU(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.rnn(self.a(x))[0])  # type: ignore[no-any-return]

    student = sdm.compile(Recurrent(), "2:4", policy="all", backend="eager")
    student(torch.randn(2, 3, 16))
    dense = {row.weight for row in sdm.explain(student).rows if row.refusal}
    assert dense == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
