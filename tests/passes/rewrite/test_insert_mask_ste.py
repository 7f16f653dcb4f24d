"""Golden graph of insert_mask_ste, and what it leaves alone."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from sparsedm_compiler.graph.flat_graph import flatten
from sparsedm_compiler.passes import run_passes
from sparsedm_compiler.passes.rewrite.insert_mask_ste import insert_mask_ste
from tests.passes.plans import Three, capture_model, plan_masks, print_calls

X = torch.randn(2, 8)


def test_insert_mask_ste_on_tied_and_checkpointed_layers_gives_the_golden_graph() -> None:
    graph = capture_model(Three(), X)
    assert insert_mask_ste(graph.gm, plan_masks(graph, "a.weight", "b.weight")) == 2
    assert_expected_inline(
        print_calls(graph.gm),
        """\
mask_ste_default = torch.ops.sparsedm.mask_ste.default(l_self_modules_a_parameters_weight_, '2:4')
linear = torch._C._nn.linear(l_x_, mask_ste_default, l_self_modules_a_parameters_bias_)
wrap_body_0 = wrap_body_0()
mask_ste_default_1 = torch.ops.sparsedm.mask_ste.default(l_self_modules_b_parameters_weight_, '2:4')
tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, linear, mask_ste_default_1)
x = operator.getitem(tag_activation_checkpoint, 0)
linear_1 = torch._C._nn.linear(x, mask_ste_default, None)""",  # noqa: E501
    )


def test_insert_mask_ste_new_nodes_carry_their_example_value() -> None:
    graph = capture_model(Three(), X)
    run_passes(graph.gm, plan_masks(graph, "a.weight"), "train")
    masks = [op for op in flatten(graph.gm) if "mask_ste" in op.name]
    assert [tuple(op.value.shape) for op in masks] == [(8, 8)]
    assert masks[0].value.requires_grad


def test_run_passes_clean_up_keeps_the_in_place_ops_of_the_model() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.a(x)

    graph = capture_model(Counts(), X)
    run_passes(graph.gm, plan_masks(graph, "a.weight"), "train")
    assert "add_" in graph.gm.code
