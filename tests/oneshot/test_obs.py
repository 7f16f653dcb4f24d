"""OBS of one matrix against every mask tried by hand, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.oneshot import obs
from sparsedm_compiler.oneshot.obs import IndefiniteError, factorize_inverse, prune_matrix, refit
from sparsedm_compiler.oneshot.removals import remove_cheapest
from sparsedm_compiler.patterns import Pattern
from tests.oneshot.cases import (
    PATTERNS,
    find_best,
    iterate_masks,
    make_hessian,
    make_weight,
    measure,
    solve,
)
from tests.patterns.tile_pattern import TileTopN

EXACT = ("2:4", "1:4", "3:4", "1:8", "2:4x2", "1:8x4", "2:2:8", "2:4t", "1:4t", "1:2@4x4")


@pytest.mark.parametrize("text", EXACT)
@pytest.mark.parametrize("seed", range(3))
def test_prune_matrix_of_one_group_then_no_legal_mask_has_a_smaller_error(
    text: str, seed: int
) -> None:
    pattern = Pattern.parse(text)
    weight = make_weight(text, groups=1, seed=seed)
    hessian = make_hessian(pattern.width, seed=seed)
    pruned = prune_matrix(weight, hessian, pattern)
    best = find_best(weight, hessian, pattern)
    assert measure(pruned - weight, hessian) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("text", PATTERNS)
def test_prune_matrix_then_the_pattern_holds_and_kept_weights_are_the_best(text: str) -> None:
    pattern = Pattern.parse(text)
    weight, hessian = make_weight(text, groups=3), make_hessian(3 * pattern.width)
    pruned = prune_matrix(weight, hessian, pattern)
    mask = pattern.compute_mask(pruned)
    assert float(mask.double().mean()) == float(pattern.density)
    assert torch.equal(pruned * mask, pruned)
    best = solve(weight, hessian, mask)
    assert measure(pruned - weight, hessian) <= measure(best - weight, hessian) * (1 + 1e-3)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PATTERNS), st.integers(0, 10_000), st.floats(-6, 3))
@example("1:8", 1, 0.0)  # where group after group ends above them
def test_prune_matrix_then_its_error_is_not_above_that_of_magnitudes(
    text: str, seed: int, exponent: float
) -> None:
    pattern = Pattern.parse(text)
    weight = make_weight(text, seed=seed)
    hessian = make_hessian(2 * pattern.width, seed=seed) * 10.0**exponent
    pruned = prune_matrix(weight, hessian, pattern)
    plain = weight * pattern.compute_mask(weight)
    assert torch.equal(pruned, pruned * pattern.compute_mask(pruned))
    if text not in ("1:2@4x8+2:4",):  # whose blocks are chosen before what lies within them
        assert measure(pruned - weight, hessian) <= measure(plain - weight, hessian)


@pytest.mark.parametrize("text", ["2:4", "1:8", "2:2:8", "2:4x2"])
def test_remove_cheapest_one_by_one_then_it_is_near_the_exact_choice(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = Pattern.parse(text)
    weight = make_weight(text, groups=1)
    inverse = torch.linalg.inv(make_hessian(pattern.width))
    exact = remove_cheapest(pattern, weight, inverse)
    monkeypatch.setattr("sparsedm_compiler.oneshot.removals.MOST_REMOVALS", 0)
    greedy = remove_cheapest(pattern, weight, inverse)
    assert torch.equal(greedy.pruned.sum(1), exact.pruned.sum(1))

    def cost(pull: Tensor) -> float:
        return float((pull * weight).sum())

    assert cost(exact.pull) <= cost(greedy.pull) * (1 + 1e-9) <= 2 * cost(exact.pull)


def test_remove_cheapest_in_chunks_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, weight = Pattern.parse("2:4x2"), torch.randn(12, 4, dtype=torch.float64)
    inverse = torch.linalg.inv(make_hessian(4))
    whole = remove_cheapest(pattern, weight, inverse)
    monkeypatch.setattr("sparsedm_compiler.oneshot.removals.CHUNK", 1)
    parts = remove_cheapest(pattern, weight, inverse)
    assert torch.equal(whole.pruned, parts.pruned)
    torch.testing.assert_close(whole.pull, parts.pull)


def test_factorize_inverse_then_its_corners_are_those_of_the_last_columns() -> None:
    hessian = make_hessian(6)
    factor = factorize_inverse(hessian)
    assert torch.equal(factor, factor.triu())
    for first in range(6):
        corner = factor[first:, first:]
        inverse = torch.linalg.inv(hessian[first:, first:])
        torch.testing.assert_close(corner.T @ corner, inverse)
    with pytest.raises(IndefiniteError):
        factorize_inverse(hessian - 2 * torch.trace(hessian) * torch.eye(6, dtype=torch.float64))


def test_prune_matrix_in_blocks_of_columns_equals_one_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, weight, hessian = Pattern.parse("2:4"), make_weight("2:4", groups=8), make_hessian(32)
    monkeypatch.setattr(obs, "REFIT_STEPS", 0)
    whole = prune_matrix(weight, hessian, pattern)
    monkeypatch.setattr(obs, "BLOCK", 8)
    torch.testing.assert_close(prune_matrix(weight, hessian, pattern), whole)


def test_refit_never_raises_an_error() -> None:
    hessian, weight = make_hessian(16), make_weight("2:4", groups=4)
    mask = Pattern.parse("2:4").compute_mask(weight)
    errors = []
    for steps in range(12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(obs, "REFIT_STEPS", steps)
            errors.append(measure(refit(weight * mask, weight, hessian, mask) - weight, hessian))
    assert errors == sorted(errors, reverse=True)
    best = measure(solve(weight, hessian, mask) - weight, hessian)
    assert errors[-1] == pytest.approx(best, rel=1e-6)
    assert errors[0] > 1.5 * errors[-1]


def test_prune_matrix_of_an_unknown_kind_takes_the_mask_of_its_scores() -> None:
    pattern, weight = TileTopN(1, 4), make_weight("1:4t", groups=2)
    size = torch.linspace(0.1, 3, 8, dtype=torch.float64)  # of the inputs: magnitudes mislead
    hessian = make_hessian(8) * size * size[:, None]
    pruned = prune_matrix(weight, hessian, pattern)
    mask = pattern.compute_mask(weight / torch.linalg.inv(hessian).diagonal().sqrt())
    assert not torch.equal(mask, pattern.compute_mask(weight))
    torch.testing.assert_close(pruned, solve(weight, hessian, mask), rtol=1e-3, atol=1e-4)


def test_iterate_masks_lists_90_tiles() -> None:
    assert sum(1 for _ in iterate_masks(Pattern.parse("2:4t"))) == 90
