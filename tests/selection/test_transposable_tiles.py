"""Transposable masks: n in every row and column of every 4x4 tile, and the best of those."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.masks.nm_mask import apply_mask, compute_mask, nm_mask
from sparsedm_compiler.patterns import Pattern
from sparsedm_compiler.selection import transposable_tiles as tiles
from tests.masks.mask_cases import DTYPES, KERNELS, channels_last
from tests.oracle import brute_mask, list_legal_tiles

properties = settings(deadline=None, max_examples=60)
every_n = pytest.mark.parametrize("n", [1, 2, 3])
COUNTS = {1: 24, 2: 90, 3: 24}


def masks_of(n: int) -> Tensor:
    """All legal masks of a tile, [24 or 90, 16], by looking at all of the 65536."""
    bits = (torch.arange(1 << 16).unsqueeze(1) >> torch.arange(16)) & 1
    grid = bits.view(-1, 4, 4)
    return bits[(grid.sum(1) == n).all(1) & (grid.sum(2) == n).all(1)].bool()


def cut(tensor: Tensor) -> Tensor:
    """[tiles, 4, 4]"""
    grid = tensor.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
    return grid.movedim((1, 3), (-2, -1)).reshape(-1, 4, 4)


@st.composite
def real_weights(draw: st.DrawFn) -> Tensor:
    """Normal weights of any dtype, of any scale in any tile."""
    shape = (
        4 * draw(st.integers(1, 4)),
        4 * draw(st.integers(1, 4)),
        *draw(st.sampled_from(KERNELS)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (weight * 2.0 ** draw(st.integers(-5, 5))).to(draw(st.sampled_from(DTYPES)))


ns = st.integers(1, 3)


@every_n
def test_plan_holds_all_legal_masks(n: int) -> None:
    expected = {tuple(mask) for mask in masks_of(n).int().tolist()}
    device = torch.device("cpu")
    masks = [tuple(mask) for mask in tiles.build_plan(n, device).masks.int().tolist()]
    assert {*masks} == expected
    assert len(expected) == COUNTS[n] == len(list_legal_tiles(n))


@properties
@given(real_weights(), ns)
def test_transposable_mask_keeps_exactly_n_of_rows_and_columns(weight: Tensor, n: int) -> None:
    mask = cut(nm_mask(weight, f"{n}:4t"))
    assert bool((mask.sum(1) == n).all())
    assert bool((mask.sum(2) == n).all())


@properties
@given(real_weights(), ns)
def test_transposable_mask_keeps_as_much_as_any_legal_mask(weight: Tensor, n: int) -> None:
    """To the units that magnitudes are counted in: 12 roundings of 2^-26 of the largest."""
    scores = cut(weight).double().abs().flatten(1)
    ours = (scores * cut(nm_mask(weight, f"{n}:4t")).flatten(1)).sum(1)
    best = (scores @ masks_of(n).double().T).amax(1)
    assert bool((ours >= best - 12 * 2**-26 * scores.amax(1)).all())
    per_row = (scores * cut(nm_mask(weight, f"{n}:4")).flatten(1)).sum(1)
    assert bool((ours >= per_row / 2).all())
    assert bool((ours <= per_row).all())


@properties
@given(real_weights(), ns, st.integers(0, 2**31))
def test_random_legal_masks_keep_no_more_than_the_transposable_mask(
    weight: Tensor, n: int, seed: int
) -> None:
    scores = cut(weight).double().abs()
    ours = (scores * cut(nm_mask(weight, f"{n}:4t"))).sum((1, 2))
    legal, generator = masks_of(n).view(-1, 4, 4), torch.Generator().manual_seed(seed)
    for _ in range(20):
        theirs = legal[torch.randint(len(legal), (len(scores),), generator=generator)]
        assert bool((ours - (scores * theirs).sum((1, 2)) >= -1e-6 * ours).all())


@properties
@given(ns, st.integers(0, 2**31))
def test_transposable_mask_of_the_transposed_weight_is_transposed(n: int, seed: int) -> None:
    """Powers of 2 in each tile, so that no two sums are equal."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(6, 16, generator=generator).argsort(1)
    weight = torch.exp2(order.float()).view(2, 3, 4, 4).transpose(1, 2).reshape(8, 12)
    mask = nm_mask(weight, f"{n}:4t")
    assert torch.equal(nm_mask(weight.T, f"{n}:4t"), mask.T)
    assert torch.equal(nm_mask(weight.T.contiguous(), f"{n}:4t"), mask.T)
    assert torch.equal(nm_mask(mask.T * weight.T, f"{n}:4"), mask.T)


@properties
@given(real_weights(), ns, st.integers(-8, 8))
def test_transposable_mask_is_the_same_at_any_scale(weight: Tensor, n: int, power: int) -> None:
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    assert torch.equal(nm_mask(wide * 2.0**power, f"{n}:4t"), nm_mask(wide, f"{n}:4t"))
    assert torch.equal(nm_mask(wide.neg(), f"{n}:4t"), nm_mask(wide, f"{n}:4t"))


@properties
@given(ns, st.integers(0, 2**31), st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_transposable_mask_of_a_masked_weight_keeps_its_non_zeros(
    n: int, seed: int, dtype: torch.dtype
) -> None:
    """A tiny weight may vanish in a rounded sum, and yet must not lose its slot to a zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-36, 37, (32, 32), generator=generator)
    values = torch.randn(32, 32, generator=generator)
    masked = apply_mask(values, nm_mask(torch.randn(32, 32, generator=generator), f"{n}:4t"))
    masked = (masked * scale).to(dtype)
    assert torch.equal(apply_mask(masked, nm_mask(masked, f"{n}:4t")), masked)


@every_n
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transposable_mask_compares_the_last_bit(n: int, dtype: torch.dtype) -> None:
    """A sum in that dtype would round the difference away."""
    tile = torch.ones(4, 4, dtype=dtype)
    tile[1, 2] += torch.finfo(dtype).eps
    assert nm_mask(tile, f"{n}:4t")[1, 2]
    tile = torch.ones(4, 4, dtype=dtype)
    tile[1, 0] -= torch.finfo(dtype).eps
    assert not nm_mask(tile, f"{n}:4t")[1, 0]


def test_transposable_mask_of_equal_sums_is_the_first() -> None:
    rows = [[c in columns for c in range(4)] for columns in ((0, 1), (0, 1), (2, 3), (2, 3))]
    assert nm_mask(torch.ones(4, 4), "2:4t").tolist() == rows
    assert nm_mask(torch.zeros(4, 4), "2:4t").tolist() == rows
    assert torch.equal(nm_mask(torch.ones(4, 4), "1:4t"), torch.eye(4).bool())


@every_n
@pytest.mark.parametrize(("power", "top"), [(124, 9), (-126, 9), (-149, 1)])
def test_transposable_mask_at_extremes_of_float32(n: int, power: int, top: int) -> None:
    """Up to 1.9e38, and denormals, which may all count the same."""
    weight = torch.randint(0, top + 1, (16, 16), generator=torch.Generator().manual_seed(0)).float()
    scaled = (weight.double() * 2.0**power).float()
    assert torch.equal(nm_mask(scaled, f"{n}:4t"), nm_mask(weight, f"{n}:4t"))


@every_n
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_transposable_mask_keeps_nan_and_inf_first(
    n: int, dtype: torch.dtype, broken: float
) -> None:
    pattern = Pattern.parse(f"{n}:4t")
    weight = torch.full((8, 8), torch.finfo(dtype).max, dtype=dtype)
    weight[:4, :4] = torch.arange(16).view(4, 4)
    weight[1, 3] = weight[5, 6] = weight[6, 5] = broken
    mask = compute_mask(weight, pattern)
    assert bool(mask[1, 3] & mask[5, 6] & mask[6, 5])
    assert bool((cut(mask).sum(1) == n).all())
    assert bool((cut(mask).sum(2) == n).all())


@every_n
@pytest.mark.parametrize("view", [lambda w: w, channels_last], ids=["plain", "channels_last"])
def test_transposable_mask_of_a_weight_in_many_parts_equals_brute_force(
    n: int, view: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_CPU_TILES", 5)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-9, 10, (36, 12, 1, 2), generator=generator).float()
    pattern = Pattern.parse(f"{n}:4t")
    expected = brute_mask(weight, pattern)
    seen = view(weight)  # type: ignore[operator]
    mask = nm_mask(seen, pattern)
    assert torch.equal(mask, expected)
    assert mask.stride() == seen.stride()
    assert torch.equal(nm_mask(weight[..., 0, 1], pattern), expected[..., 0, 1])


def test_transposable_mask_is_the_same_under_autocast_and_low_precision() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected, before = nm_mask(weight, "2:4t"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nm_mask(weight, "2:4t"), expected)
    finally:
        torch.set_float32_matmul_precision(before)
