"""Which nodes write in place or draw random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparsedm_compiler.graph.effects import may_draw, may_write_in_place


def node(method: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.create_node(method, target, (graph.placeholder("x"), *args), kwargs)


@pytest.mark.parametrize(
    ("made", "writes"),
    [
        (node("call_method", "add_", 1), True),
        (node("call_method", "add", 1), False),
        (node("call_function", F.relu, True), True),
        (node("call_function", F.relu, inplace=False), False),
        (node("call_function", torch.add, 1, out=None), True),
        (node("call_function", torch.ops.aten.add_.Tensor, 1), True),
        (node("call_function", torch.ops.aten.add.Tensor, 1), False),
        (node("call_method", "__getitem__", 0), False),
    ],
)
def test_may_write_in_place_knows_names_flags_and_schemas(made: fx.Node, writes: bool) -> None:
    assert may_write_in_place(made) is writes


@pytest.mark.parametrize(
    ("made", "draws"),
    [
        (node("call_function", F.dropout, 0.5, True), True),
        (node("call_function", F.dropout, 0.5, False), False),
        (node("call_function", F.dropout, p=0.0), False),
        (node("call_function", torch.rand_like), True),
        (node("call_function", torch.ops.aten.bernoulli.p, 0.5), True),
        (node("call_function", F.scaled_dot_product_attention, 0, 0, None, 0.1), True),
        (node("call_function", F.scaled_dot_product_attention, 0, 0, dropout_p=0.0), False),
        (node("call_method", "normal_"), True),
        (node("call_function", torch.sin), False),
    ],
)
def test_may_draw_knows_dropout_that_drops_nothing(made: fx.Node, draws: bool) -> None:
    assert may_draw(made) is draws
