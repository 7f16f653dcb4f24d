"""Golden graph of insert_frozen_masks, and what it tells an inner compiler of its inputs."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline

from sparsedm_compiler.graph.added_inputs import MASK, copy_graph, is_added
from sparsedm_compiler.passes.rewrite.insert_frozen_masks import insert_frozen_masks
from tests.passes.plans import Three, capture_model, print_calls
from tests.passes.test_laws import frozen_case


def test_insert_frozen_masks_on_tied_and_checkpointed_layers_gives_the_golden_graph() -> None:
    case = frozen_case()
    assert insert_frozen_masks(case.gm, case.plan) == 2
    assert_expected_inline(
        print_calls(case.gm),
        """\
where = torch.where(l_self_modules_a_parameters_weight__mask, l_self_modules_a_parameters_weight_, 0.0)
linear = torch._C._nn.linear(l_x_, where, l_self_modules_a_parameters_bias_)
wrap_body_0 = wrap_body_0()
where_1 = torch.where(l_self_modules_b_parameters_weight__mask, l_self_modules_b_parameters_weight_, 0.0)
tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, linear, where_1)
x = operator.getitem(tag_activation_checkpoint, 0)
linear_1 = torch._C._nn.linear(x, where, None)""",  # noqa: E501
    )


def test_insert_frozen_masks_adds_its_inputs_behind_all_others_in_the_order_of_the_plan() -> None:
    case = frozen_case()
    before = case.gm.graph.find_nodes(op="placeholder")
    insert_frozen_masks(case.gm, case.plan)
    nodes = case.gm.graph.find_nodes(op="placeholder")
    assert nodes[: len(before)] == before
    added = nodes[len(before) :]
    assert [is_added(node, MASK) for node in nodes] == [False] * len(before) + [True] * 2
    assert [node.name for node in added] == [f"{row.placeholder.name}_mask" for row in case.plan]
    assert len({node._dynamo_source for node in added}) == 2
    assert all(node.meta["tensor_dict"]["_dynamo_static_input_type"] for node in added)


def test_copy_graph_keeps_what_dynamo_says_and_leaves_its_own_graph() -> None:
    gm = capture_model(Three(), torch.randn(2, 8)).gm
    nodes, code = [*gm.graph.nodes], gm.code
    copy = copy_graph(gm)
    copy.graph.erase_node(copy.graph.find_nodes(op="output")[0])
    assert [*gm.graph.nodes] == nodes
    assert (copy.meta, copy.code) == (gm.meta, code)
    pairs = zip(*(g.graph.find_nodes(op="placeholder") for g in (gm, copy)), strict=True)
    assert all(old._dynamo_source is new._dynamo_source for old, new in pairs)
    assert {*gm.__dict__} <= {*copy.__dict__}
