"""Tensors as data, and what every source shares: numbers, batches, conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsedm_compiler.data import Condition, ReadOptions, TensorData, condition_rows
from sparsedm_compiler.diffusion import ImageSource
from sparsedm_compiler.errors import DataError
from tests.data.cases import expected, ops_of, pixels


def uint8(count: int) -> tuple[np.ndarray, Tensor]:
    array = pixels(count, 3, 5, 3)
    return array, torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def test_fetch_scales_bytes_in_the_order_of_the_numbers() -> None:
    array, images = uint8(6)
    array[2, 0, 0], images[2, :, 0, 0] = (0, 255, 51), torch.tensor([0, 255, 51])
    data = TensorData(images, torch.tensor([5, 4, 3, 2, 1, 0]))
    found, labels = data.fetch([2, 0, 2])
    torch.testing.assert_close(found, expected(array)[[2, 0, 2]], rtol=0, atol=1e-6)
    assert found[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert (found.dtype, found.min().item(), found.max().item()) == (torch.float32, -1, 1)
    assert isinstance(labels, Tensor)
    assert labels.tolist() == [3, 5, 3]
    assert (len(data), data.shape, data.classes) == (6, (3, 3, 5), 6)


def test_fetch_returns_floats_unchanged() -> None:
    latents = 7 * torch.randn(4, 4, 2, 2, dtype=torch.float64)
    found, condition = TensorData(latents).fetch(range(4))
    assert condition is None
    assert torch.equal(found, latents.float())
    found.zero_()
    assert latents.any()


def test_fetch_does_not_share_memory_with_the_tensor() -> None:
    _, images = uint8(4)
    before = images.clone()
    TensorData(images).fetch(range(4))[0].zero_()
    assert torch.equal(images, before)


def test_image_numbers_index_like_a_sequence() -> None:
    data = TensorData(torch.arange(4.0).reshape(4, 1, 1, 1))
    assert [float(image) for (image,) in data] == [0, 1, 2, 3]
    assert float(data[-1][0]) == 3
    assert data.fetch([])[0].shape == (0, 1, 1, 1)
    for wrong in ([4], [0, -1]):
        with pytest.raises(IndexError, match="of 4"):
            data.fetch(wrong)
    for number in (4, -5):
        with pytest.raises(IndexError):
            data[number]


def test_data_loader_collates_tensor_data() -> None:
    images, labels = torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([3, 2, 1, 0])
    ((x,), _) = DataLoader(TensorData(images), batch_size=3)
    assert torch.equal(x, images[:3])
    context = {"context": torch.randn(4, 2, 3)}
    for condition in (labels, context):
        (x, y), _ = DataLoader(TensorData(images, condition), batch_size=3)
        torch.testing.assert_close(y, condition_rows(condition, slice(3)))


def test_fetch_returns_named_conditions_of_the_images() -> None:
    context, pooled = torch.randn(5, 7, 3), torch.randn(5, 2)
    data = TensorData(torch.zeros(5, 1, 2, 2), {"context": context, "pooled": pooled})
    _, found = data.fetch([4, 1])
    torch.testing.assert_close(found, {"context": context[[4, 1]], "pooled": pooled[[4, 1]]})
    torch.testing.assert_close(data[3][1], {"context": context[3], "pooled": pooled[3]})
    assert data.classes is None


def test_fetch_does_no_work_per_image() -> None:
    _, images = uint8(64)
    data = TensorData(images, torch.zeros(64, dtype=torch.int64))
    assert ops_of(data, range(64)) == ops_of(data, range(2))


WRONG: list[tuple[Tensor, Condition | None, str]] = [
    (torch.zeros(3, 4, 4), None, r"\[3, 4, 4\]"),
    (torch.zeros(3, 1, 4, 4, dtype=torch.int64), None, "int64"),
    (torch.zeros(0, 1, 4, 4), None, "no images"),
    (torch.full((2, 1, 1, 1), torch.nan), None, "NaN"),
    (torch.zeros(3, 1, 4, 4), torch.zeros(2, dtype=torch.int64), r"labels \[2\] for 3"),
    (torch.zeros(3, 1, 4, 4), torch.zeros(3, 2, dtype=torch.int64), r"labels \[3, 2\] for 3"),
    (torch.zeros(3, 1, 4, 4), torch.zeros(3), "float32 are not"),
    (torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.bool), "bool are not"),
    (torch.zeros(3, 1, 4, 4), torch.tensor([0, -1, 1]), "label -1"),
    (
        torch.zeros(3, 1, 4, 4),
        {"context": torch.zeros(2, 3)},
        r"'context' \[2, 3\] has no row for each of 3",
    ),
    (torch.zeros(3, 1, 4, 4), {}, "empty mapping"),
]


@pytest.mark.parametrize(("images", "condition", "message"), WRONG, ids=lambda each: str(each)[:20])
def test_tensor_data_that_does_not_fit_raises(
    images: Tensor, condition: Condition | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TensorData(images, condition)


def test_labels_of_any_integer_type_become_int64() -> None:
    labels = torch.tensor([[2], [0]], dtype=torch.int16)
    found = TensorData(torch.zeros(2, 1, 1, 1), labels).fetch([0, 1])[1]
    assert isinstance(found, Tensor)
    assert (found.dtype, found.tolist()) == (torch.int64, [2, 0])


def test_read_options_below_one_raise() -> None:
    for options in ({"size": 0}, {"limit": -1}):
        with pytest.raises(DataError, match="not positive"):
            ReadOptions(**options)


def test_tensor_data_is_an_image_source() -> None:
    assert isinstance(TensorData(torch.zeros(1, 1, 2, 2)), ImageSource)
    assert not isinstance(torch.zeros(1, 1, 2, 2), ImageSource)
