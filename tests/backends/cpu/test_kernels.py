"""Kernels equal masked dense but for rounding, over shapes, strides, patterns and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compiler import KernelError, PackError
from sparsedm_compiler.backends.cpu import ops
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.ops import nm_conv2d_op, nm_linear_op
from tests.backends.cpu.cases import (
    DTYPES,
    acts,
    bias_of,
    biases,
    case,
    check_conv,
    check_linear,
    dtypes,
    patterns,
    seeds,
    tiles,
)

fuzz = settings(max_examples=250, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_cpu_kernels_are_available_here() -> None:
    """Else every test of this file would compare dense with dense."""
    assert why_unavailable() is None


@fuzz
@given(
    patterns,
    st.integers(1, 70),
    st.integers(1, 75),
    st.sampled_from(((), (0,), (1,), (2, 3), (17,), (1, 33), (2, 0, 5), (131,))),
    dtypes,
    biases,
    acts,
    tiles,
    st.sampled_from((None, 8, 40)),
    seeds,
)
def test_nm_linear_matches_float64(
    text, groups, rows, lead, dtype, bias, act, tile, width, seed
) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 2)
    held = case(text, groups, rows, dtype, width=width)
    x = torch.randn(*lead, held.masked.shape[1]).to(dtype)
    check_linear(held, x, bias_of(len(held.masked), bias), act, tile)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(("2:4", "1:8", "2:4x3")),
    st.integers(1, 20),
    st.integers(0, 40),
    st.integers(1, 40),
    dtypes,
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.booleans()),
    seeds,
)
def test_nm_linear_takes_any_strides(text, groups, tokens, rows, dtype, how, seed) -> None:  # type: ignore[no-untyped-def]
    """x is every step'th row of a window into a larger matrix, or into its transpose."""
    torch.manual_seed(seed)
    before, after, step, transposed = how
    held = case(text, groups, rows, dtype)
    cols = held.masked.shape[1]
    size = (before + tokens * step, before + cols + after)
    whole = torch.randn(size[::-1]).t() if transposed else torch.randn(size)
    x = whole.to(dtype)[before::step, before : before + cols]
    check_linear(held, x, None, "none", 1 + seed % 8)


@pytest.mark.parametrize("way", ["slice", "transpose", "expand", "every other", "offset"])
def test_nm_linear_takes_views(way: str) -> None:
    held = case("2:4", 9, 20, torch.float32)
    x = {
        "slice": torch.randn(7, 50)[:, 5:41],
        "transpose": torch.randn(36, 7).t(),
        "expand": torch.randn(1, 36).expand(7, 36),
        "every other": torch.randn(7, 72)[:, ::2],
        "offset": torch.randn(3 * 7 * 36 + 1)[1:].view(3, 7, 36)[:, ::2],
    }[way]
    check_linear(held, x, None, "none", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channel", "images"),
    [((36, 7), 0, 1), ((36, 3, 7), 0, 1), ((3, 36, 50), 1, 3), ((2, 36, 5, 11), 1, 2)],
)
def test_nm_linear_reads_images_as_they_lie(
    shape: tuple[int, ...], channel: int, images: int, dtype: torch.dtype
) -> None:
    """x is a view of [images, channels, pixels], as attention reads them."""
    held = case("2:4", 9, 20, dtype)
    x = torch.randn(shape).to(dtype).movedim(channel, -1)
    assert ops.count_images(x) == images
    check_linear(held, x, torch.randn(20), "gelu", 4)


@pytest.mark.parametrize("shape", [(2, 3, 36, 5), (3, 36, 5, 2)])
def test_count_images_of_other_orders_is_none(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert ops.count_images(x.movedim(2, -1)) is None
    assert ops.count_images(x[..., ::2].movedim(1, -1)) is None


@pytest.mark.parametrize("text", ["1:4", "1:8x16", "2:4x5", "1:4x3", "16:2:8"])
def test_nm_linear_splits_row_blocks_among_threads(text: str) -> None:
    held, kernel = case(text, 40, 701, torch.float32), case(text, 5, 301, torch.bfloat16, (3, 3))
    x = torch.randn(19, held.masked.shape[1])
    image = torch.randn(1, kernel.masked.shape[1], 5, 6, dtype=torch.bfloat16)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check_linear(held, x, torch.randn(len(held.masked)), "gelu", 4)
        for form in (torch.contiguous_format, torch.channels_last):
            y, bias = image.to(memory_format=form), torch.randn(len(kernel.masked))
            check_conv(kernel, y, bias, ((1, 1), (1, 1), (1, 1)), "none", 2)


def cut_for(monkeypatch: pytest.MonkeyPatch, vectors: int, rows: int) -> None:
    """Has pieces of work hold the sums of ``rows`` rows and so many vectors of 16 tokens."""
    monkeypatch.setattr(ops, "CACHE_BYTES", 5 * 4 * 16 * rows * vectors)


@pytest.mark.parametrize("text", ["1:2", "3:4x4", "3:4x3", "3:4x600", "1:2x32"])
@pytest.mark.parametrize("rows", [600, 1100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nm_linear_of_several_tiles_and_blocks_of_rows_at_once_matches_float64(
    text: str, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(threads)
    torch.set_num_threads(threads)
    cut_for(monkeypatch, 5, 512)
    for dtype in DTYPES:
        held = case(text, 97, rows, dtype, width=100, wide="x32" in text and dtype != DTYPES[0])
        check_linear(held, torch.randn(170, held.masked.shape[1]).to(dtype), None, "none", 2)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [60, 520])
def test_nm_conv2d_of_several_tiles_at_once_matches_float64(
    form: torch.memory_format, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cut_for(monkeypatch, 7, min(rows, 512))
    held = case("1:2", 33, rows, torch.float32, (3, 3), width=60)
    x = torch.randn(2, 66, 11, 9).to(memory_format=form)
    check_conv(held, x, bias_of(rows, torch.float32), ((1, 2), (1, 0), (1, 1)), "silu", 3)


@pytest.mark.parametrize("tile", [-3, 0, 13, 2**31 - 1])
def test_nm_linear_rounds_unknown_tiles(tile: int) -> None:
    held = case("2:4", 9, 20, torch.float32)
    check_linear(held, torch.randn(300, 36), None, "none", tile)


def test_nm_linear_takes_a_view_as_bias_and_refuses_other_sizes() -> None:
    held, x = case("2:4", 9, 20, torch.float32), torch.randn(7, 36)
    kernel, image = case("2:4", 2, 20, torch.float32, (3, 3)), torch.randn(1, 8, 5, 5)
    geometry = ((1, 1), (1, 1), (1, 1))
    for bias in (torch.randn(40)[::2], torch.randn(1).expand(20), torch.randn(20, 3)[:, 1]):
        check_linear(held, x, bias, "none", 4)
        check_conv(kernel, image, bias, geometry, "none", 4)
    for bias in (torch.randn(1), torch.randn(21), torch.randn(1, 20)):
        with pytest.raises(KernelError, match="not one value for each of 20 rows"):
            nm_linear_op(x, held.packed, bias, 20, "none", 4)
        with pytest.raises(KernelError, match="not one value for each of 20 rows"):
            check_conv(kernel, image, bias, geometry, "none", 4)


WIDE_BLOCKS = ("1:2@16x8", "1:4@64x16", "2:3@32x24")
shared_widely = st.sampled_from(("2:4x16", "1:4x32", "1:8x64", "3:8x48", "31:32x16", *WIDE_BLOCKS))


@fuzz
@given(
    shared_widely,
    st.integers(1, 40),
    st.integers(1, 100),
    st.sampled_from(((0,), (1,), (2, 3), (17,), (131,))),
    biases,
    acts,
    tiles,
    st.sampled_from((None, 32, 96)),
    st.sampled_from(("plain", "best")),
    seeds,
)
def test_nm_linear_wide_matches_float64(
    text, groups, rows, lead, bias, act, tile, width, how, seed
) -> None:  # type: ignore[no-untyped-def]
    """What AVX512-BF16 or AMX multiplies, and the vector code that stands in for them."""
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 2)
    held = case(text, groups, rows, torch.bfloat16, width=width, wide=True)
    x = torch.randn(*lead, held.masked.shape[1]).bfloat16()
    with pytest.MonkeyPatch.context() as patched:
        if how == "plain":
            patched.setattr(ops, "select_isa", lambda: "plain")
        check_linear(held, x, bias_of(len(held.masked), bias), act, tile)


def test_nm_conv2d_wide_matches_float64() -> None:
    held = case("1:4x32", 4, 64, torch.bfloat16, (3, 3), width=64, wide=True)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 9, 16).bfloat16().to(memory_format=form)
        check_conv(held, x, torch.randn(64), ((1, 2), (1, 1), (1, 1)), "silu", 3)


@pytest.mark.parametrize(("text", "wide"), [("1:2@4x150", False), ("1:3@16x128", True)])
def test_nm_linear_of_blocks_wider_than_256_columns_matches_float64(text: str, wide: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if wide else torch.float32
    for width in (None, 512):
        held = case(text, 5, 32, dtype, width=width, wide=wide)
        check_linear(held, torch.randn(9, held.masked.shape[1]).to(dtype), None, "none", 3)


def test_nm_linear_wide_with_float32_activations_raises() -> None:
    held = case("1:4x16", 8, 16, torch.bfloat16, wide=True)
    with pytest.raises(KernelError, match="takes bfloat16 activations"):
        nm_linear_op(torch.randn(3, 32), held.packed, None, 16, "none", 4)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@fuzz
@given(
    patterns,
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from(((1, 1), (3, 3), (3, 2), (1, 5))),
    st.tuples(st.integers(0, 3), st.integers(5, 19), st.integers(5, 19)),
    pairs,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(dtypes, biases, acts, tiles),
    seeds,
)
def test_nm_conv2d_matches_float64(
    text, groups, rows, kernel, size, stride, padding, dilation, how, seed
) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 2)
    dtype, bias, act, tile = how
    held = case(text, groups, rows, dtype, kernel, width=(None, 24)[seed % 2])
    images, height, width = size
    height, width = height + 2 * kernel[0], width + 2 * kernel[1]
    x = torch.randn(images, held.masked.shape[1], height, width).to(dtype)
    if seed % 3 == 0:
        x = x.to(memory_format=torch.channels_last)
    if seed % 3 == 1:
        x = x[:, :, ::2, 1:] if height > 2 * kernel[0] * dilation[0] else x.transpose(2, 3)
        if min(x.shape[2:]) < 10:
            x = x.new_empty(images, x.shape[1], 12, 12).normal_()
    check_conv(held, x, bias_of(len(held.masked), bias), (stride, padding, dilation), act, tile)


@pytest.mark.parametrize("size", [16, 8, 4, 32])
def test_nm_conv2d_of_planes_that_fill_vectors(size: int) -> None:
    """The shapes of real UNets, in which every run of pixels is a vector or a part of one."""
    held = case("1:4", 8, 48, torch.float32, (3, 3))
    x = torch.randn(2, 32, size, size)
    for form in (torch.contiguous_format, torch.channels_last):
        check_conv(held, x.to(memory_format=form), None, ((1, 1), (1, 1), (1, 1)), "silu", 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("taps", "around"), [(1, 8), (3, 1), (7, 3), (3, 9)])
def test_nm_conv2d_reads_zeros_outside_an_image(dtype: torch.dtype, taps: int, around: int) -> None:
    """What lies before a row of x in memory, and behind it, is of another row or image."""
    torch.manual_seed(0)
    held = case("1:2", 2, 8, dtype, (taps, taps))
    x = torch.full((3, 4, 16, 16), torch.nan, dtype=dtype)
    x[1] = torch.randn(4, 16, 16)
    x[1, :, :, -1] = torch.inf
    geometry = ([taps, taps], [1, 1], [around, around], [1, 1])
    seen, plain = (
        nm_conv2d_op(images, held.packed, None, 8, *geometry, "none", 4)[1]
        for images in (x, torch.where(x.isfinite(), x, 0))
    )
    reached = torch.zeros(seen.shape[-1], dtype=torch.bool)
    reached[16 - taps + around : 16 + around] = True
    assert torch.equal(seen[:, :, ~reached], plain[:, :, ~reached])
    assert not seen[:, :, reached].isfinite().all()


def test_nm_linear_passes_nan_and_infinity_on() -> None:
    held = case("2:4", 8, 20, torch.bfloat16)
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    x[0, :] = torch.nan
    x[1, 4] = torch.inf
    out = nm_linear_op(x, held.packed, None, 20, "none", 4)
    assert out[0].isnan().all()
    assert torch.equal(out[1].isinf(), held.masked[:, 4] != 0)
    assert out[2].isfinite().all()


def test_nm_linear_keeps_a_nan_of_any_payload_in_bfloat16() -> None:
    held = case("2:4", 8, 20, torch.bfloat16)
    bias = torch.full((20,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x = torch.ones(17, 32, dtype=torch.bfloat16)
    assert nm_linear_op(x, held.packed, bias, 20, "none", 4).isnan().all()


def test_nm_linear_with_a_weight_of_another_size_raises() -> None:
    held = case("2:4", 8, 20, torch.float32)
    with pytest.raises(PackError, match="not one of 21 x 32"):
        nm_linear_op(torch.randn(3, 32), held.packed, None, 21, "none", 4)
    with pytest.raises(PackError, match="not one of 20 x 36"):
        nm_linear_op(torch.randn(3, 36), held.packed, None, 20, "none", 4)
