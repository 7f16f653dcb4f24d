"""Calibration batches: the noise levels they hold, and how they are weighted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, DataError
from tests.train.cases import data, teacher


def make(**options: Any) -> list[sdm.CalibrationBatch]:
    return sdm.make_calibration_batches(teacher(), data(), **{"batch_size": 8, **options})


def test_calibration_batches_hold_all_images_once_the_noisiest_first() -> None:
    batches = make()
    assert [len(batch.args[0]) for batch in batches] == [8] * 5
    times = torch.cat([batch.args[1] for batch in batches])
    assert torch.equal(times, times.sort(descending=True).values)
    assert torch.equal(times.div(25, rounding_mode="floor"), torch.arange(39, -1, -1))
    labels = torch.cat([batch.args[2] for batch in batches])
    assert torch.equal(labels, data()[1])
    images = torch.cat([batch.args[0] for batch in batches])
    clean = (images - data()[0])[times < 25].square().mean()
    assert clean < 0.05 < (images - data()[0])[times > 900].square().mean()


def test_calibration_batches_depend_on_the_seed_alone() -> None:
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(first[0].args[0], again[0].args[0])
    assert not torch.equal(first[0].args[0], other[0].args[0])


def test_logarithmic_weights_fall_from_the_noisiest_batch() -> None:
    weights = [batch.weight for batch in make(timestep_weights="logarithmic")]
    assert weights[0] == 1.2
    assert weights[-1] == pytest.approx(0.8)
    assert weights == sorted(weights, reverse=True)
    assert weights[0] - weights[1] > weights[3] - weights[4]
    assert [batch.weight for batch in make()] == [1.0] * 5
    assert [b.weight for b in make(timestep_weights="logarithmic", images=4)] == [1.0]


def test_calibration_batches_take_the_dtype_of_the_model() -> None:
    batch = sdm.make_calibration_batches(teacher().bfloat16(), data(), images=4)[0]
    assert batch.args[0].dtype == torch.bfloat16
    assert len(batch.args[0]) == 4


def test_calibration_batches_prune_a_model_that_takes_labels() -> None:
    model = teacher()
    report = sdm.prune_one_shot(model, "1:4", make(images=16), progress=False)
    assert report.rows
    assert all(row.error <= row.magnitude_error for row in report.rows)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"timestep_weights": "odd"}, ConfigError, "timestep_weights 'odd' is neither"),
        ({"images": 0}, ConfigError, "0 images in batches of 8"),
        ({"objective": "noise"}, Exception, "noise"),
    ],
)
def test_calibration_batches_of_an_invalid_request_are_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make(**options)


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 4, 4), torch.full((4, 1, 4, 4), torch.nan)])
def test_calibration_batches_of_no_or_broken_images_are_refused(images: Tensor) -> None:
    with pytest.raises(DataError):
        sdm.make_calibration_batches(teacher(), images)
