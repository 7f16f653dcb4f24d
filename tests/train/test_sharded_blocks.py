"""FSDP2 per block: two processes train what one does, and gather one block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import sparsedm_compiler as sdm
from sparsedm_compiler.models import UViT
from sparsedm_compiler.train.find_blocks import find_blocks
from sparsedm_compiler.train.fsdp import shard_parameters
from tests.group import run_group
from tests.train.cases import short

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sparsedm", {"accumulation": 2}),
    ("asp", {}),
    ("sparsedm", {"gradient_checkpointing": True}),  # the whole student is one unit
)
OPTIONS: dict[str, Any] = {"images": 24, "held_out": None, "held_out_every": None, "save_every": 8}


def make_model() -> UViT:
    """A U-ViT with two blocks in lists, and one beside them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 4, "in_chans": 1, "embed_dim": 8, "num_heads": 2}
    return UViT(depth=2, num_classes=4, **options)


def train(rank: int, folder: Path) -> None:
    """Every case, sharded; then how much of the model is whole while a block runs."""
    for number, (method, options) in enumerate(CASES):
        out = folder / str(number)
        result, _ = short(method, out, teacher=make_model(), shard=True, **OPTIONS, **options)
        if rank == 0:
            torch.save(result.losses, folder / f"{number}.pt")
    student = sdm.compile(make_model(), "2:4", backend="eager")
    shard_parameters(student, 2)
    whole: list[int] = []

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def look(*_: Any) -> None:
        own = [p for p in student.parameters() if not isinstance(p, DTensor)]
        whole.append(sum(p.numel() for p in own))

    for block in find_sharded(student):
        block.norm2.register_forward_pre_hook(look)
    student(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    whole.clear()
    out = student(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    out.sum().backward()
    if rank == 0:
        torch.save(whole, folder / "whole.pt")


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
    method, options = CASES[number]
    result, _ = short(method, tmp_path, teacher=make_model(), **OPTIONS, **options)
    assert torch.load(trained / f"{number}.pt") == pytest.approx(result.losses, rel=1e-5)
    files = [folder / "student.safetensors" for folder in (tmp_path, trained / str(number))]
    one, two = (sdm.load(file, make_model(), backend="eager").state_dict() for file in files)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_one_block_is_whole_at_a_time(trained: Path) -> None:
    model = make_model()
    blocks = find_blocks(model)
    assert blocks == [*model.in_blocks, *model.out_blocks]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in model.parameters())
    whole = torch.load(trained / "whole.pt")
    assert whole == [total - sum(sizes) + size for size in sizes]
