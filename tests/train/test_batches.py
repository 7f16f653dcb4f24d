"""Every image of a run is known by its position: order, shares, draws, dropped conditions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.train import FinetuneConfig
from sparsedm_compiler.train.batches import BatchShare, Stream
from sparsedm_compiler.train.randomness import draw_values, drop_conditions, flip_images

IMAGES = torch.arange(10.0).reshape(10, 1, 1, 1)


def numbers(stream: Stream, seen: int, count: int) -> list[list[tuple[int, list[int]]]]:
    """Position and images of every micro-batch of the next batches."""
    return [
        [(piece.first, piece.images.flatten().int().tolist()) for piece in pieces]
        for pieces in islice(stream.start_at(seen), count)
    ]


def flat(found: list[list[tuple[int, list[int]]]]) -> list[int]:
    return [number for pieces in found for _, images in pieces for number in images]


def test_stream_for_any_batch_size_shows_every_image_once_per_epoch() -> None:
    by_four = flat(numbers(Stream(IMAGES, 4, 0), 0, 5))
    by_five = flat(numbers(Stream(IMAGES, 5, 0), 0, 4))
    assert by_four == by_five
    assert sorted(by_four[:10]) == sorted(by_four[10:]) == [*range(10)]
    assert by_four[:10] != by_four[10:]
    assert flat(numbers(Stream(IMAGES, 4, 1), 0, 5)) != by_four


@pytest.mark.parametrize("seen", [4, 8, 12, 40])
def test_stream_started_after_some_images_continues_the_same_order(seen: int) -> None:
    whole = numbers(Stream(IMAGES, 4, 0), 0, 12)
    assert numbers(Stream(IMAGES, 4, 0), seen, 2) == whole[seen // 4 :][:2]


@pytest.mark.parametrize("data", [IMAGES, "loader"])
def test_batch_share_of_two_processes_splits_the_batch_in_order(data: Any) -> None:
    if data == "loader":
        data = DataLoader(TensorDataset(IMAGES), batch_size=8, drop_last=True)
    whole = numbers(Stream(data, 8, 0), 0, 3)
    shares = [numbers(Stream(data, 8, 0, BatchShare(rank, 2, 2)), 0, 3) for rank in range(2)]
    for step, [(first, images)] in enumerate(whole):
        pieces = [*shares[0][step], *shares[1][step]]
        assert [position for position, _ in pieces] == [first + 2 * k for k in range(4)]
        assert [number for _, part in pieces for number in part] == images


def test_stream_of_an_iterable_started_in_the_middle_reads_on() -> None:
    loader = DataLoader(TensorDataset(IMAGES), batch_size=4)
    whole = numbers(Stream(loader, 0, 0), 0, 6)
    assert [len(pieces[0][1]) for pieces in whole] == [4, 4, 2, 4, 4, 2]
    assert numbers(Stream(loader, 0, 0), 14, 2) == whole[4:]


def test_stream_with_workers_yields_the_same_batches() -> None:
    class Fetching:
        def __len__(self) -> int:
            return 10

        def fetch(self, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
            return IMAGES[[*wanted]], torch.tensor([*wanted])

    plain = Stream(Fetching(), 4, 0)
    worked = Stream(Fetching(), 4, 0, workers=1)
    assert numbers(worked, 8, 3) == numbers(plain, 8, 3)


def test_stream_with_batches_too_small_to_share_raises() -> None:
    with pytest.raises(DataError, match="2 images cannot be shared by 4 processes"):
        next(Stream(IMAGES, 2, 0, BatchShare(0, 4)).start_at())
    with pytest.raises(DataError, match="no row for each of 10 images"):
        next(Stream([(IMAGES, torch.zeros(9))], 10, 0).start_at())


def test_draw_values_depends_on_seed_and_position_alone() -> None:
    config = FinetuneConfig(drop_condition=0.5)
    whole = draw_values(config, 0, torch.Size((8, 1, 2, 2)))
    part = draw_values(config, 3, torch.Size((2, 1, 2, 2)))
    for name in ("noise", "u", "flip", "drop"):
        assert torch.equal(vars_of(whole, name)[3:5], vars_of(part, name))
    other = draw_values(FinetuneConfig(drop_condition=0.5, seed=1), 0, torch.Size((8, 1, 2, 2)))
    assert not torch.equal(whole.noise, other.noise)


def vars_of(draws: Any, name: str) -> Tensor:
    found: Tensor = getattr(draws, name)
    return found


def test_draw_values_has_the_documented_distributions() -> None:
    found = draw_values(FinetuneConfig(drop_condition=0.25), 0, torch.Size((4000, 4)))
    assert found.noise.mean().item() == pytest.approx(0, abs=0.03)
    assert found.noise.std().item() == pytest.approx(1, abs=0.03)
    assert found.u.mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0 <= found.u.min() <= found.u.max() < 1
    assert found.flip.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert found.drop.float().mean().item() == pytest.approx(0.25, abs=0.03)
    joint = torch.corrcoef(torch.stack([found.u, found.flip.double(), found.drop.double()]))
    assert (joint - torch.eye(3)).abs().max() < 0.06


def test_flip_images_mirrors_the_last_axis() -> None:
    images = torch.arange(4.0).reshape(2, 1, 1, 2)
    assert flip_images(images, torch.tensor([True, False])).flatten().tolist() == [1, 0, 2, 3]


def test_drop_conditions_replaces_labels_and_text_by_the_null_condition() -> None:
    drop = torch.tensor([False, True])
    labels = torch.tensor([4, 5])
    assert drop_conditions(labels, drop, 9, None).tolist() == [4, 9]  # type: ignore[union-attr]
    assert drop_conditions(labels, ~drop & drop, None, None) is labels
    assert drop_conditions(None, drop, 9, None) is None
    text = {"context": torch.ones(2, 3)}
    zeros: Any = drop_conditions(text, drop, None, None)
    assert zeros["context"].tolist() == [[1, 1, 1], [0, 0, 0]]
    empty: Any = drop_conditions(text, drop, None, {"context": torch.full((1, 3), 7.0)})
    assert empty["context"].tolist() == [[1, 1, 1], [7, 7, 7]]
    with pytest.raises(ConfigError, match="needs null_label"):
        drop_conditions(labels, drop, None, None)
