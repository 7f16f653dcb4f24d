"""Packing loses nothing, and bytes that are no packed weight are refused before a kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compiler import PackError, Pattern
from sparsedm_compiler.backends.cpu.ops import dense_weight, nm_linear_op
from sparsedm_compiler.backends.cpu.pack import pack
from sparsedm_compiler.backends.cpu.packed import check, layout_of, unpack
from sparsedm_compiler.masks import nm_mask
from tests.backends.cpu.cases import case, dtypes, patterns, seeds
from tests.oracle import assert_same


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    patterns,
    st.integers(1, 60),
    st.integers(1, 600),
    dtypes,
    st.sampled_from(((), (1, 1), (3, 3), (2, 3))),
    st.sampled_from((None, 8, 64, 200)),
    seeds,
)
def test_unpack_inverts_pack(text, groups, rows, dtype, kernel, width, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    held = case(text, groups, rows, dtype, kernel, width)
    check(held.packed)
    assert_same(dense_weight(held.packed, kernel), held.masked)


@pytest.mark.parametrize("text", ["2:4x16", "1:8x64", "3:8x48"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_unpack_inverts_the_wide_layout(text: str, kernel: tuple[int, ...]) -> None:
    for groups, width in ((1, None), (37, None), (37, 96)):
        held = case(text, groups, 100, torch.bfloat16, kernel, width, wide=True)
        check(held.packed)
        assert layout_of(held.packed).wide
        assert_same(dense_weight(held.packed, kernel), held.masked)


def test_signed_zeros_and_denormals_survive() -> None:
    weight = torch.tensor([[-0.0, 1e-45, 0.0, -1e-40], [5.0, -0.0, -0.0, -3.0]])
    mask = nm_mask(weight, Pattern.parse("2:4"))
    found = unpack(pack(weight, mask, Pattern.parse("2:4")))
    kept = mask.nonzero(as_tuple=True)
    assert torch.equal(found.view(torch.int32)[kept], weight.view(torch.int32)[kept])


@pytest.mark.parametrize("text", ["2:4", "1:8x4", "2:4x5"])
def test_damaged_bytes_never_leave_their_bounds(text: str) -> None:
    """Each byte changed in turn: refused, or the kernel runs it (under `make sanitize` too)."""
    held = case(text, 4, 21, torch.float32)
    rows, cols = held.masked.shape
    x, refused = torch.randn(3, cols), set()
    for place in range(held.packed.numel()):
        for flip in (0x01, 0xFF):
            damaged = held.packed.clone()
            damaged[place] ^= flip
            try:
                check(damaged)
            except PackError:
                refused.add((place, flip))
                continue
            layout = layout_of(damaged)
            if (layout.rows, layout.cols) == (rows, cols):
                nm_linear_op(x, damaged, None, rows, "none", 4)
            else:
                with pytest.raises(PackError, match="not one of"):
                    nm_linear_op(x, damaged, None, rows, "none", 4)
    layout = layout_of(held.packed)
    kept, pairs = layout.kept, (rows + 1) // 2
    starts, _ = layout.sections()
    sizes = (len(held.masked) // layout.share * kept * 2,) if layout.share else ()
    sizes = sizes or (2 * pairs * kept, 4 * pairs, pairs)
    for start, size in zip(starts[1:], sizes, strict=False):
        assert all((place, 0xFF) in refused for place in range(start, start + size))


@pytest.mark.parametrize("cut", [0, 1, 79, 80, 500])
def test_a_cut_file_is_refused(cut: int) -> None:
    with pytest.raises(PackError):
        layout_of(case("2:4", 8, 20, torch.float32).packed[:cut])


def test_other_tensors_are_refused() -> None:
    for tensor in (torch.zeros(4096, dtype=torch.uint8), torch.zeros(99), torch.zeros(2, 2)):
        with pytest.raises(PackError):
            check(tensor)


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "why"),
    [
        ("4:4", (8, 8), torch.float32, "keeps everything"),
        ("2:4", (8, 8), torch.float16, "no CPU kernel for float16"),
        ("1:512", (8, 512), torch.float32, "wider than the 256 columns"),
    ],
)
def test_what_cannot_be_packed_says_why(
    text: str, shape: tuple[int, ...], dtype: torch.dtype, why: str
) -> None:
    weight, pattern = torch.randn(shape).to(dtype), Pattern.parse(text)
    with pytest.raises(PackError, match=why):
        pack(weight, nm_mask(weight, pattern), pattern)
