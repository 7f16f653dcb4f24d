"""``nm_mask`` against brute force: exactly n per group, the largest, ties to the lowest index."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsedm_compiler import selection
from sparsedm_compiler.errors import MaskError, PatternError
from sparsedm_compiler.masks import dropped, kept, nm_mask, unchecked_nm_mask
from sparsedm_compiler.pattern import Pattern
from tests.oracle import brute_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNELS = ((), (3,), (1, 1), (2, 3), (2, 1, 2))
properties = settings(deadline=None, max_examples=120)


def brute(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask, one group after the other, in plain Python."""
    scores = weight.detach().double().abs().movedim(1, -1)
    rows = scores.reshape(len(scores), -1, scores.shape[-1])  # [out, positions, in]
    marks = torch.zeros(rows.shape, dtype=torch.bool)
    for first in range(0, rows.shape[0], pattern.rows):
        block = range(first, first + pattern.rows)
        for place in range(rows.shape[1]):
            for start in range(0, rows.shape[2], pattern.m):
                group = range(start, start + pattern.m)
                energy = {i: sum(float(rows[row, place, i]) ** 2 for row in block) for i in group}
                shared = largest(energy, 4 if pattern.vnm else pattern.n)
                for row in block:
                    own = {i: float(rows[row, place, i]) for i in shared}
                    chosen = largest(own, pattern.n) if pattern.vnm else shared
                    marks[row, place, chosen] = True
    return marks.reshape(scores.shape).movedim(-1, 1)


def largest(scores: dict[int, float], n: int) -> list[int]:
    """The n places of largest score, the lowest place first among equal ones."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:n])


def contiguous(weight: Tensor) -> Tensor:
    return weight


def channels_last(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_strides(weight: Tensor) -> Tensor:
    order = list(range(weight.dim()))[::-1]
    return weight.permute(order).contiguous().permute(order)


def every_other(weight: Tensor) -> Tensor:
    return weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    contiguous,
    channels_last,
    reversed_strides,
    every_other,
)


@st.composite
def sizes(draw: st.DrawFn, largest: int = 32) -> Pattern:
    """Any 0 < n <= m, free rows."""
    m = draw(st.integers(1, largest))
    return Pattern(draw(st.integers(1, m)), m)


@st.composite
def weights(draw: st.DrawFn, pattern: Pattern) -> Tensor:
    """Small integers (so half of all groups tie, and every dtype holds them), in any layout."""
    kernel = draw(st.sampled_from(KERNELS))
    blocks, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (blocks * pattern.rows, groups * pattern.m, *kernel)
    top = draw(st.sampled_from([1, 3, 100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-top, top + 1, shape, generator=generator)
    layout = draw(st.sampled_from(LAYOUTS))
    return layout(values.to(draw(st.sampled_from(DTYPES))))


@st.composite
def free_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(sizes())
    return draw(weights(pattern)), pattern


@st.composite
def coarse_cases(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    rows = draw(st.integers(2, 5))
    if draw(st.booleans()):
        pattern = Pattern(draw(st.integers(1, 4)), draw(st.integers(4, 16)), rows, vnm=True)
    else:
        free = draw(sizes(16))
        pattern = Pattern(free.n, free.m, rows)
    return draw(weights(pattern)), pattern


def groups_of(tensor: Tensor, m: int) -> Tensor:
    """[..., m]: one row per group."""
    return tensor.movedim(1, -1).reshape(-1, m)


@properties
@given(st.one_of(free_cases(), coarse_cases()))
def test_it_is_the_brute_force_mask(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, brute(weight, pattern))


@properties
@given(st.one_of(free_cases(), coarse_cases()))
def test_every_group_keeps_exactly_n(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    counts = groups_of(nm_mask(weight, pattern), pattern.m).sum(1)
    assert bool((counts == pattern.n).all())


@properties
@given(free_cases())
def test_the_kept_are_the_largest_and_ties_go_to_the_lowest(case: tuple[Tensor, Pattern]) -> None:
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
@given(free_cases())
def test_masking_the_masked_changes_nothing(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    once = kept(weight, nm_mask(weight, pattern))
    assert torch.equal(kept(once, nm_mask(once, pattern)), once)


@properties
@given(st.one_of(free_cases(), coarse_cases()))
def test_dtype_and_layout_do_not_matter(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight.double().contiguous(), pattern)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            assert torch.equal(nm_mask(layout(weight.to(dtype)), pattern), mask)


@properties
@given(coarse_cases())
def test_the_rows_of_a_block_share_columns(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern).unflatten(0, (-1, pattern.rows))
    if pattern.vnm:
        used = groups_of(mask.any(1), pattern.m).sum(1)
        assert bool((used <= 4).all())
    else:
        assert bool((mask == mask[:, :1]).all())


BIG = ["31:32", "3:4", "2:4", "1:2", "2:8", "1:8", "1:16", "1:32", "16:32", "8:64", "3:5", "2:24"]


@pytest.mark.parametrize("text", BIG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_larger_than_one_part(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = torch.randn(700, 500 // pattern.m * pattern.m).to(dtype)
    for view in (weight, channels_last(weight[:, :, None, None].expand(-1, -1, 1, 2))):
        assert torch.equal(nm_mask(view, pattern), brute_mask(view, pattern))


def test_blocks_of_rows_larger_than_one_part() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64 * 12, 8 * 100)
    columns = brute_mask(weight.square().unflatten(0, (-1, 64)).sum(1), "4:8")
    allowed = columns.repeat_interleave(64, 0)
    barred = torch.where(allowed, weight.abs() + 1, 0.0)
    assert torch.equal(nm_mask(weight, "64:2:8"), brute_mask(barred, "2:8"))


@pytest.mark.parametrize(
    "text", ["2:4", "1:4", "3:4", "1:8", "7:8", "16:32", "31:32", "2:4x2", "2:2:8"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_weights_still_keep_exactly_n(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=dtype)
    weight[torch.rand(64, 64) < 0.3] = torch.nan
    weight[torch.rand(64, 64) < 0.3] = -torch.inf
    mask = unchecked_nm_mask(weight, pattern)
    assert bool((groups_of(mask, pattern.m).sum(1) == pattern.n).all())
    assert torch.equal(unchecked_nm_mask(weight.clone(), pattern), mask)


@pytest.mark.parametrize("text", ["2:4", "5:8", "1:32", "31:32", "16:32", "3:5", "3:2:8", "1:8x4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_way_of_accelerators_gives_the_same(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its formula runs on any device; which one is asked is decided by the weight's device."""
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    weight = (torch.randn(12, 2 * pattern.m, 3) * 2).round().to(dtype)
    expected = unchecked_nm_mask(weight, pattern)

    def at_once(part: Tensor, mask: Tensor, columns: Tensor | None, *rest: object) -> None:
        selection._fill_at_once(part, mask, columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(selection, "_fill", at_once)
    monkeypatch.setattr(selection, "_channels_last", lambda tensor: False)
    assert torch.equal(unchecked_nm_mask(weight, pattern), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", [*BIG, "1:8x16", "64:2:8"])
def test_a_gpu_gives_the_same(text: str) -> None:
    pattern = Pattern.parse(text)
    for dtype in DTYPES:
        weight = (torch.randn(128, 4 * pattern.m, 3, 3) * 4).round().to(dtype)
        assert torch.equal(nm_mask(weight.cuda(), pattern).cpu(), nm_mask(weight, pattern))


@pytest.mark.parametrize("text", ["2:4", "1:8x2", "2:2:8"])
def test_meta_and_fake_tensors_give_the_shape(text: str) -> None:
    on_meta = nm_mask(torch.empty(4, 8, 3, 3, device="meta"), text)
    assert (on_meta.shape, on_meta.dtype, on_meta.is_meta) == ((4, 8, 3, 3), torch.bool, True)
    with FakeTensorMode():
        fake = nm_mask(torch.empty(4, 8), text)
    assert (fake.shape, fake.dtype) == ((4, 8), torch.bool)


def test_an_empty_weight_has_an_empty_mask() -> None:
    assert nm_mask(torch.empty(0, 8), "2:4").shape == (0, 8)


def test_the_mask_of_a_parameter_is_no_part_of_its_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 8))
    before = weight.detach().clone()
    assert not nm_mask(weight, "2:4").requires_grad
    assert torch.equal(weight, before)


@properties
@given(free_cases())
def test_kept_and_dropped_make_up_the_weight(case: tuple[Tensor, Pattern]) -> None:
    weight, pattern = case
    mask = nm_mask(weight, pattern)
    zero = torch.zeros((), dtype=weight.dtype)
    assert torch.equal(kept(weight, mask), torch.where(mask, weight, zero))
    assert torch.equal(dropped(weight, mask), torch.where(mask, zero, weight))


def test_what_is_masked_out_is_zero_even_if_it_was_infinite() -> None:
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])
    mask = torch.tensor([[False, False, True, True]])
    assert kept(weight, mask).tolist() == [[0.0, 0.0, -torch.inf, 1.0]]
    assert dropped(weight, ~mask).tolist() == [[0.0, 0.0, -torch.inf, 1.0]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_weight_is_named_and_located(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 8, 3, 3, dtype=dtype)
    weight[2, 5, 0, 1] = value
    with pytest.raises(MaskError, match=r"'mid\.conv\.weight' holds 1 NaN or Inf.*\[2, 5, 0, 1\]"):
        nm_mask(weight, "2:4", name="mid.conv.weight")
    with pytest.raises(MaskError, match="the weight holds"):
        nm_mask(weight, "2:4")


def test_large_but_finite_weights_are_fine() -> None:
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
    ],
)
def test_a_pattern_that_does_not_fit_says_why(shape: tuple[int, ...], text: str, why: str) -> None:
    with pytest.raises(PatternError, match=rf"'{text}' does not fit parameter 'fc'.*{why}"):
        nm_mask(torch.randn(shape), text, name="fc")


@pytest.mark.parametrize(
    "weight",
    [torch.ones(8), torch.ones(4, 8, dtype=torch.int32), torch.ones(4, 8, dtype=torch.complex64)],
)
def test_what_is_no_weight_is_refused(weight: Tensor) -> None:
    with pytest.raises(MaskError, match=r"the weight is torch\.\w+ of shape"):
        nm_mask(weight, "2:4")
