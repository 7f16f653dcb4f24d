"""Ordinary lines of accelerate, peft, torch and EMA around a compiled model.

Each runs as the hand-masked oracle, to the bit, or raises an error of ours with the way out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain, X, assert_chain, compiled_chain
from tests.oracle import (
    OPTIONS,
    ROUNDING,
    assert_same,
    hand_masked,
    masked_patterns,
    oracle_of,
)

modes = pytest.mark.parametrize("mode", ["train", "infer"])
orders = pytest.mark.parametrize("order", ["before", "after"])
"""Whether a line comes before or after the first call of the model."""

PRUNED = {"b.weight", "c.weight"}


@pytest.fixture
def accelerator() -> Iterator[Callable[..., accelerate.Accelerator]]:
    """Creates accelerators on the CPU, which share a state within a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda precision="no": accelerate.Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


def seeded_chain() -> nn.Module:
    """Returns the plain Chain that ``compiled_chain`` compiles."""
    torch.manual_seed(0)
    return Chain()


def assert_offloaded(student: nn.Module) -> None:
    """Asserts that a Chain whose weights are elsewhere runs masked, twice, and not dense."""
    outs = [student(X) for _ in range(2)]
    patterns = masked_patterns(student)
    assert patterns.keys() == PRUNED
    masked = hand_masked(seeded_chain(), patterns)(X)
    for out in outs:
        assert_same(out, masked)
    assert not torch.equal(outs[0], seeded_chain()(X))


@modes
@orders
def test_accelerator_when_it_prepares_in_bfloat16_and_unwraps_runs_masked(
    accelerator: Any, mode: str, order: str
) -> None:
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    prepared = accelerator("bf16").prepare(student)
    out = prepared(X)
    masked = hand_masked(seeded_chain(), masked_patterns(student))
    assert_same(out, accelerator("bf16").prepare(masked)(X))
    exact = accelerator("bf16").unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_chain(exact)
    assert not torch.equal(exact(X), out)


@modes
def test_accelerator_when_it_prepares_before_compile_and_unwraps_again_runs_masked(
    accelerator: Any, mode: str
) -> None:
    """The wrapper is part of what was compiled, and stays."""
    prepared = accelerator("bf16").prepare(seeded_chain())
    student = sdm.compile(prepared, "2:4", backend="eager", **OPTIONS[mode])
    out = student(X)
    masked = hand_masked(seeded_chain(), masked_patterns(student))
    assert_same(out, accelerator("bf16").prepare(masked)(X))
    bare = accelerator("bf16").unwrap_model(student, keep_fp32_wrapper=False)
    assert_same(bare(X), out)
    again = accelerator("bf16").prepare(bare)
    assert_same(again(X), out)
    assert_same(accelerator("bf16").unwrap_model(again, keep_fp32_wrapper=False)(X), out)


def test_accelerator_when_set_to_float16_on_a_cpu_runs_masked_in_float32(accelerator: Any) -> None:
    """Accelerate 1.15 leaves float16 out on a CPU without a word; it neither casts nor scales."""
    student = compiled_chain()
    out = accelerator("fp16").prepare(student)(X)
    masked = hand_masked(seeded_chain(), masked_patterns(student))
    assert_same(out, masked(X))
    assert out.dtype == torch.float32


@modes
@orders
def test_hook_when_added_and_removed_leaves_the_model_masked(mode: str, order: str) -> None:
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    add_hook_to_module(student, ModelHook())
    assert_chain(student)
    remove_hook_from_module(student)
    assert_chain(student)
    assert student.forward is student._sparsedm


@modes
@orders
@pytest.mark.parametrize("kind", ["cpu", "disk", "hook"])
def test_offload_when_weights_come_in_with_the_call_runs_masked(
    kind: str, mode: str, order: str, tmp_path: Path
) -> None:
    """All layers have one shape: the graph of a dense one must not run for a pruned one."""
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    chosen = mode == "train" or order == "after"
    with nullcontext() if chosen or kind == "hook" else pytest.warns(UserWarning, match="call it"):
        if kind == "cpu":
            accelerate.cpu_offload(student, execution_device="cpu")
        elif kind == "disk":
            accelerate.disk_offload(student, str(tmp_path), execution_device="cpu")
        else:
            student, _ = accelerate.cpu_offload_with_hook(student, execution_device="cpu")
    assert_offloaded(student)


@modes
def test_accelerator_state_when_saved_and_loaded_restores_the_model(
    accelerator: Any, mode: str, tmp_path: Path
) -> None:
    first = accelerator()
    student = first.prepare(compiled_chain(mode))
    out = student(X)
    assert_chain(student)
    first.save_state(str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(1)
    other = sdm.compile(Chain(), "2:4", backend="eager", **OPTIONS[mode])
    other(X)
    fresh = accelerator()
    other = fresh.prepare(other)
    fresh.load_state(str(tmp_path))
    assert_same(other(X), out)
    stored = student if mode == "train" else oracle_of(student)  # latent weights, or masked ones
    assert_same(other.b.weight, stored.b.weight)


LORA = {"target_modules": ["b", "c"], "r": 4, "init_lora_weights": False}


def list_adapters(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.Linear)]


@modes
@pytest.mark.parametrize("order", ["before compile", "before", "after"])
def test_adapter_when_added_merged_and_unmerged_runs_as_the_oracle(mode: str, order: str) -> None:
    config = peft.LoraConfig(**LORA)
    if order == "before compile":
        adapted = peft.inject_adapter_in_model(config, seeded_chain())
        student = sdm.compile(adapted, "2:4", backend="eager", **OPTIONS[mode])
    else:
        student = compiled_chain(mode)
        if order == "after":
            student(X)
        student = peft.inject_adapter_in_model(config, student)
    out = student(X)
    assert_same(out, oracle_of(student)(X))
    assert masked_patterns(student).keys() == {"b.base_layer.weight", "c.base_layer.weight"}
    latent = student.b.base_layer.weight.detach().clone()
    for layer in list_adapters(student):
        layer.merge()
    assert_same(student(X), oracle_of(student)(X))  # masks of the merged weights
    assert not torch.equal(student.b.base_layer.weight, latent)
    for layer in list_adapters(student):
        layer.unmerge()
    assert_same(student(X), oracle_of(student)(X))
    assert_same(student(X), out, tolerance=1e-6)  # (W + BA) - BA rounds
    for layer in list_adapters(student):
        layer.delete_adapter("default")
    assert_same(student(X), oracle_of(student)(X))


@modes
def test_peft_model_when_unloaded_or_merged_for_good_is_the_compiled_model_again(mode: str) -> None:
    student = compiled_chain(mode)
    before = student(X)
    wrapper = peft.get_peft_model(student, peft.LoraConfig(**LORA))
    out = wrapper(X)
    assert_same(out, oracle_of(wrapper.base_model.model)(X))
    assert not torch.equal(out, before)
    bare = wrapper.unload()
    assert bare is student
    assert_same(bare(X), before)
    merged = peft.get_peft_model(bare, peft.LoraConfig(**LORA)).merge_and_unload()
    assert masked_patterns(merged).keys() == PRUNED
    assert_chain(merged)
    assert not torch.equal(merged(X), before)


@torch.no_grad()
def change(student: nn.Module) -> None:
    student.b.weight.mul_(-1.3).add_(0.1)


@modes
def test_averaged_model_when_updated_masks_the_ema_of_the_weights(mode: str) -> None:
    student = compiled_chain(mode)
    student(X)
    first = student.b.weight.detach().clone()
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ema.update_parameters(student)
    change(student)
    ema.update_parameters(student)
    assert_same(ema.module.b.weight, torch.lerp(first, student.b.weight, 0.5), tolerance=1e-6)
    assert_chain(ema.module)
    assert_chain(student)
    assert not torch.equal(ema(X), student(X))


@modes
def test_ema_of_diffusers_when_copied_to_the_student_is_masked_and_restored(mode: str) -> None:
    student = compiled_chain(mode)
    student(X)
    ema = EMAModel(student.parameters(), decay=0.5)
    before = student(X)
    change(student)
    out = student(X)
    ema.store(student.parameters())
    ema.copy_to(student.parameters())
    assert_same(student(X), before)
    assert_chain(student)
    ema.restore(student.parameters())
    assert_same(student(X), out)
    assert not torch.equal(out, before)


@modes
@orders
def test_functional_call_when_given_other_weights_masks_those(mode: str, order: str) -> None:
    student = compiled_chain(mode)
    if order == "after":
        student(X)
    torch.manual_seed(1)
    other = Chain()
    with torch.no_grad():
        out = torch.func.functional_call(student, dict(other.named_parameters()), (X,))
    assert_same(out, hand_masked(other, masked_patterns(student))(X))
    assert_chain(student)


@orders
def test_transform_over_parameters_is_refused_and_over_inputs_is_not(order: str) -> None:
    student = compiled_chain()
    if order == "after":
        student(X)
    weights = {name: weight.detach().clone() for name, weight in student.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(student, weights, (X,)).square().mean()

    for _ in range(3):
        with pytest.raises(sdm.CaptureError, match=r"transforms \(grad, vmap\) over param"):
            torch.func.grad(loss)(weights)
    assert_chain(student)
    gradient = torch.func.grad(lambda x: student(x).square().mean())(X)
    masked = hand_masked(seeded_chain(), masked_patterns(student))
    assert_same(gradient, torch.func.grad(lambda x: masked(x).square().mean())(X))


@modes
def test_export_when_masks_are_applied_holds_the_masked_model(mode: str) -> None:
    student = compiled_chain(mode)
    expected = student(X)
    with pytest.raises(sdm.CaptureError, match=r"apply_masks\(model\), and export it"):
        torch.export.export(student, (X,))
    assert sdm.apply_masks(student) == ("b.weight", "c.weight")
    program = torch.export.export(student, (X,))
    assert_same(program.module()(X), expected)
    assert_chain(student)
    assert (program.state_dict["b.weight"] == 0).float().mean() == 0.5
    student.b.weight.data.copy_(seeded_chain().b.weight)  # as an EMA writes, without a version
    with pytest.raises(sdm.CaptureError, match="not masked themselves"):
        torch.export.export(student, (X,))


def test_onnx_export_when_masks_are_applied_holds_the_masked_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    student = compiled_chain()
    student(X)
    sdm.apply_masks(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(student, (X,), dynamo=True)
    weight: Tensor = torch.from_numpy(
        program.model.graph.initializers["b.weight"].const_value.numpy()
    )
    assert_same(weight, student.b.weight.detach())


@pytest.mark.parametrize("mode", ["train", "infer", "sparse"])
@pytest.mark.parametrize("called", [False, True])
def test_student_under_a_transform_over_its_inputs_stays_one_graph(called: bool, mode: str) -> None:
    student = sdm.compile(Chain(), "2:4", backend="eager", **OPTIONS[mode])
    if called:
        student(X)
    batch = torch.stack([X, -X])
    ours = torch.func.vmap(student)(batch)
    oracle = oracle_of(student)
    assert_same(ours, oracle(batch), tolerance=ROUNDING[mode])
    tangent = torch.ones_like(X)
    derived = [torch.func.jvp(model, (X,), (tangent,))[1] for model in (student, oracle)]
    assert_same(*derived, tolerance=ROUNDING[mode])
    assert_same(student(X), oracle(X), tolerance=ROUNDING[mode])
    assert sdm.explain(student).broken is None
