"""FSDP2 per block: two processes train what one does, and gather one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.models.presets import from_diffusers
from sparsedm_compiler.train.find_blocks import find_blocks
from sparsedm_compiler.train.fsdp import list_units, shard_parameters
from sparsedm_compiler.train.gradient_checkpointing import (
    checkpointing_gradients,
    start_checkpointing,
    stop_checkpointing,
)
from tests.group import run_group
from tests.train.cases import short

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sparsedm", {"accumulation": 2}),
    ("asp", {"model": "entered"}),
    ("sparsedm", {"gradient_checkpointing": True}),
    ("sparsedm", {"model": "tied"}),
    ("sparsedm", {"model": "entered", "gradient_checkpointing": True}),
    ("sparsedm", {"model": "dit", "gradient_checkpointing": True}),
)
OPTIONS: dict[str, Any] = {"images": 24, "held_out": None, "held_out_every": None, "save_every": 8}


def make_model() -> UViT:
    """A U-ViT with two blocks in lists, and one beside them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 4, "in_chans": 1, "embed_dim": 8, "num_heads": 2}
    return UViT(depth=2, num_classes=4, **options)


def make_tied_model() -> UViT:
    """One whose blocks in lists share a weight, and one of them a module with what lies outside."""
    model = make_model()
    first, last, middle = model.in_blocks[0], model.out_blocks[0], model.mid_block
    last.mlp.fc1.weight = first.mlp.fc1.weight  # type: ignore[union-attr]
    first.attn = middle.attn
    return model


class Entered(UViT):
    """A U-ViT that calls a part of a block outside of the block, as diffusers' DiT does."""

    def _tokens(self, *args: Any) -> Tensor:
        out: Tensor = self.out_blocks[0].norm1(super()._tokens(*args))  # type: ignore[operator]
        return out


def make_entered_model() -> UViT:
    model = make_model()
    model.__class__ = Entered
    return model


def make_dit() -> nn.Module:
    """diffusers' DiT, whose first block the model reaches into, with a block more."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 4, "num_embeds_ada_norm": 4}
    sizes = {"sample_size": 4, "in_channels": 1, "num_layers": 3, "norm_type": "ada_norm_zero"}
    sizes["attention_bias"] = False  # the gradient of a key's is rounding alone
    model = from_diffusers("DiTTransformer2DModel", {**options, **sizes})
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # of classes, drawn by each process for itself
            module.dropout_prob = 0.0
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": make_model,
    "tied": make_tied_model,
    "entered": make_entered_model,
    "dit": make_dit,
}


def train_case(number: int, out: Path, **more: Any) -> tuple[float, ...]:
    method, options = CASES[number]
    options = {**OPTIONS, **options, **more}
    model = MODELS[options.pop("model", "plain")]()
    return short(method, out, teacher=model, **options)[0].losses


def train(rank: int, folder: Path) -> None:
    """Every case, sharded; then how much of the model is whole while a block runs."""
    for number in range(len(CASES)):
        losses = train_case(number, folder / str(number), shard=True)
        if rank == 0:
            torch.save(losses, folder / f"{number}.pt")
    for checkpointed in (False, True):
        whole = watch_whole(checkpointed)
        if rank == 0:
            torch.save(whole, folder / f"whole-{checkpointed}.pt")


def watch_whole(checkpointed: bool) -> list[int]:
    """Values of parameters that are whole whenever a block runs, in a call and its backward."""
    student = sdm.compile(make_model(), "2:4", backend="eager")
    whole: list[int] = []

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def look(*_: Any) -> None:
        own = [p for p in student.parameters() if not isinstance(p, DTensor)]
        whole.append(sum(p.numel() for p in own))

    with checkpointing_gradients(student, checkpointed, by_block=True):
        shard_parameters(student, 2)
        for block in find_sharded(student):
            block.register_forward_pre_hook(look)
        for _ in range(2):
            whole.clear()
            out = student(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2).long())
            out.sum().backward()
    return whole


def find_sharded(student: nn.Module) -> list[Any]:
    return [*student.in_blocks, *student.out_blocks]  # type: ignore[misc]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_group(train, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_blocks_sharded_over_two_processes_train_what_one_process_trains(
    number: int, trained: Path, tmp_path: Path
) -> None:
    losses = train_case(number, tmp_path)
    assert torch.load(trained / f"{number}.pt") == pytest.approx(losses, rel=1e-5)
    model = MODELS[CASES[number][1].get("model", "plain")]
    files = [folder / "student.safetensors" for folder in (tmp_path, trained / str(number))]
    one, two = (sdm.load(file, model(), backend="eager").state_dict() for file in files)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_one_block_is_whole_at_a_time(trained: Path) -> None:
    model = make_model()
    blocks = find_blocks(model)
    assert blocks == [*model.in_blocks, *model.out_blocks]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in model.parameters())
    whole = [total - sum(sizes) + size for size in sizes]
    assert torch.load(trained / "whole-False.pt") == whole
    assert torch.load(trained / "whole-True.pt") == whole


def test_units_when_blocks_share_parameters_leave_those_blocks_to_the_rest() -> None:
    model = make_model()
    assert list_units(model) == [*model.in_blocks, *model.out_blocks]
    assert list_units(make_tied_model()) == []
    entered = make_entered_model()
    call = (torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1).long())
    assert list_units(entered, lambda: entered(*call)) == [*entered.in_blocks]
    assert not entered.out_blocks[0]._forward_pre_hooks
    start_checkpointing(model, by_block=True)
    assert list_units(model) == [*model.in_blocks, *model.out_blocks]
    stop_checkpointing(model)
    tied = make_tied_model()
    start_checkpointing(tied, by_block=True)
    assert list_units(tied) == []
    start_checkpointing(entered, by_block=True)
    assert list_units(entered, lambda: entered(*call)) == [*entered.in_blocks]
    model.enable_gradient_checkpointing()
    assert list_units(model) == []
