"""The fused kernel against ``apply_mask(weight, compute_mask(weight, pattern))``, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler.masks.mask_ste import _can_fuse, mask_ste, mask_ste_op
from sparsedm_compiler.masks.nm_mask import apply_inverse_mask, apply_mask, compute_mask
from sparsedm_compiler.masks.triton_mask import (
    _launch,
    _list_lane_dims,
    explain_refusal,
    mask_by_triton,
)
from sparsedm_compiler.patterns import Pattern
from sparsedm_compiler.selection.top_n import KEYS
from sparsedm_compiler.triton_support import is_interpreted
from tests.backends.cuda.running import moved, on_cuda, on_device, run_interpreted
from tests.masks.mask_cases import (
    LAYOUTS,
    block_cases,
    channels_last,
    contiguous,
    per_row_cases,
    shared_cases,
)

# numpy, in the interpreter: an energy may be infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PER_ROW = (
    *("1:2", "2:4", "1:4", "3:4", "2:8", "1:8", "7:8", "8:16", "1:16", "1:32", "16:32", "31:32"),
    *("3:5", "7:13", "5:6", "8:64", "32:64", "60:64", "5:128", "64:128", "100:257", "4:4"),
)
JOINT = (
    *("1:8x16", "2:4x3", "2:4x128", "3:5x7", "6:8x48", "5:64x2", "4:4x2"),
    *("64:2:8", "3:4:6", "5:1:7", "2:3:16", "128:2:32", "4:4:8"),
)
BLOCKS = (
    *("1:2@8x4", "1:3@5x6", "3:4@1x2", "2:2@3x4", "1:1@4x4", "1:2@16x8", "1:8@2x16"),
    *("1:2@8x8+2:4", "1:3@5x6+1:3", "2:2@4x8+2:4", "1:4@3x12+3:4"),
)


def expected(weight: Tensor, pattern: Pattern) -> Tensor:
    return apply_mask(weight, compute_mask(weight, pattern))


def left_out(weight: Tensor, pattern: Pattern) -> Tensor:
    return apply_inverse_mask(weight, compute_mask(weight, pattern))


def check(weight: Tensor, pattern: Pattern, *, inverses: Sequence[bool] = (False, True)) -> None:
    """The same bits and strides; the oracle runs on the CPU."""
    for inverse in inverses:
        oracle = (left_out if inverse else expected)(weight, pattern)
        masked = mask_by_triton(moved(weight), pattern, inverse=inverse)
        assert (masked.dtype, masked.shape) == (oracle.dtype, oracle.shape)
        assert masked.stride() == oracle.stride()
        assert torch.equal(bits(masked.cpu()), bits(oracle))


def bits(tensor: Tensor) -> Tensor:
    """As integers: NaN equals itself, and -0.0 not 0.0."""
    return tensor.view(KEYS[tensor.dtype])


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers: half of all groups tie, and energies are exact in any order."""
    torch.manual_seed(sum(shape))
    return torch.randint(-6, 7, shape).to(dtype)


def test_in_the_interpreter() -> None:
    assert run_interpreted(__file__) > 100


@on_device
@settings(deadline=None, max_examples=40 if is_interpreted() else 80)
@given(st.one_of(per_row_cases(), shared_cases(), block_cases()), st.sampled_from(DTYPES))
def test_mask_by_triton_of_any_pattern_and_layout(
    case: tuple[Tensor, Pattern], dtype: torch.dtype
) -> None:
    weight, pattern = case
    view = torch.empty_strided(weight.shape, weight.stride(), dtype=dtype).copy_(weight)
    check(view, pattern)


@on_device
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (text, dtype)
        for i, text in enumerate([*PER_ROW, *JOINT, *BLOCKS])
        for dtype in (torch.float32, DTYPES[i % 2])  # by turns float16 and bfloat16
        if not is_interpreted() or (dtype is torch.float32) == (i % 3 == 0)  # which is slow
    ],
    ids=str,
)
def test_mask_by_triton_of_any_shape_and_strides(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    blocks = 1 if pattern.width * pattern.height > 100 else 3
    weight = integers((blocks * pattern.height, 2 * pattern.width, 2, 3), dtype)
    for layout in LAYOUTS:
        check(layout(weight), pattern)
        # what is left out is stored as what is kept; so for a view, other tests leave out
        check(layout(weight[..., 1, 2]), pattern, inverses=(False,))


@on_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 24), (12, 24, 5), (12, 24, 2, 1, 3)], ids=str)
def test_mask_by_triton_of_any_number_of_dimensions(shape: tuple[int, ...], layout: object) -> None:
    for text in ("2:8", "1:4x3", "6:2:8", "1:2@3x4", "1:2@3x4+2:4"):
        check(layout(integers(shape, torch.float32)), Pattern.parse(text))  # type: ignore[operator]


@on_device
@pytest.mark.parametrize("text", ["2:4", "1:8", "3:5x2", "16:2:8", "1:2@8x4", "1:2@4x8+2:4"])
def test_mask_by_triton_in_many_programs_with_a_partial_last_one(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = integers((16 * 7, 5 * pattern.width * 7), torch.bfloat16)
    check(weight, pattern)
    check(weight[:, : 4 * pattern.width], pattern)


@on_device
@pytest.mark.parametrize(
    "text",
    [
        "2:4",
        "1:4",
        "3:4",
        "7:8",
        "16:32",
        "2:4x2",
        "2:2:8",
        "1:2@2x2",
        "1:2@2x8+2:4",
        "2:2@1x8+1:8",
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_by_triton_of_nan_and_inf_keeps_exactly_n(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf, -0.0):
        weight[torch.rand(32, 64) < 0.2] = value
    check(weight, Pattern.parse(text))


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_by_triton_compares_the_last_bit_of_a_magnitude(dtype: torch.dtype) -> None:
    """Groups of neighbouring numbers, denormals among them, in a random order."""
    torch.manual_seed(0)
    first = torch.randint(0, 2**15 - 16, (40, 1)) << 8 * (dtype.itemsize - 2)
    whole = first + torch.stack([torch.randperm(8) for _ in range(40)])
    whole[::2] -= 1 << 8 * dtype.itemsize - 1  # the sign
    weight = whole.to(KEYS[dtype]).view(dtype)
    for text in ("1:8", "5:8", "2:4"):
        check(weight, Pattern.parse(text))


@on_device
def test_mask_by_triton_sums_energies_in_float32() -> None:
    """257 against 256 is a tie in bfloat16, 400^2 against 300^2 one of infinities in float16."""
    close = torch.tensor([[16.0, 16.0], [0.0, 1.0]], dtype=torch.bfloat16)
    large = torch.tensor([[300.0, 400.0], [0.0, 0.0]], dtype=torch.float16)
    for weight in (close, large):
        check(weight, Pattern.parse("1:2x2"))
        assert mask_by_triton(moved(weight), Pattern.parse("1:2x2"))[:, 0].count_nonzero() == 0


@on_device
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (4, 8, 0, 3)], ids=str)
def test_mask_by_triton_of_an_empty_weight(shape: tuple[int, ...]) -> None:
    check(torch.empty(shape), Pattern.parse("2:4"))


@on_device
@pytest.mark.parametrize("text", ["2:4", "1:4x3", "6:2:8", "1:2@3x4", "1:2@3x4+2:4"])
def test_mask_by_triton_with_64_bit_offsets_gives_the_same(text: str) -> None:
    pattern = Pattern.parse(text)
    for layout in LAYOUTS:
        weight = moved(layout(integers((12, 24, 2, 3), torch.float16)))
        out = torch.empty_like(weight)
        _launch(weight, out, pattern, wide=True)
        assert torch.equal(out, mask_by_triton(weight, pattern))


@on_device
def test_mask_by_triton_leaves_the_weight_and_requires_no_gradient() -> None:
    weight = moved(integers((8, 16), torch.float32)).requires_grad_()
    before = weight.detach().clone()
    assert not mask_by_triton(weight, Pattern.parse("2:4")).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("text", "layout", "sizes"),
    [
        ("2:4", contiguous, [192 * 16 * 9 // 4 // 9, 9]),
        ("2:4", channels_last, [192 * 16 * 9 // 4]),
        ("2:4x8", contiguous, [192 // 8, 4, 9]),
        ("2:4x8", channels_last, [192 // 8, 4 * 9]),
    ],
)
def test_lane_dims_follow_memory_and_are_joined(
    text: str, layout: object, sizes: list[int]
) -> None:
    weight = layout(torch.empty(192, 16, 3, 3))  # type: ignore[operator]
    dims = _list_lane_dims(weight, torch.empty_like(weight), Pattern.parse(text))
    assert [dim.size for dim in dims] == sizes[::-1]
    assert [dim.weight for dim in dims] == sorted(dim.weight for dim in dims)


@pytest.mark.parametrize(
    ("text", "dtype", "why"),
    [
        ("2:4", torch.float64, "no fused mask for float64"),
        ("1:32768", torch.float32, "1:32768 masks more than 16384 weights together"),
        ("1:128x256", torch.float16, "1:128x256 masks more than 16384 weights together"),
        ("1:128x128", torch.float16, None),
        ("1:2@64x16", torch.float64, "no fused mask for float64"),
        ("1:4@128x32", torch.float32, None),
        ("1:4@128x33", torch.float32, "1:4@128x33 masks more than 16384 weights together"),
        ("1:4@128x36+1:3", torch.float32, "1:4@128x36+1:3 masks more than 16384 weights together"),
        ("1:2@64x32+2:4", torch.float32, None),
        ("3:5", torch.bfloat16, None),
    ],
)
def test_explain_refusal_says_why_or_none(text: str, dtype: torch.dtype, why: str | None) -> None:
    assert explain_refusal(Pattern.parse(text), dtype) == why


def test_mask_ste_looks_for_triton_on_cuda_alone() -> None:
    pattern = Pattern.parse("2:4")

    def never() -> str | None:
        raise AssertionError("nobody should ask")

    assert not _can_fuse("cpu", torch.float32, pattern, never)
    assert not _can_fuse("cuda", torch.float64, pattern, never)
    assert not _can_fuse("cuda", torch.float32, pattern, lambda: "no Triton")
    assert _can_fuse("cuda", torch.float32, pattern, lambda: None)


@on_cuda
@pytest.mark.parametrize("text", ["2:4", "1:8", "4:4", "1:4x2", "2:2:8", "1:2@4x8", "1:2@4x8+2:4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_ste_on_cuda_equals_the_cpu(text: str, layout: object) -> None:
    for dtype in (*DTYPES, torch.float64):
        weight = moved(layout(integers((8, 16, 2, 3), dtype))).requires_grad_()  # type: ignore[operator]
        torch.library.opcheck(mask_ste_op, (weight, text))
        oracle = expected(weight.detach().cpu(), Pattern.parse(text))
        assert torch.equal(mask_ste(weight, text).cpu(), oracle)


@on_cuda
def test_mask_by_triton_of_more_than_2_to_the_31_elements() -> None:
    pattern = Pattern.parse("2:4")
    weight = torch.randn(2**16 + 8, 2**15, device="cuda", dtype=torch.float16)
    masked = mask_by_triton(weight, pattern)
    for rows in (slice(0, 8), slice(-8, None)):
        assert torch.equal(masked[rows], expected(weight[rows].clone(), pattern))
