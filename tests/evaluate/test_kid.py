"""The kernel distance against a loop over pairs, and its statistics against their meaning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsedm_compiler.diffusion import generator_at
from sparsedm_compiler.errors import ConfigError, DataError
from sparsedm_compiler.evaluate import kernel_distance


def drawn(name: str, count: int, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=generator_at(name))


def by_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate of Gretton et al. 2012, pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    m = len(a)
    pairs = [(i, j) for i in range(m) for j in range(m)]
    apart = [(i, j) for i, j in pairs if i != j]
    within = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in apart) / (m * (m - 1))
    return within - 2 * sum(k(a[i], b[j]) for i, j in pairs) / m**2


def test_kernel_distance_of_whole_sets_equals_the_estimate_over_all_pairs() -> None:
    a, b = drawn("a", 9), drawn("b", 9) + 0.5
    mean, spread = kernel_distance(a, b, subsets=3)
    assert mean == pytest.approx(by_pairs(a.double().numpy(), b.double().numpy()), rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-12)


def test_kernel_distance_draws_subsets_by_seed_and_limits_their_size() -> None:
    a, b = drawn("a", 30), drawn("b", 12) + 0.5
    expected = []
    for subset in range(5):
        sides = []
        for side, features in (("ours", a), ("theirs", b)):
            order = torch.randperm(len(features), generator=generator_at(3, "KID", subset, side))
            sides.append(features[order[:10]].double().numpy())
        expected.append(by_pairs(*sides))
    distance = kernel_distance(a, b, subsets=5, size=10, seed=3)
    assert distance == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)
    assert distance != kernel_distance(a, b, subsets=5, size=10, seed=4)
    assert kernel_distance(a, b, subsets=5, size=12) == kernel_distance(a, b, subsets=5)


def test_kernel_distance_of_equal_distributions_is_near_zero() -> None:
    a = drawn("a", 400)
    mean, spread = kernel_distance(a[:200], a[200:], size=100)
    assert abs(mean) < 2 * spread
    assert kernel_distance(a[:200], a[200:] + 1, size=100)[0] > 1


def test_kernel_distance_of_invalid_input_raises() -> None:
    a = drawn("a", 5)
    for wrong in (drawn("b", 5, 3), a[:1], a[0], a * torch.nan):
        with pytest.raises(DataError):
            kernel_distance(a, wrong)
    for options in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(ConfigError, match="give at least 1 subset of at least 2"):
            kernel_distance(a, a, **options)
