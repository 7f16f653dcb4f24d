"""Golden graphs, and the laws of a rewrite."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from sparsedm_compiler import Pattern
from sparsedm_compiler.errors import GraphError
from sparsedm_compiler.graph.capture import CapturedGraph, capture
from sparsedm_compiler.graph.flat_graph import flatten
from sparsedm_compiler.passes import REWRITES, insert_mask_ste
from sparsedm_compiler.passes.pipeline import run_rewrites
from sparsedm_compiler.passes.verify import verify


class Three(nn.Module):
    """A tied, a checkpointed and an untouched layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.b, self.a(x), use_reentrant=False)
        return self.tied(x)


def captured() -> CapturedGraph:
    graph = capture(Three(), torch.randn(2, 8))
    assert graph is not None
    return graph


def weights(graph: CapturedGraph, *names: str) -> dict[fx.Node, Pattern]:
    found = {n: Pattern.parse("2:4") for n, known in graph.names.items() if known[0] in names}
    assert len(found) == len(names)
    return found


def text(gm: fx.GraphModule) -> str:
    return "\n".join(
        f"{node.name} = {node._pretty_print_target(node.target)}{node.args}"
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "output")
    )


def test_golden() -> None:
    graph = captured()
    assert insert_mask_ste(graph.gm, weights(graph, "a.weight", "b.weight")) == 2
    assert_expected_inline(
        text(graph.gm),
        """\
mask_ste_default = torch.ops.sparsedm.mask_ste.default(l_self_modules_a_parameters_weight_, '2:4')
linear = torch._C._nn.linear(l_x_, mask_ste_default, l_self_modules_a_parameters_bias_)
wrap_body_0 = wrap_body_0()
mask_ste_default_1 = torch.ops.sparsedm.mask_ste.default(l_self_modules_b_parameters_weight_, '2:4')
tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, linear, mask_ste_default_1)
x = operator.getitem(tag_activation_checkpoint, 0)
linear_1 = torch._C._nn.linear(x, mask_ste_default, None)""",  # noqa: E501
    )


def test_a_second_run_changes_nothing() -> None:
    graph = captured()
    patterns = weights(graph, "a.weight", "b.weight")
    assert run_rewrites(graph.gm, patterns) == 2
    code = graph.gm.code
    assert run_rewrites(graph.gm, patterns) == 0
    assert graph.gm.code == code


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.__name__)
def test_no_decision_no_change(rewrite: object) -> None:
    graph = captured()
    code = graph.gm.code
    assert rewrite(graph.gm, {}) == 0  # type: ignore[operator]
    graph.gm.recompile()
    assert graph.gm.code == code


def test_new_nodes_carry_their_value() -> None:
    graph = captured()
    run_rewrites(graph.gm, weights(graph, "a.weight"))
    masks = [op for op in flatten(graph.gm) if "mask_ste" in op.name]
    assert [tuple(op.value.shape) for op in masks] == [(8, 8)]
    assert masks[0].value.requires_grad


def test_in_place_ops_survive_the_clean_up() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.a(x)

    graph = capture(Counts(), torch.randn(2, 8))
    assert graph is not None
    run_rewrites(graph.gm, weights(graph, "a.weight"))
    assert "add_" in graph.gm.code


def test_verify_refuses_a_bare_weight_and_a_wrong_mask() -> None:
    graph = captured()
    patterns = weights(graph, "a.weight")
    with pytest.raises(GraphError, match="is read unmasked by"):
        verify(graph.gm, patterns)
    run_rewrites(graph.gm, patterns)
    verify(graph.gm, patterns)
    with pytest.raises(GraphError, match="does not mask"):
        verify(graph.gm, dict.fromkeys(patterns, Pattern.parse("1:4")))
