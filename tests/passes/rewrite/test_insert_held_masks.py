"""Golden graphs of insert_held_masks: held masks and soft thresholds, and what verify refuses."""

from __future__ import annotations

import pytest
from expecttest import assert_expected_inline

from sparsedm_compiler.errors import GraphError
from sparsedm_compiler.passes import run_passes
from sparsedm_compiler.passes.rewrite.insert_held_masks import insert_held_masks
from sparsedm_compiler.passes.verify import verify_masked
from tests.passes.plans import print_calls
from tests.passes.test_laws import held_case


def test_insert_held_masks_on_tied_and_checkpointed_layers_gives_the_golden_graph() -> None:
    case = held_case(soft=False)
    assert insert_held_masks(case.gm, case.plan) == 2
    assert_expected_inline(
        print_calls(case.gm),
        """\
hold_mask_default = torch.ops.sparsedm.hold_mask.default(l_self_modules_a_parameters_weight_, l_self_modules_a_parameters_weight__held)
linear = torch._C._nn.linear(l_x_, hold_mask_default, l_self_modules_a_parameters_bias_)
wrap_body_0 = wrap_body_0()
hold_mask_default_1 = torch.ops.sparsedm.hold_mask.default(l_self_modules_b_parameters_weight_, l_self_modules_b_parameters_weight__held)
tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, linear, hold_mask_default_1)
x = operator.getitem(tag_activation_checkpoint, 0)
linear_1 = torch._C._nn.linear(x, hold_mask_default, None)""",  # noqa: E501
    )


def test_insert_held_masks_of_scales_inserts_soft_thresholds() -> None:
    case = held_case(soft=True)
    assert run_passes(case.gm, case.plan, "train") == 2
    assert insert_held_masks(case.gm, case.plan) == 0
    assert_expected_inline(
        print_calls(case.gm),
        """\
soft_threshold_default = torch.ops.sparsedm.soft_threshold.default(l_self_modules_a_parameters_weight_, l_self_modules_a_parameters_weight__held, '2:4')
linear = torch._C._nn.linear(l_x_, soft_threshold_default, l_self_modules_a_parameters_bias_)
wrap_body_0 = wrap_body_0()
soft_threshold_default_1 = torch.ops.sparsedm.soft_threshold.default(l_self_modules_b_parameters_weight_, l_self_modules_b_parameters_weight__held, '2:4')
tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, linear, soft_threshold_default_1)
x = operator.getitem(tag_activation_checkpoint, 0)
linear_1 = torch._C._nn.linear(x, soft_threshold_default, None)""",  # noqa: E501
    )


@pytest.mark.parametrize("soft", [False, True])
def test_verify_of_a_weight_that_is_read_past_its_held_mask_raises(soft: bool) -> None:
    case = held_case(soft=soft)
    insert_held_masks(case.gm, case.plan)
    verify_masked(case.plan)
    weight = case.plan[0].placeholder
    (masked,) = weight.users
    next(iter(masked.users)).replace_input_with(masked, weight)
    with pytest.raises(GraphError, match="whose mask is held, is read unmasked by"):
        verify_masked(case.plan)
