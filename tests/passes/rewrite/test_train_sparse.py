"""train_sparse: which products of masked weights a kernel takes over in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsedm_compiler.backends.kernel_family import KernelConfig
from sparsedm_compiler.passes import run_passes
from sparsedm_compiler.passes.rewrite.insert_mask_ste import insert_mask_ste
from sparsedm_compiler.passes.rewrite.train_sparse import train_sparse
from tests.passes.plans import Autocast, Mlp, capture_model, plan_kernel, plan_masks

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
