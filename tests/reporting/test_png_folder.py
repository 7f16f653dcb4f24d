"""``save_images``: names, bytes, resuming, and disks that are full."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion import generator_at, image_batches
from sparsedm_compiler.diffusion.image_batches import iterate_chunks, round_to_uint8
from sparsedm_compiler.errors import CheckpointError, ConfigError, DataError
from sparsedm_compiler.reporting import has_images, save_images


def images(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 3, 5, generator=generator_at("images")) * 2.4 - 1.2


@pytest.mark.parametrize("channels", [1, 3])
def test_save_images_writes_rounded_bytes_under_numbered_names(
    tmp_path: Path, channels: int
) -> None:
    batch = images(3, channels)
    assert save_images(tmp_path / "new", range(7, 10), batch) == 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "000007.png",
        "000008.png",
        "000009.png",
    ]
    for row, number in enumerate(range(7, 10)):
        read = np.asarray(Image.open(tmp_path / "new" / f"{number:06d}.png").convert("RGB"))
        values = np.rint((np.clip(batch[row].double().numpy(), -1, 1) + 1) * 127.5)
        np.testing.assert_array_equal(read, np.broadcast_to(values, (3, 3, 5)).transpose(1, 2, 0))


def test_save_images_read_back_equal_the_rounded_images(tmp_path: Path) -> None:
    save_images(tmp_path, range(4), images(4))
    read = torch.cat([part for _, part in image_batches(open_data(tmp_path), batch_size=3)])
    assert torch.equal(read, round_to_uint8(images(4)))
    assert torch.equal(round_to_uint8(read), read)


def test_save_images_with_resume_keeps_existing_files(tmp_path: Path) -> None:
    save_images(tmp_path, range(2), images(2))
    before = (tmp_path / "000001.png").read_bytes()
    assert has_images(tmp_path, range(2))
    assert not has_images(tmp_path, range(3))
    assert save_images(tmp_path, range(1, 3), -images(2), resume=True) == 1
    assert (tmp_path / "000001.png").read_bytes() == before
    assert has_images(tmp_path, range(3))
    assert save_images(tmp_path, range(1, 3), -images(2)) == 2
    assert (tmp_path / "000001.png").read_bytes() != before


def test_save_images_of_invalid_images_raises_data_error(tmp_path: Path) -> None:
    for wrong in (images(2), images(3)[0], images(3).byte()):
        with pytest.raises(DataError, match="for 3 numbers are not floating-point"):
            save_images(tmp_path, range(3), wrong)
    with pytest.raises(DataError, match=r"\[3, 4, 3, 5\] have no 1 or 3 channels: latents must"):
        save_images(tmp_path, range(3), images(3, 4))
    broken = images(3)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="images 0 to 2 hold NaN or Inf"):
        save_images(tmp_path, range(3), broken)
    assert not [*tmp_path.iterdir()]


def test_save_images_on_a_full_disk_raises_and_leaves_no_torn_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # a write past that is an OSError
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*000000.png: .*; make room"):
            save_images(tmp_path, range(2), images(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another folder"):
        save_images(tmp_path / "file", range(2), images(2))


def test_chunks_are_equal_for_any_number_of_processes() -> None:
    whole = [*iterate_chunks(23, 4)]
    assert [number for part in whole for number in part] == [*range(23)]
    for processes in (1, 2, 3, 9):
        shares = [[*iterate_chunks(23, 4, (rank, processes))] for rank in range(processes)]
        assert sorted((part for share in shares for part in share), key=lambda p: p.start) == whole
        assert all(share == whole[rank::processes] for rank, share in enumerate(shares))
    assert not [*iterate_chunks(0, 4)]
    with pytest.raises(ConfigError, match="a batch holds at least 1 image"):
        [*iterate_chunks(5, 0)]


def test_image_batches_of_invalid_data_raises_data_error() -> None:
    class Odd:
        def __len__(self) -> int:
            return 3

        def fetch(self, numbers: range) -> tuple[Tensor, None]:
            return torch.zeros(2, 1, 4, 4), None

    with pytest.raises(DataError, match=r"\[2, 1, 4, 4\] of type torch.float32 for 3 numbers"):
        [*image_batches(Odd())]
    with pytest.raises(DataError, match="uint8"):
        [*image_batches(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))]
