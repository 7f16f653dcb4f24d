"""train_sparse: which products of masked weights a kernel takes over in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compiler.backends.kernel_family import KernelConfig
from sparsedm_compiler.backends.wgmma.training import find_blocks_op, multiply_blocks
from sparsedm_compiler.errors import GraphError
from sparsedm_compiler.graph.added_inputs import LAYOUT, is_added
from sparsedm_compiler.masks.mask_ste import mask_ste_op
from sparsedm_compiler.passes import run_passes
from sparsedm_compiler.passes.rewrite.insert_mask_ste import insert_mask_ste
from sparsedm_compiler.passes.rewrite.train_sparse import train_sparse
from sparsedm_compiler.passes.verify import verify_masked
from tests.passes.plans import Autocast, Case, Mlp, capture_model, plan_kernel, plan_masks

KERNEL = KernelConfig("cuda_semi")
X = torch.randn(5, 16)


@pytest.mark.parametrize(("pattern", "transposable"), [("2:4", False), ("2:4t", True)])
def test_train_sparse_multiplies_by_the_masked_weight(pattern: str, transposable: bool) -> None:
    graph = capture_model(Mlp(), X)
    masks = plan_masks(graph, "fc1.weight", "fc2.weight", pattern=pattern)
    plan = (*plan_kernel(masks[:1], KERNEL), masks[1])
    assert insert_mask_ste(graph.gm, plan) == 2
    assert train_sparse(graph.gm, plan) == 1
    (product,) = [n for n in graph.gm.graph.nodes if str(n.target) == "sparsedm.semi_train.default"]
    x, weight, bias, option = (*product.args, *product.kwargs.values())
    assert (x.name, option) == ("l_x_", transposable)
    assert str(weight.target) == "sparsedm.mask_ste.default"
    assert bias.name == "l_self_modules_fc1_parameters_bias_"
    assert tuple(product.meta["example_value"].shape) == (5, 32)
    linears = graph.gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear)
    assert len(linears) == 2


def test_train_sparse_gives_the_output_and_gradients_of_the_masked_graph() -> None:
    def gradients(*, sparse: bool) -> list[Tensor]:
        model = Mlp()
        graph = capture_model(model, X)
        plan = plan_masks(graph, "fc1.weight", "fc2.weight")
        run_passes(graph.gm, plan_kernel(plan, KERNEL) if sparse else plan, "train")
        parameters = dict(model.named_parameters())
        arguments = [
            parameters[graph.names[node][0]] if node in graph.names else X
            for node in graph.gm.graph.find_nodes(op="placeholder")
        ]
        (out,) = graph.gm(*arguments)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, values = gradients(sparse=False), gradients(sparse=True)
    assert len(values) == len(expected) == 7
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_train_sparse_casts_its_operands_where_autocast_would() -> None:
    graph = capture_model(Autocast(), X)
    plan = plan_kernel(plan_masks(graph, "fc.weight"), KERNEL)
    assert run_passes(graph.gm, plan, "train") == 2
    casts = graph.gm.graph.find_nodes(op="call_method", target="to")
    assert [node.args[1] for node in casts] == [torch.bfloat16] * 3


class Blocks(nn.Module):
    """A layer of blocks that is used twice, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 128).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


def block_case(*, frozen: bool) -> Case:
    x = torch.randn(3, 128).bfloat16()
    graph = capture_model(Blocks(), x)
    masks = plan_masks(graph, "fc.weight", pattern="1:2@64x64")
    plan = plan_kernel(masks, KernelConfig("cuda_block"))
    layout = torch.zeros(2, 1, 1, dtype=torch.int32)
    plan = tuple(replace(row, layout=layout) if frozen else row for row in plan)
    return Case(graph, plan, (x,))


def test_train_sparse_finds_the_blocks_of_a_masked_weight_once() -> None:
    case = block_case(frozen=False)
    assert run_passes(case.gm, case.plan, "train") == 3
    nodes = [node for node in case.gm.graph.nodes if node.op == "call_function"]
    mask, find, first, second = nodes
    assert (mask.target, find.target) == (mask_ste_op, find_blocks_op)
    assert find.args == (mask, "1:2@64x64")
    for product in (first, second):
        assert product.target is multiply_blocks
        assert product.args[1] is mask
        assert product.args[3:] == (find, "1:2@64x64", False)
    assert run_passes(case.gm, case.plan, "train") == 0


def test_train_sparse_with_a_frozen_mask_reads_the_weight_itself_by_an_added_layout() -> None:
    case = block_case(frozen=True)
    with pytest.raises(GraphError, match="whose mask is frozen, is read by linear"):
        verify_masked(case.plan)
    assert run_passes(case.gm, case.plan, "train") == 2
    layout = case.gm.graph.find_nodes(op="placeholder")[-1]
    assert is_added(layout, LAYOUT)
    products = [node for node in case.gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in products] == [multiply_blocks] * 2
    for product in products:
        assert product.args[1] is case.plan[0].placeholder
        assert product.args[3:] == (layout, "1:2@64x64", True)
    assert run_passes(case.gm, case.plan, "train") == 0
    products[1].args = (*products[1].args[:3], products[1].args[1], *products[1].args[4:])
    with pytest.raises(GraphError, match=r"does not get what .*fc.* keeps"):
        verify_masked(case.plan)
