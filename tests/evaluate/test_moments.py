"""Streamed moments against numpy's on all features at once, and files both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.errors import CheckpointError, DataError
from sparsedm_compiler.evaluate import Moments, Statistics, load_statistics, save_statistics


def drawn(count: int, width: int = 5, away: float = 0.0) -> Tensor:
    """Correlated features far from zero, where sums of squares would lose their digits."""
    mix = torch.randn(width, width, generator=generator_at("mix"))
    return torch.randn(count, width, generator=generator_at("drawn")) @ mix + away


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (7, 20, 13), (1,) * 40])
@pytest.mark.parametrize("away", [0.0, 1e4])
def test_parts_come_to_the_moments_of_the_whole(sizes: tuple[int, ...], away: float) -> None:
    features = drawn(40, away=away)
    found = Moments.none(5)
    for part in torch.split(features, list(sizes)):
        found = found + Moments.of(part)
    values = features.double().numpy()
    statistics = found.statistics("Net")
    assert (statistics.count, statistics.network) == (40, "Net")
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_nothing_added_changes_nothing() -> None:
    some = Moments.of(drawn(3))
    for sum_ in (some + Moments.none(5), Moments.none(5) + some):
        assert torch.equal(sum_.scatter, some.scatter)
        assert sum_.count == 3
    assert (Moments.none(5) + Moments.none(5)).count == 0


def test_moments_without_a_gaussian_are_refused() -> None:
    with pytest.raises(DataError, match="1 images have no covariance; give at least 2"):
        Moments.of(drawn(1)).statistics()
    with pytest.raises(DataError, match="widths 5 and 4 make no one set"):
        Moments.of(drawn(3)) + Moments.of(drawn(3, 4))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="NaN or Inf"):
            Moments.of(torch.tensor([[0.0], [wrong], [1.0]])).statistics()
    with pytest.raises(DataError, match=r"mean \[3\] and covariance \[2, 2\]"):
        Statistics(np.zeros(3), np.eye(2))


def test_files_come_back_whole_and_hold_what_pytorch_fid_reads(tmp_path: Path) -> None:
    given = Moments.of(drawn(9)).statistics("Net")
    path = tmp_path / "new" / "stats.npz"
    save_statistics(path, given)
    found = load_statistics(path)
    assert (found.count, found.network) == (9, "Net")
    np.testing.assert_array_equal(found.mean, given.mean)
    np.testing.assert_array_equal(found.covariance, given.covariance)
    with np.load(path) as held:  # as pytorch_fid.fid_score does
        np.testing.assert_array_equal(held["mu"][:], given.mean)
        np.testing.assert_array_equal(held["sigma"][:], given.covariance)


def test_a_file_of_pytorch_fid_says_neither_count_nor_network(tmp_path: Path) -> None:
    path = tmp_path / "theirs.npz"
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.eye(3))
    found = load_statistics(path)
    assert (found.count, found.network) == (None, None)
    save_statistics(path, found)
    assert load_statistics(path).count is None


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the statistics .*none.npz"):
        load_statistics(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="cannot read the statistics"):
        load_statistics(path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(DataError, match="holds images where statistics"):
        load_statistics(path)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(DataError, match="cannot read the statistics"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(DataError, match="NaN"):
        load_statistics(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_statistics(tmp_path / "file" / "x.npz", Moments.of(drawn(9)).statistics())
