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
def test_moments_merged_from_parts_equal_those_of_the_whole(
    sizes: tuple[int, ...], away: float
) -> None:
    features = drawn(40, away=away)
    moments = Moments.empty(5)
    for part in torch.split(features, list(sizes)):
        moments = moments + Moments.from_features(part)
    values = features.double().numpy()
    statistics = moments.to_statistics("Net")
    assert (statistics.count, statistics.network) == (40, "Net")
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_moments_plus_empty_moments_are_unchanged() -> None:
    some = Moments.from_features(drawn(3))
    for sum_ in (some + Moments.empty(5), Moments.empty(5) + some):
        assert torch.equal(sum_.scatter, some.scatter)
        assert sum_.count == 3
    assert (Moments.empty(5) + Moments.empty(5)).count == 0


def test_moments_without_a_gaussian_raise_data_error() -> None:
    with pytest.raises(DataError, match="1 images have no covariance; give at least 2"):
        Moments.from_features(drawn(1)).to_statistics()
    with pytest.raises(DataError, match="widths 5 and 4 make no one set"):
        Moments.from_features(drawn(3)) + Moments.from_features(drawn(3, 4))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="NaN or Inf"):
            Moments.from_features(torch.tensor([[0.0], [wrong], [1.0]])).to_statistics()
    with pytest.raises(DataError, match=r"mean \[3\] and covariance \[2, 2\]"):
        Statistics(np.zeros(3), np.eye(2))


def test_save_and_load_statistics_round_trip_in_the_format_of_pytorch_fid(tmp_path: Path) -> None:
    statistics = Moments.from_features(drawn(9)).to_statistics("Net")
    path = tmp_path / "new" / "stats.npz"
    save_statistics(path, statistics)
    loaded = load_statistics(path)
    assert (loaded.count, loaded.network) == (9, "Net")
    np.testing.assert_array_equal(loaded.mean, statistics.mean)
    np.testing.assert_array_equal(loaded.covariance, statistics.covariance)
    with np.load(path) as held:  # as pytorch_fid.fid_score does
        np.testing.assert_array_equal(held["mu"][:], statistics.mean)
        np.testing.assert_array_equal(held["sigma"][:], statistics.covariance)


def test_load_statistics_of_pytorch_fid_has_no_count_and_no_network(tmp_path: Path) -> None:
    path = tmp_path / "theirs.npz"
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.eye(3))
    loaded = load_statistics(path)
    assert (loaded.count, loaded.network) == (None, None)
    save_statistics(path, loaded)
    assert load_statistics(path).count is None


def test_statistics_of_invalid_files_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the statistics .*none.npz"):
        load_statistics(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="cannot read the statistics"):
        load_statistics(path)
    for content in (b"PK garbage", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"statistics .*bad.npz: it is no whole .npz file$"):
            load_statistics(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match="it is one array, not an archive"):
        load_statistics(tmp_path / "one.npy")
    np.savez(path, mu=np.array(["a"]), sigma=np.eye(1))
    with pytest.raises(DataError, match="cannot read the statistics"):
        load_statistics(path)
    np.savez(path, images=np.zeros(3))
    with pytest.raises(DataError, match="holds images where statistics"):
        load_statistics(path)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(DataError, match="its array 'mu' holds Python objects, which are never"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(DataError, match="NaN"):
        load_statistics(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_statistics(
            tmp_path / "file" / "x.npz", Moments.from_features(drawn(9)).to_statistics()
        )
