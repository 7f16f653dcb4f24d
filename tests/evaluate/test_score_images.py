"""``score_images`` of a stream against every metric on all of its features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsedm_compiler.data import open_data
from sparsedm_compiler.diffusion import generator_at, image_batches
from sparsedm_compiler.diffusion.image_batches import round_to_uint8
from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.evaluate import (
    FeatureNetwork,
    Metrics,
    Score,
    frechet_distance,
    kernel_distance,
    precision_recall,
    prepare_reference,
    save_statistics,
    score_images,
)
from sparsedm_compiler.reporting import save_images

PIXELS = FeatureNetwork("Pixels", lambda x: x.flatten(1))
ALL = Metrics(kid=True, precision_recall=True, stored=20, subsets=3, subset_size=12, seed=1)


def images(name: str, count: int = 40) -> Tensor:
    return torch.rand(count, 1, 2, 3, generator=generator_at(name)) * 1.8 - 0.9


def scored(ours: Tensor, theirs: object, **options: object) -> tuple[Score, ...]:
    return score_images(
        PIXELS,
        image_batches(ours, batch_size=7),
        **{"reference": theirs, "sampler": "DDIM 5 steps", **options},  # type: ignore[arg-type]
    )


def test_score_images_equals_every_metric_on_all_features() -> None:
    ours, theirs = images("a"), images("b", 30)
    x, y = (round_to_uint8(side).flatten(1) for side in (ours, theirs))
    scores = scored(ours, theirs, metrics=ALL)
    assert [score.metric for score in scores] == ["FD", "KID", "precision", "recall"]
    kid, spread = kernel_distance(x[:20], y[:20], subsets=3, size=12, seed=1)
    precision, recall = precision_recall(x[:20], y[:20])
    expected = [frechet_distance(x, y), kid, precision, recall]
    assert [score.value for score in scores] == pytest.approx(expected, rel=1e-6)
    assert scores[1].spread == spread
    assert [(s.count, s.reference_count) for s in scores] == [(40, 30)] + [(20, 20)] * 3
    assert {(score.network, score.sampler) for score in scores} == {("Pixels", "DDIM 5 steps")}


def test_score_images_without_metrics_returns_the_frechet_distance_alone() -> None:
    (score,) = scored(images("a"), images("b"))
    assert score == scored(images("a"), images("b"), metrics=ALL)[0]
    assert not len(prepare_reference(PIXELS, images("b")).stored)
    one = scored(images("a"), images("b"), metrics=replace(ALL, kid=False))
    assert [score.metric for score in one] == ["FD", "precision", "recall"]


def test_score_as_text() -> None:
    score = Score(1.23456, "Net", 20, 30, "DDIM 5 steps")
    assert str(score) == "FD-Net 1.235 (20 vs 30 images, DDIM 5 steps)"
    assert str(replace(score, width=31)) == f"{score}: 20 images are too few, take at least 31"
    assert replace(score, count=16).warning == ": 16 images are too few, take at least 20"
    assert replace(score, reference_count=None, width=20).warning == ""
    kid = replace(score, metric="KID", value=0.001234567, spread=0.000345, reference_count=None)
    assert str(kid) == "KID-Net 0.001235 ± 0.00034 (20 vs unknown images, DDIM 5 steps)"


def test_prepare_reference_is_reusable_and_checks_network_and_features(tmp_path: Path) -> None:
    ours, theirs = images("a"), images("b")
    known = prepare_reference(PIXELS, theirs, keep=ALL.keep)
    assert scored(ours, known, metrics=ALL) == scored(ours, theirs, metrics=ALL)
    path = tmp_path / "known.npz"
    save_statistics(path, known.statistics)
    assert scored(ours, path) == scored(ours, str(path)) == scored(ours, theirs)
    with pytest.raises(ConfigError, match=r"which stored 0: make it with .*keep=20"):
        scored(ours, prepare_reference(PIXELS, theirs), metrics=ALL)
    with pytest.raises(ConfigError, match=r"known.npz holds statistics and no features"):
        scored(ours, path, metrics=ALL)
    other = FeatureNetwork("Other", PIXELS.network)
    with pytest.raises(DataError, match="holds statistics of Pixels, not of Other"):
        prepare_reference(other, path)
    with pytest.raises(DataError, match="statistics of Other and of Pixels cannot be compared"):
        score_images(other, image_batches(ours), reference=known, sampler="none")


def test_prepare_reference_smaller_than_stored_keeps_all_features() -> None:
    metrics = replace(ALL, stored=35)
    known = prepare_reference(PIXELS, images("b", 30), keep=metrics.keep)
    scores = scored(images("a"), known, metrics=metrics)
    assert [(s.count, s.reference_count) for s in scores[1:]] == [(35, 30)] * 3


def test_score_images_accepts_npz_folder_and_data_as_reference(tmp_path: Path) -> None:
    theirs = images("b")
    held = ((round_to_uint8(theirs) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", images=held)
    expected = scored(images("a"), theirs)[0].value
    for reference in (tmp_path / "images.npz", open_data(tmp_path / "images.npz")):
        assert scored(images("a"), reference)[0].value == pytest.approx(expected, rel=1e-6)
    save_images(tmp_path / "pictures", range(40), theirs)
    wide = FeatureNetwork("Pixels", lambda x: x[:, :1].flatten(1))  # a folder is in colour
    scores = score_images(
        wide, image_batches(images("a")), reference=tmp_path / "pictures", sampler="none"
    )
    assert scores[0].value == pytest.approx(expected, rel=1e-6)
    with pytest.raises(DataError, match="does not exist"):
        scored(images("a"), tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read .*nowhere.npz"):
        scored(images("a"), tmp_path / "nowhere.npz")


def test_score_images_reads_the_reference_before_the_batches(tmp_path: Path) -> None:
    def batches() -> None:
        raise AssertionError("an image was drawn")
        yield

    with pytest.raises(DataError, match="nowhere"):
        score_images(PIXELS, batches(), reference=tmp_path / "nowhere", sampler="none")


def test_score_images_of_few_images_prints_a_note_and_of_too_few_raises(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scored(images("a"), images("b"))
    assert capsys.readouterr().out == ""
    scored(images("a"), images("b", 5))
    assert capsys.readouterr().out.startswith(
        "note: 5 images are too few for the 6 features of Pix"
    )
    with pytest.raises(DataError, match="1 images have no covariance"):
        scored(images("a", 1), images("b"))
    with pytest.raises(DataError, match="there are no images to take Pixels features of"):
        scored(images("a", 0), images("b"))
    with pytest.raises(DataError, match="need at least 4 rows"):
        scored(images("a", 3), images("b"), metrics=ALL)


def test_score_images_of_broken_or_mismatched_features_raises_data_error() -> None:
    broken = FeatureNetwork("Broken", lambda x: x.flatten(1) / 0)
    with pytest.raises(DataError, match="NaN or Inf"):
        score_images(broken, image_batches(images("a")), reference=images("b"), sampler="none")
    with pytest.raises(DataError, match="statistics of 6 and of 4 features cannot be compared"):
        scored(images("a"), images("b")[:, :, :, :2])


@pytest.mark.parametrize(
    ("name", "value"), [("stored", 1), ("subsets", 0), ("subset_size", 1), ("neighbours", 0)]
)
def test_metrics_with_invalid_numbers_raise_config_error(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} {value} of Metrics is not >= {value + 1}"):
        Metrics(**{name: value})
