"""The laws of every rewrite of ``passes.TRAIN`` and ``passes.INFER``, on one fixture each."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import sparsedm_compiler
from sparsedm_compiler.backends.kernel_family import KernelConfig
from sparsedm_compiler.errors import GraphError
from sparsedm_compiler.passes import INFER, TRAIN, run_passes
from sparsedm_compiler.passes.pipeline import Rewrite
from sparsedm_compiler.passes.verify import verify_folded, verify_masked
from tests.passes.plans import (
    Case,
    Mlp,
    Three,
    capture_model,
    first_kernel,
    plan_kernel,
    plan_masks,
)


def masked_case() -> Case:
    x = torch.randn(2, 8)
    graph = capture_model(Three(), x)
    return Case(graph, plan_masks(graph, "a.weight", "b.weight"), (x,))


def frozen_case() -> Case:
    case = masked_case()
    mask = torch.arange(64).view(8, 8) % 3 > 0
    return replace(case, plan=tuple(replace(row, frozen=mask) for row in case.plan))


def held_case(*, soft: bool = False) -> Case:
    """The same layers with held masks, or with the scales of soft thresholds."""
    case = frozen_case()
    scale = torch.ones(1)
    rows = [
        replace(row, frozen=None, held=scale if soft else row.frozen, soft=soft)
        for row in case.plan
    ]
    return replace(case, plan=tuple(rows))


def trained_case() -> Case:
    x = torch.randn(5, 16)
    graph = capture_model(Mlp(), x)
    plan = plan_masks(graph, "fc1.weight", "fc2.weight")
    return Case(graph, plan_kernel(plan, KernelConfig("cuda_semi")), (x,))


def cpu_case() -> Case:
    x = torch.randn(5, 16)
    graph = capture_model(Mlp(), x)
    plan = plan_masks(graph, "fc1.weight", "fc2.weight")
    return Case(graph, plan_kernel(plan, first_kernel("cpu_free", "2:4")), (x,))


def norm_case() -> Case:
    x = torch.randn(2, 8, 5, 5)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3))
    graph = capture_model(model.requires_grad_(requires_grad=False), x)
    plan = plan_masks(graph, "3.weight")
    return Case(graph, plan_kernel(plan, first_kernel("cpu_free", "2:4")), (x,))


def vnm_case() -> Case:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.silu(self.a(x)))

    x = torch.randn(9, 64, dtype=torch.bfloat16)
    graph = capture_model(Wide().bfloat16(), x)
    plan = plan_masks(graph, "a.weight", "b.weight", pattern="64:2:8")
    kernel = first_kernel("cuda_vnm", "64:2:8", torch.bfloat16)
    return Case(graph, plan_kernel(plan, kernel), (x,))


def semi_case() -> Case:
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    graph = capture_model(Mlp().bfloat16(), x)
    plan = plan_masks(graph, "fc1.weight", "fc2.weight")
    kernel = first_kernel("cuda_semi", "2:4", torch.bfloat16)
    return Case(graph, plan_kernel(plan, kernel), (x,))


def fp8_case() -> Case:
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    graph = capture_model(Mlp().bfloat16(), x)
    plan = plan_masks(graph, "fc1.weight", "fc2.weight")
    kernel = first_kernel("cuda_fp8", "2:4", torch.bfloat16)
    return Case(graph, plan_kernel(plan, kernel), (x,))


FIRES: dict[str, tuple[str, Callable[[], Case], int]] = {
    "insert_frozen_masks": ("train", frozen_case, 2),
    "insert_held_masks": ("train", held_case, 2),
    "insert_mask_ste": ("train", masked_case, 2),
    "train_sparse": ("train", trained_case, 2),
    "lower_sparse": ("infer", cpu_case, 2),
    "fuse_norms": ("infer", norm_case, 1),
    "round_rows": ("infer", fp8_case, 1),
    "carry_features": ("infer", vnm_case, 1),
    "pad_tokens": ("infer", semi_case, 2),
}
"""By rewrite: its mode, a graph on which it fires, and how often. A new rewrite needs a row."""

PASSES = {"train": TRAIN, "infer": INFER}
ALL = [(mode, rewrite) for mode, rewrites in PASSES.items() for rewrite in rewrites]
each_rewrite = pytest.mark.parametrize(
    ("mode", "rewrite"), ALL, ids=lambda value: value if isinstance(value, str) else name_of(value)
)


def name_of(rewrite: Rewrite) -> str:
    return rewrite.__name__  # type: ignore[attr-defined, no-any-return]


def run_before(case: Case, rewrite: Rewrite, mode: str) -> None:
    """Runs the rewrites that come before this one, as the pipeline does."""
    for earlier in PASSES[mode]:
        if earlier is rewrite:
            return
        earlier(case.gm, case.plan)


def test_every_rewrite_has_a_graph_on_which_it_fires() -> None:
    assert [name_of(rewrite) for _, rewrite in ALL] == list(FIRES)
    assert all(FIRES[name_of(rewrite)][0] == mode for mode, rewrite in ALL)


@each_rewrite
def test_rewrite_fires_once_and_changes_nothing_in_a_second_run(
    mode: str, rewrite: Rewrite
) -> None:
    _, build, count = FIRES[name_of(rewrite)]
    case = build()
    run_before(case, rewrite, mode)
    case.gm.recompile()
    before = case.gm.code
    assert rewrite(case.gm, case.plan) == count
    case.gm.graph.lint()
    case.gm.recompile()
    after = case.gm.code
    assert after != before
    assert rewrite(case.gm, case.plan) == 0
    case.gm.recompile()
    assert case.gm.code == after


@each_rewrite
def test_rewrite_skips_a_graph_without_a_plan_and_leaves_its_code(
    mode: str, rewrite: Rewrite
) -> None:
    _, build, _ = FIRES[name_of(rewrite)]
    case = build()
    before = case.gm.code
    assert rewrite(case.gm, ()) == 0
    case.gm.recompile()
    assert case.gm.code == before


@pytest.mark.parametrize("name", FIRES)
def test_run_passes_verifies_and_changes_nothing_in_a_second_run(name: str) -> None:
    mode, build, count = FIRES[name]
    case = build()
    assert run_passes(case.gm, case.plan, mode) >= count
    code = case.gm.code
    assert run_passes(case.gm, case.plan, mode) == 0
    assert case.gm.code == code


@pytest.mark.parametrize("mode", PASSES)
def test_run_passes_without_a_plan_changes_nothing(mode: str) -> None:
    case = masked_case()
    code = case.gm.code
    assert run_passes(case.gm, (), mode) == 0
    assert case.gm.code == code


@each_rewrite
def test_new_nodes_of_a_rewrite_carry_an_example_value(mode: str, rewrite: Rewrite) -> None:
    _, build, _ = FIRES[name_of(rewrite)]
    case = build()
    known = {*case.gm.graph.nodes}
    run_passes(case.gm, case.plan, mode)
    new = [node for node in case.gm.graph.nodes if node not in known]
    assert [node for node in new if "example_value" not in node.meta] == []


def test_verify_masked_refuses_a_bare_weight_and_another_mask() -> None:
    case = masked_case()
    with pytest.raises(GraphError, match="is read unmasked by"):
        verify_masked(case.plan)
    run_passes(case.gm, case.plan, "train")
    verify_masked(case.plan)
    others = plan_masks(case.captured, "a.weight", pattern="1:4")
    with pytest.raises(GraphError, match="does not mask"):
        verify_masked(others)


def test_verify_masked_refuses_a_bare_weight_whose_mask_is_frozen() -> None:
    case = frozen_case()
    with pytest.raises(GraphError, match="whose mask is frozen, is read unmasked by"):
        verify_masked(case.plan)
    run_passes(case.gm, case.plan, "train")
    verify_masked(case.plan)
    weight = case.plan[0].placeholder
    (masked,) = weight.users
    masked.args = (weight, *masked.args[1:])
    with pytest.raises(GraphError, match="is read unmasked by"):
        verify_masked(case.plan)


def test_verify_folded_refuses_a_packed_weight_that_another_node_reads() -> None:
    case = cpu_case()
    with pytest.raises(GraphError, match="which is no cpu_free"):
        verify_folded(case.plan)
    run_passes(case.gm, case.plan, "infer")
    verify_folded(case.plan)
    weight = case.plan[0].placeholder
    with case.gm.graph.inserting_after(weight):
        reader = case.gm.graph.call_function(torch.relu, (weight,))
    with pytest.raises(GraphError, match=f"is read by {reader.name}"):
        verify_folded(case.plan)


def test_verify_folded_refuses_a_packed_weight_that_nothing_reads() -> None:
    case = cpu_case()
    run_passes(case.gm, case.plan, "infer")
    weight = case.plan[0].placeholder
    (reader,) = weight.users
    reader.replace_all_uses_with(reader.args[0])
    case.gm.graph.erase_node(reader)
    with pytest.raises(GraphError, match="reads the packed weight"):
        verify_folded(case.plan)


def test_rewrites_are_imported_by_the_pipeline_alone() -> None:
    """A pass cannot be called around clean-up and verification."""
    package = Path(sparsedm_compiler.__file__).parent
    importers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and "rewrite" in (node.module or "").split(".")
    }
    assert importers == {"passes/pipeline.py"}


def test_run_passes_refuses_a_graph_that_a_rewrite_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(gm: fx.GraphModule, plan: object) -> int:
        return 0

    case = masked_case()
    monkeypatch.setattr("sparsedm_compiler.passes.pipeline.TRAIN", (forgets,))
    with pytest.raises(GraphError, match="is read unmasked by"):
        run_passes(case.gm, case.plan, "train")
