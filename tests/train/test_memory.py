"""The memory of a fine-tune as it is computed, beside what a run of it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train import FinetuneConfig, loop
from sparsedm_compiler.train.gradient_checkpointing import is_checkpointing, start_checkpointing
from sparsedm_compiler.train.memory import MemoryEstimate, estimate_memory

BATCH = 16
OPTIONS: dict[str, Any] = {"images": BATCH, "batch_size": BATCH, "progress": False}


def make_model() -> UViT:
    torch.manual_seed(0)
    return UViT(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2)


def make_call(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(count, 1, 8, 8), torch.zeros(count)), {}


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(student: nn.Module, teacher: nn.Module, **options: Any) -> MemoryEstimate:
    """What a run of one step keeps, as tensors that are there and tensors that autograd saves."""
    kept: dict[int, Any] = {}
    runs: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    real = loop.take_step

    def step(run: Any, pieces: Any, **given: Any) -> Any:
        runs.append(run)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return real(run, pieces, **given)

    loop.take_step = step
    try:
        images = torch.randn(BATCH, 1, 8, 8)
        sdm.finetune(student, teacher, images, **{**OPTIONS, **options})
    finally:
        loop.take_step = real
    run, parameters = runs[0], list(student.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in (*parameters, *student.buffers())}
    state = run.process.optimizer.optimizer.state.values()
    run.masks.measure()
    return MemoryEstimate(
        weights=size_of([*parameters, *student.buffers()]),
        gradients=size_of([p.grad for p in parameters if p.grad is not None]),
        optimizer=size_of([t for values in state for t in values.values()]),
        ema=0 if run.ema is None else size_of([*run.ema.state_dict().values()]),
        masks=size_of([*run.masks._last.values()]),
        teacher=size_of([*teacher.parameters()]),
        activations=sum(s.nbytes() for key, s in kept.items() if key not in own),
    )


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True, "ema_decay": None}], ids=["plain", "less"]
)
def test_memory_of_a_run_is_what_was_computed(options: dict[str, Any]) -> None:
    teacher = make_model()
    student = sdm.compile(teacher, "2:4", backend="eager")
    measured = measure(student, teacher, **options)
    pruned = [*sdm.masked_parameters(student)]
    config = FinetuneConfig.create(**{**options, "batch_size": BATCH})
    computed = estimate_memory(teacher, config, make_call, pruned=pruned)
    for name in ("weights", "gradients", "optimizer", "ema", "masks", "teacher"):
        assert getattr(computed, name) == getattr(measured, name), name
    assert computed.activations == pytest.approx(measured.activations, rel=0.02)
    if not options:
        assert computed.recomputed == 0
        return
    inputs = [torch.zeros(BATCH, 17, 16, requires_grad=True) for _ in range(2)]
    block, kept = teacher.out_blocks[0], {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    ):
        block(*inputs)
    own = {t.untyped_storage()._cdata for t in (*inputs, *block.parameters())}
    inside = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert computed.recomputed == pytest.approx(inside, rel=0.02)


def test_memory_falls_by_what_each_option_saves() -> None:
    def compute(**options: Any) -> MemoryEstimate:
        config = FinetuneConfig.create(**{"batch_size": BATCH, **options})
        return estimate_memory(make_model().to("meta"), config, make_call, taught=True)

    plain = compute()
    assert compute(gradient_checkpointing=True).activations < 0.7 * plain.activations
    assert compute(mixed_precision="bf16").activations < 0.8 * plain.activations
    assert compute(accumulation=4).activations < 0.5 * plain.activations
    assert compute(ema_decay=None).ema == 0
    eight = compute(optimizer="bnb-adamw8bit").optimizer
    assert eight < plain.optimizer
    lora = compute(only="lora", lora_rank=1)
    assert lora.gradients < 0.2 * plain.gradients
    assert lora.optimizer < 0.2 * plain.optimizer
    sharded = estimate_memory(
        make_model(), FinetuneConfig(batch_size=BATCH, shard=True), make_call, processes=2
    )
    assert sharded.optimizer == plain.optimizer // 2
    assert sharded.teacher == plain.teacher
    assert plain.gathered == 0 < sharded.gathered < plain.weights


def test_memory_is_shown_by_its_parts() -> None:
    estimate = MemoryEstimate(2_000_000, 1_000_000, 0, 0, 500, 0, 3_000)
    assert str(estimate) == (
        "3.0 MB: weights 2.0 MB, gradients 1.0 MB, masks 500 B, activations 3.0 kB"
    )
    assert not UViT(embed_dim=8, depth=0).use_checkpoint


def test_memory_with_checkpointing_of_a_model_that_refuses_its_own_is_that_of_its_blocks() -> None:
    class Refusing(UViT):
        """Refuses as classes of diffusers do that have none."""

        def enable_gradient_checkpointing(self, *_: Any) -> None:
            raise ValueError("Refusing does not support gradient checkpointing")

    model, flat = make_model(), UViT(img_size=8, in_chans=1, embed_dim=16, depth=0, num_heads=2)
    config = FinetuneConfig(batch_size=BATCH, gradient_checkpointing=True)
    for refusing in (model, flat):
        refusing.__class__ = Refusing
    assert estimate_memory(model, config, make_call).recomputed > 0
    assert not is_checkpointing(model)
    with pytest.raises(sdm.ConfigError, match="Refusing has no gradient checkpointing of its own"):
        estimate_memory(flat, config, make_call)


def test_memory_of_a_model_that_checkpoints_by_block_is_computed_and_leaves_it_so() -> None:
    model, config = make_model(), FinetuneConfig(batch_size=BATCH, shard=True)
    before = estimate_memory(model, config, make_call, processes=2)
    start_checkpointing(model, by_block=True)
    after = estimate_memory(model, config, make_call, processes=2)
    assert after.activations < 0.9 * before.activations
    assert after.gathered == before.gathered
    assert is_checkpointing(model)
    assert not model.use_checkpoint
