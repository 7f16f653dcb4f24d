"""lower_sparse: which nodes a kernel takes over, with which arguments, and what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsedm_compiler.backends.packing import fold_weight
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from sparsedm_compiler.passes import PlannedWeight
from sparsedm_compiler.passes.rewrite.lower_sparse import lower_sparse
from tests.oracle import assert_same
from tests.passes.plans import Autocast, Mlp, capture_model, first_kernel, plan_kernel, plan_masks

KERNEL = first_kernel("cpu_free", "2:4")
X = torch.randn(5, 16)


def masked(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.copy_(apply_mask(weight, nm_mask(weight, "2:4")))
    return model


def run(gm: fx.GraphModule, model: nn.Module, plan: tuple[PlannedWeight, ...], x: Tensor) -> Tensor:
    """The output of a graph whose planned weights are passed in the form that was planned."""
    parameters = dict(model.named_parameters())
    by_position = {row.position: row for row in plan}
    arguments = []
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        name = node.name
        value = x if name == "l_x_" else None
        for parameter, tensor in parameters.items():
            modules, _, leaf = parameter.rpartition(".")
            if name == f"l_self_modules_{modules}_parameters_{leaf}_":
                value = tensor.detach()
        assert value is not None, name
        if position in by_position:
            row = by_position[position]
            value = fold_weight(value, row.weight_format, row.name)
        arguments.append(value)
    (out,) = gm(*arguments)
    return out


def test_lower_sparse_takes_over_the_product_and_the_activation_behind_it() -> None:
    model = Mlp()
    graph = capture_model(model, X)
    plan = plan_kernel(plan_masks(graph, "fc1.weight", "fc2.weight"), KERNEL)
    assert lower_sparse(graph.gm, plan) == 2
    graph.gm.recompile()
    calls = [node for node in graph.gm.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls[:2]] == ["sparsedm.nm_linear.default"] * 2
    assert [node.target for node in calls[2:]] == [torch._C._nn.linear]
    with_gelu, plain = calls[:2]
    assert "gelu" in (*with_gelu.args, *with_gelu.kwargs.values())
    assert "none" in (*plain.args, *plain.kwargs.values())
    assert (with_gelu.args[3], plain.args[3]) == (32, 16)
    assert tuple(with_gelu.meta["example_value"].shape) == (5, 32)
    expected = masked(model, "fc1.weight", "fc2.weight")(X)
    assert_same(run(graph.gm, model, plan, X), expected, tolerance=1e-5)


def test_lower_sparse_leaves_rows_without_a_kernel_alone() -> None:
    graph = capture_model(Mlp(), X)
    dense, sparse = plan_masks(graph, "fc1.weight", "fc2.weight")
    assert lower_sparse(graph.gm, (dense, *plan_kernel((sparse,), KERNEL))) == 1
    targets = [node.target for node in graph.gm.graph.nodes if node.op == "call_function"]
    assert {torch._C._nn.linear, F.gelu} <= {*targets}


def test_lower_sparse_keeps_an_activation_that_something_else_reads_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            product = self.fc(x)
            return F.gelu(product) + product

    graph = capture_model(Both(), X)
    assert lower_sparse(graph.gm, plan_kernel(plan_masks(graph, "fc.weight"), KERNEL)) == 1
    targets = [node.target for node in graph.gm.graph.nodes if node.op == "call_function"]
    assert F.gelu in targets


@pytest.mark.parametrize("uses", [1, 3])
def test_lower_sparse_rewrites_every_use_of_a_weight(uses: int) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(uses):
                x = self.fc(x)
            return x

    model = Again()
    graph = capture_model(model, X)
    plan = plan_kernel(plan_masks(graph, "fc.weight"), KERNEL)
    assert lower_sparse(graph.gm, plan) == uses
    graph.gm.recompile()
    assert_same(run(graph.gm, model, plan, X), masked(model, "fc.weight")(X), tolerance=1e-5)


def test_lower_sparse_casts_x_where_autocast_would() -> None:
    graph = capture_model(Autocast(), X)
    kernel = first_kernel("cpu_free", "2:4", torch.bfloat16)
    assert lower_sparse(graph.gm, plan_kernel(plan_masks(graph, "fc.weight"), kernel)) == 1
    casts = graph.gm.graph.find_nodes(op="call_method", target="to")
    assert [node.args[1] for node in casts] == [torch.bfloat16]
    assert casts[0].meta["example_value"].dtype == torch.bfloat16
