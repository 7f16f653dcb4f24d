"""``regional=True``: repeated blocks are compiled once, and every one of them runs masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune import measure
from sparsedm_compiler.compiler import compile_blocks, split_graph
from sparsedm_compiler.compiler.inner_backend import compile_graph
from sparsedm_compiler.compiler.split_graph import compile_split
from sparsedm_compiler.graph.capture import capture
from sparsedm_compiler.passes import find_repeated_blocks
from tests.oracle import assert_same, oracle_of
from tests.passes.repeated import Stack, stack_inputs

ONCE = "compiled once: 4 times Block"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Every graph that is compiled; by AOTAutograd alone, as if it were Inductor."""
    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        seen.append(gm)
        return compile_graph(gm, *args, **kwargs)

    for module in (compile_blocks, split_graph):
        monkeypatch.setattr(module, "compile_graph", keep)
    monkeypatch.setattr(compile_blocks, "is_inductor", lambda backend: True)
    return seen


def compile_stack(mode: str, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"backend": "aot_eager", "regional": True, **options}
    return sdm.compile(Stack(4), "2:4", mode=mode, **settings)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_regional_inference_matches_the_oracle_and_compiles_one_graph(
    kernels: str, graphs: list[fx.GraphModule]
) -> None:
    fast = compile_stack("infer", kernels={"*": kernels})
    with torch.no_grad():
        assert_same(fast(*stack_inputs()), oracle_of(fast)(*stack_inputs()), tolerance=2e-5)
    assert len(graphs) == 1
    assert [name for name, _ in graphs[0].named_children()] == ["repeated_block_0"]
    assert sdm.explain(fast).regions == (ONCE,)
    assert ONCE in str(sdm.explain(fast))
    assert {choice.kernel for choice in sdm.explain(fast).choices} == {
        "dense" if kernels == "dense" else "cpu_free"
    }


def test_regional_inference_follows_an_edited_weight_of_any_block(
    graphs: list[fx.GraphModule],
) -> None:
    fast = compile_stack("infer", kernels={"*": "sparse"})
    with torch.no_grad():
        for index in (0, 3):
            fast(*stack_inputs())
            fast.blocks[index].fc1.weight.mul_(-2)
            assert_same(fast(*stack_inputs()), oracle_of(fast)(*stack_inputs()), tolerance=2e-5)
    assert len(graphs) == 1


def test_regional_inference_can_be_finalized_saved_and_loaded(
    tmp_path: Path, graphs: list[fx.GraphModule]
) -> None:
    fast = compile_stack("infer", kernels={"*": "sparse"}, finalize=True)
    with torch.no_grad():
        expected = fast(*stack_inputs())
        assert_same(fast(*stack_inputs()), expected)
        sdm.save(fast, tmp_path / "fast.safetensors")
        again = sdm.load(tmp_path / "fast.safetensors", Stack(4), backend="aot_eager")
        assert_same(again(*stack_inputs()), expected)
    assert sdm.explain(fast).regions == (ONCE,)


@pytest.mark.usefixtures("graphs")
def test_equal_layers_of_all_blocks_are_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    measure_one = measure._measure

    def note(trial: measure.KernelTrial, *args: Any) -> dict[str, float]:
        timed.append(trial.name)
        return measure_one(trial, *args)

    monkeypatch.setattr(measure, "cache_folder", lambda name: tmp_path)
    monkeypatch.setattr(measure, "_measure", note)
    for batch in (2, 2, 3):  # the second model times nothing, another batch all shapes again
        fast = compile_stack("infer")
        with torch.no_grad():
            fast(*stack_inputs(batch))
    layers = ("blocks.0.q", "blocks.0.fc1", "blocks.0.fc2")
    assert timed == [f"{name}.weight" for name in layers] * 2


@pytest.mark.usefixtures("graphs")
def test_regional_model_called_outside_of_its_forward_raises() -> None:
    fast = compile_stack("infer", kernels={"*": "sparse"})
    with torch.no_grad():
        fast(*stack_inputs())
        with pytest.raises(sdm.DenseRunError):
            fast.blocks[1](torch.randn(2, 16, 16), torch.ones(2, 1, 16))


def test_regional_training_gives_the_gradients_of_the_oracle(
    graphs: list[fx.GraphModule],
) -> None:
    student = compile_stack("train")
    student(*stack_inputs()).square().sum().backward()
    oracle = oracle_of(student)
    oracle(*stack_inputs()).square().sum().backward()
    weights = dict(oracle.named_parameters())
    for name, weight in student.named_parameters():
        expected = weights[name].grad
        assert weight.grad is not None
        if name not in sdm.masked_parameters(student):  # the oracle's is masked, ours is not
            assert_same(weight.grad, expected, tolerance=1e-5)
    assert len(graphs) == 3  # what is before the blocks, a block, what is behind them
    assert sdm.explain(student).regions == (ONCE,)


def test_regional_training_gives_the_straight_through_gradients_of_a_whole_graph(
    graphs: list[fx.GraphModule],
) -> None:
    students = [compile_stack("train", regional=regional) for regional in (True, False)]
    for student in students:
        student(*stack_inputs()).square().sum().backward()
    for ours, whole in zip(*(student.parameters() for student in students), strict=True):
        assert ours.grad is not None
        assert_same(ours.grad, whole.grad, tolerance=1e-5)
    assert len(graphs) == 4


def test_regional_training_with_frozen_masks_keeps_pruned_gradients_zero(
    graphs: list[fx.GraphModule],
) -> None:
    students = [compile_stack("train", regional=regional) for regional in (True, False)]
    for student in students:
        student(*stack_inputs())
        sdm.freeze_masks(student)
        student(*stack_inputs()).square().sum().backward()
    for ours, whole in zip(*(student.parameters() for student in students), strict=True):
        assert ours.grad is not None
        assert_same(ours.grad, whole.grad, tolerance=1e-5)
    frozen = students[0].blocks[2].fc1.weight.grad
    assert int((frozen == 0).sum()) == frozen.numel() // 2
    assert ONCE in sdm.explain(students[0]).regions


def test_pieces_get_their_values_in_rows(graphs: list[fx.GraphModule]) -> None:
    student = compile_stack("train")
    student(*stack_inputs())
    (first,) = graphs[1].graph.find_nodes(op="placeholder")[:1]
    assert first.meta["example_value"].is_contiguous()  # the embedding's output is transposed


class Cast(Stack):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, condition)


def test_graph_that_switches_autocast_between_its_blocks_is_not_split() -> None:
    graph = capture(Cast(), *stack_inputs())
    assert graph is not None
    groups = find_repeated_blocks(graph.gm)
    assert [len(group) for group in groups] == [3]
    assert compile_split(graph.gm, groups, "eager") is None


@pytest.mark.usefixtures("graphs")
def test_regional_inference_under_autocast_of_its_own_matches_the_oracle() -> None:
    fast = sdm.compile(Cast(), "2:4", mode="infer", backend="aot_eager", regional=True)
    with torch.no_grad():
        out, expected = fast(*stack_inputs()), oracle_of(fast)(*stack_inputs())
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), expected.float(), tolerance=2e-2)


def test_regional_with_nothing_to_share_says_why() -> None:
    eager = sdm.compile(Stack(4), "2:4", backend="eager", regional=True)
    eager(*stack_inputs())
    assert sdm.explain(eager).regions == (
        "regional=True changes nothing: it is for Inductor alone",
    )


@pytest.mark.usefixtures("graphs")
def test_regional_of_a_model_without_repeats_says_so() -> None:
    single = sdm.compile(Stack(1), "2:4", backend="aot_eager", regional=True)
    single(*stack_inputs())
    (why,) = sdm.explain(single).regions
    assert why == "regional=True changes nothing: no repeated module can be compiled alone"


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_regional_under_inductor_computes_what_eager_does(mode: str) -> None:
    students = [
        sdm.compile(Stack(2), "2:4", mode=mode, backend=backend, regional=True)
        for backend in ("inductor", "eager")
    ]
    outs = []
    for student in students:
        with torch.set_grad_enabled(mode == "train"):
            outs.append(student(*stack_inputs()))
            if mode == "train":
                outs[-1].square().sum().backward()
    assert_same(outs[0], outs[1], tolerance=1e-5)
    assert sdm.explain(students[0]).regions == ("compiled once: 2 times Block",)
    if mode == "train":
        for ours, expected in zip(*(s.parameters() for s in students), strict=True):
            assert_same(ours.grad, expected.grad, tolerance=2e-5)
