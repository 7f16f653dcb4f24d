"""Two processes train what one does: gradients averaged (DDP), or everything sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.train import FinetuneResult, finetune
from sparsedm_compiler.train.checkpoint import list_checkpoints
from sparsedm_compiler.train.fsdp import (
    compute_local_mask,
    copy_rows_into,
    gather_rows,
    get_local_rows,
    shard_parameters,
    slice_local_rows,
)
from tests.group import run_group
from tests.train.cases import (
    SPARSE,
    empty_curves,
    plain_teacher,
    short,
    student_of,
    teacher,
    weights,
)

Case = tuple[str, dict[str, Any]]

CASES: tuple[Case, ...] = (
    *((method, {}) for method in SPARSE if method not in ("sparsedm", "ste", "sr-ste")),
    ("dense", {}),
    ("sparsedm", {"accumulation": 2}),
    ("sparsedm", {"accumulation": 2, "shard": True}),
    ("asp", {"shard": True}),
    ("progressive", {"shard": True}),
    ("dense", {"shard": True}),
)


IMAGES = 48
"""Six steps: the second stage of a staged method begins at the fourth."""


def teacher_of(options: Mapping[str, Any]) -> nn.Module:
    """A U-ViT where batches are split further, averaged and sharded; else three layers."""
    if "accumulation" in options:
        return teacher()
    return plain_teacher()


def train(rank: int, folder: Path) -> None:
    """Every case in a folder of its own; the main process keeps its losses."""
    for number, (method, options) in enumerate(CASES):
        given = {"images": IMAGES, "teacher": teacher_of(options), **options}
        result, _ = short(method, folder / str(number), **given)
        if rank == 0:
            torch.save((result.losses, result.held_out), folder / f"{number}.pt")


def final(folder: Path, method: str, model: nn.Module) -> list[Tensor]:
    """The averaged weights in the folder of a run; ``model`` is of the run's class."""
    path = folder / "student.safetensors"
    if method == "dense":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
        return weights(model)
    return weights(sdm.load(path, model))


def test_finetune_by_two_processes_equals_one_process(tmp_path: Path) -> None:
    run_group(train, tmp_path)
    alone: dict[Any, tuple[FinetuneResult, list[Tensor]]] = {}
    for number, (method, options) in enumerate(CASES):
        plain = {name: value for name, value in options.items() if name != "shard"}
        key = (method, *plain.items())
        if key not in alone:
            folder = tmp_path / f"alone{number}"
            given = {"images": IMAGES, "teacher": teacher_of(options), **plain}
            done = short(method, folder, **given)[0]
            alone[key] = done, final(folder, method, teacher_of(options))
        result, ours = alone[key]
        losses, held_out = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        assert losses == pytest.approx(result.losses, rel=1e-5), (method, options)
        finals = [entry.final for entry in held_out]
        assert finals == pytest.approx([entry.final for entry in result.held_out], rel=1e-5)
        theirs = final(tmp_path / str(number), method, teacher_of(options))
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def interrupted(rank: int, folder: Path) -> None:
    """A sharded run that is resumed from its middle, where the masks are shared by two rows."""
    from sparsedm_compiler.train import loop

    model = teacher()
    options: dict[str, Any] = {"shard": True, "progress": False, "batch_size": 8, "lr": 1e-2}
    options |= {"images": 48, "save_every": 24, "method": "sparsedm"}
    data = (
        torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 3,
    )
    real = loop.take_step

    def step(run: Any, pieces: Any, **given: Any) -> Any:
        if run.progress.seen == 32:
            raise KeyboardInterrupt
        return real(run, pieces, **given)

    for name, interrupt in (("whole", False), ("parts", True), ("parts", False)):
        student = sdm.compile(model, pattern="2:4x4", backend="eager")
        loop.take_step = step if interrupt else real
        try:
            with empty_curves():
                result = finetune(student, model, data, out=folder / name, **options)
        except KeyboardInterrupt:
            assert list_checkpoints(folder / name) == [24]
            continue
        if rank == 0:
            torch.save(result.losses, folder / f"{name}.pt")


def test_finetune_sharded_and_interrupted_resumes(tmp_path: Path) -> None:
    run_group(interrupted, tmp_path)
    whole_losses, parts = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert whole_losses == parts
    ours, theirs = (final(tmp_path / name, "sparsedm", teacher()) for name in ("whole", "parts"))
    assert all(map(torch.equal, ours, theirs))


def masks(rank: int, folder: Path) -> None:
    """Masks of the rows here are the rows of the masks, also where rows share them unevenly
    or a tile lies on both processes."""
    model = nn.Linear(8, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    full = model.weight.detach().clone()
    shard_parameters(model, 2)
    weight = model.weight
    assert get_local_rows(weight).shape == (6, 8)
    assert torch.equal(gather_rows(weight), full)
    for text in ("2:4", "1:8", "2:4x4", "4:2:8", "2:4t", "1:2@4x4", "1:2@1x4", "1:2@4x4+2:4"):
        pattern = sdm.Pattern.parse(text)
        expected = slice_local_rows(nm_mask(full, pattern), weight)
        assert torch.equal(compute_local_mask(weight, pattern), expected)
    copy_rows_into(weight, full + 1)
    assert torch.equal(gather_rows(weight), full + 1)


def test_compute_local_mask_of_sharded_weights_is_the_rows_of_the_mask(tmp_path: Path) -> None:
    run_group(masks, tmp_path)


def test_finetune_with_unsupported_sharding_raises() -> None:
    with pytest.raises(ConfigError, match="needs several processes"):
        short("sparsedm", shard=True)
    with pytest.raises(ConfigError, match="neither teacher 'previous' nor fp16"):
        short("transfer", shard=True)
    with pytest.raises(ConfigError, match="not a multiple of 1 processes times accumulation 3"):
        short("sparsedm", accumulation=3)
    model = student_of(teacher())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="no optimizer can know the new"):
        finetune(model, None, torch.randn(8, 1, 4, 4), optimizer=optimizer, shard=True)
