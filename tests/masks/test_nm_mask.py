"""``nm_mask`` against brute force: exactly n per group, the largest, ties to the lowest index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsedm_compiler.errors import MaskError, PatternError
from sparsedm_compiler.masks.nm_mask import apply_inverse_mask, apply_mask, compute_mask, nm_mask
from sparsedm_compiler.patterns import VNM, Pattern
from sparsedm_compiler.selection import top_n as selection
from tests.masks.mask_cases import (
    DTYPES,
    LAYOUTS,
    block_cases,
    channels_last,
    per_row_cases,
    shared_cases,
    transposable_cases,
)
from tests.oracle import brute_mask

properties = settings(deadline=None, max_examples=120)
any_cases = st.one_of(per_row_cases(), shared_cases(), block_cases(), transposable_cases())


def groups_of(tensor: Tensor, m: int) -> Tensor:
    """[..., m]: one row per group."""
    return tensor.movedim(1, -1).reshape(-1, m)


@properties
@given(any_cases)
def test_nm_mask_equals_the_brute_force_mask(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, brute_mask(weight, pattern))


@properties
@given(any_cases)
def test_nm_mask_keeps_exactly_n_of_every_group(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    counts = groups_of(nm_mask(weight, pattern), pattern.width).sum(1)
    assert bool((counts == int(pattern.width * pattern.density)).all())


@properties
@given(per_row_cases())
def test_nm_mask_keeps_the_largest_and_the_lowest_index_of_ties(
    case: tuple[Tensor, Pattern],
) -> None:
    weight, pattern = case
    mask = groups_of(nm_mask(weight, pattern), pattern.m)
    scores = groups_of(weight.abs().double(), pattern.m)
    least = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    assert bool((scores.masked_fill(mask, -1) <= least).all())
    level = scores == least
    first_dropped = torch.where(level & ~mask, torch.arange(pattern.m), pattern.m).amin(1)
    last_kept = torch.where(level & mask, torch.arange(pattern.m), -1).amax(1)
    assert bool((last_kept < first_dropped).all())


@properties
@given(st.one_of(per_row_cases(), block_cases(), transposable_cases()))
def test_nm_mask_of_a_masked_weight_changes_nothing(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    once = apply_mask(weight, nm_mask(weight, pattern))
    assert torch.equal(apply_mask(once, nm_mask(once, pattern)), once)


@properties
@given(any_cases)
def test_nm_mask_is_the_same_for_every_dtype_and_layout(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight.double().contiguous(), pattern)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            assert torch.equal(nm_mask(layout(weight.to(dtype)), pattern), mask)


@properties
@given(shared_cases())
def test_nm_mask_of_shared_rows_shares_columns(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern).unflatten(0, (-1, pattern.height))
    if isinstance(pattern, VNM):
        used = groups_of(mask.any(1), pattern.m).sum(1)
        assert bool((used <= 4).all())
    else:
        assert bool((mask == mask[:, :1]).all())


def test_nm_mask_sums_column_energy_in_float32() -> None:
    """257 against 256 is a tie in bfloat16, 400^2 against 300^2 one of infinities in float16."""
    close = torch.tensor([[16.0, 16.0], [0.0, 1.0]], dtype=torch.bfloat16)
    large = torch.tensor([[300.0, 400.0], [0.0, 0.0]], dtype=torch.float16)
    for weight in (close, large):
        assert nm_mask(weight, "1:2x2").tolist() == [[False, True], [False, True]]


BLOCKS = ["1:2@4x4", "3:4@1x2", "1:2@3x8+2:4", "1:4@4x3", "2:4@2x6+1:3"]
SIZES = ["31:32", "3:4", "2:4", "1:2", "2:8", "1:8", "1:16", "1:32", "16:32", "8:64", "3:5", "2:24"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even a small weight into many parts, the last one smaller."""
    monkeypatch.setattr(selection, "_CALL_ELEMENTS", 8)
    monkeypatch.setattr(selection, "_PART_BYTES", 64)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("text", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nm_mask_of_a_weight_in_many_parts_equals_brute_force(
    text: str, dtype: torch.dtype
) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = torch.randn(37, 3 * pattern.m, 1, 2).to(dtype)
    for view in (weight[..., 0], weight, channels_last(weight)):
        assert torch.equal(nm_mask(view, pattern), brute_mask(view, pattern))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("text", ["8:2:8", "3:4:6", "5:1:32"])
def test_nm_mask_of_shared_rows_in_many_parts_equals_brute_force(text: str) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = torch.randint(-9, 10, (7 * pattern.height, 3 * pattern.m)).float()
    assert torch.equal(nm_mask(weight, pattern), brute_mask(weight, pattern))


@pytest.mark.parametrize("text", ["2:4", "1:8", "16:32"])
def test_nm_mask_of_a_weight_larger_than_the_cache_equals_brute_force(text: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2100, 1024)
    assert torch.equal(nm_mask(weight, text), brute_mask(weight, text))


@pytest.mark.parametrize(
    "text",
    [
        *("2:4", "1:4", "3:4", "1:8", "7:8", "16:32", "31:32", "2:4x2", "2:2:8", "1:4t", "2:4t"),
        *("3:4t", "1:2@4x4", "3:4@1x2", "1:2@8x8+2:4", "2:2@4x8+1:4"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_mask_of_nan_and_inf_keeps_exactly_n(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=dtype)
    weight[torch.rand(64, 64) < 0.3] = torch.nan
    weight[torch.rand(64, 64) < 0.3] = -torch.inf
    mask = compute_mask(weight, pattern)
    counts = groups_of(mask, pattern.width).sum(1)
    assert bool((counts == int(pattern.width * pattern.density)).all())
    assert torch.equal(compute_mask(weight.clone(), pattern), mask)


@pytest.mark.parametrize(
    "text", ["2:4", "5:8", "1:32", "31:32", "16:32", "3:5", "3:2:8", "1:8x4", *BLOCKS]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_mask_on_the_path_of_accelerators_gives_the_same(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula runs on any device; the weight's device decides whether it is used."""
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = (torch.randn(12, 2 * pattern.width, 3) * 2).round().to(dtype)
    expected = compute_mask(weight, pattern)

    def at_once(part: Tensor, mask: Tensor, columns: Tensor | None, *rest: object) -> None:
        selection._fill_mask_at_once(part, mask, columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(selection, "_fill_mask", at_once)
    monkeypatch.setattr(selection, "_is_channels_last", lambda tensor: False)
    assert torch.equal(compute_mask(weight, pattern), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", [*SIZES, "1:8x16", "64:2:8", "1:4t", "2:4t", "3:4t", *BLOCKS])
def test_nm_mask_on_a_gpu_gives_the_same(text: str) -> None:
    pattern = Pattern.parse(text)
    for dtype in DTYPES:
        weight = (torch.randn(192, 4 * pattern.width, 3, 3) * 4).round().to(dtype)
        assert torch.equal(nm_mask(weight.cuda(), pattern).cpu(), nm_mask(weight, pattern))


@pytest.mark.parametrize("text", ["2:4", "1:8x2", "2:2:8", "2:4t", "1:2@2x4", "1:2@2x4+2:4"])
def test_nm_mask_of_meta_and_fake_tensors_has_their_shape(text: str) -> None:
    on_meta = nm_mask(torch.empty(4, 8, 3, 3, device="meta"), text)
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == ((4, 8, 3, 3), torch.bool, True)
    with FakeTensorMode():
        fake = nm_mask(torch.empty(4, 8), text)
    assert (fake.shape, fake.dtype) == ((4, 8), torch.bool)


def test_nm_mask_of_an_empty_weight_is_empty() -> None:
    for text in ("2:4", "2:4t", "1:2@2x4", "1:2@2x4+2:4"):
        assert nm_mask(torch.empty(0, 8), text).shape == (0, 8)
        assert nm_mask(torch.empty(8, 0), text).shape == (8, 0)


def test_nm_mask_of_a_parameter_requires_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    before = weight.detach().clone()
    assert not nm_mask(weight, "2:4").requires_grad
    assert torch.equal(weight, before)


@properties
@given(per_row_cases())
def test_apply_mask_and_apply_inverse_mask_add_up_to_the_weight(
    case: tuple[Tensor, Pattern],
) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern)
    zero = torch.zeros((), dtype=weight.dtype)
    assert torch.equal(apply_mask(weight, mask), torch.where(mask, weight, zero))
    assert torch.equal(apply_inverse_mask(weight, mask), torch.where(mask, zero, weight))


def test_apply_mask_gives_zero_for_pruned_nan_and_inf() -> None:
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])
    mask = torch.tensor([[False, False, True, True]])
    assert apply_mask(weight, mask).tolist() == [[0.0, 0.0, -torch.inf, 1.0]]
    assert apply_inverse_mask(weight, ~mask).tolist() == [[0.0, 0.0, -torch.inf, 1.0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_mask_of_nan_or_inf_raises_with_name_and_position(
    value: float, dtype: torch.dtype
) -> None:
    weight = torch.ones(4, 8, 3, 3, dtype=dtype)
    weight[2, 5, 0, 1] = value
    with pytest.raises(MaskError, match=r"'mid\.conv\.weight' holds 1 NaN or Inf.*\[2, 5, 0, 1\]"):
        nm_mask(weight, "2:4", name="mid.conv.weight")
    with pytest.raises(MaskError, match="the weight holds"):
        nm_mask(weight, "2:4")


def test_nm_mask_of_large_finite_weights_does_not_raise() -> None:
    huge = torch.full((64, 64), 60000.0, dtype=torch.float16)
    assert int(nm_mask(huge, "2:4").sum()) == 64 * 32
    assert int(nm_mask(torch.full((64, 64), 3e38), "2:4").sum()) == 64 * 32


@pytest.mark.parametrize(
    ("shape", "text", "why"),
    [
        ((8, 6), "2:4", "input width 6 is not a multiple of 4"),
        ((8, 3, 4, 4), "2:4", "input width 3 is not a multiple of 4"),
        ((24, 8), "1:8x16", "output width 24 is not a multiple of the 16"),
        ((32, 8), "64:2:8", "output width 32 is not a multiple of the 64"),
        ((6, 8), "2:4t", "output width 6 is not a multiple of 4"),
        ((8, 6), "2:4t", "input width 6 is not a multiple of 4"),
        ((8, 24), "1:2@4x8", "input width 24 is not a multiple of the 16 columns of 2 blocks"),
        ((6, 16), "1:2@4x8", "output width 6 is not a multiple of the 4 rows of a block"),
    ],
)
def test_nm_mask_raises_with_the_reason_where_the_pattern_does_not_fit(
    shape: tuple[int, ...], text: str, why: str
) -> None:
    with pytest.raises(PatternError, match=rf"'{text}' does not fit parameter 'fc'.*{why}"):
        nm_mask(torch.randn(shape), text, name="fc")


@pytest.mark.parametrize(
    "weight",
    [torch.ones(8), torch.ones(4, 8, dtype=torch.int32), torch.ones(4, 8, dtype=torch.complex64)],
)
def test_nm_mask_raises_for_other_dtypes_and_dimensions(weight: Tensor) -> None:
    with pytest.raises(MaskError, match=r"the weight is torch\.\w+ of shape"):
        nm_mask(weight, "2:4")
