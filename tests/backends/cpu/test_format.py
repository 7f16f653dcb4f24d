"""Packing loses nothing, and bytes that are no packed weight are refused before a kernel runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import PackError, Pattern
from sparsedm_compiler.backends.cpu.format import Layout, allocate, check, read_layout, unpack
from sparsedm_compiler.backends.cpu.ops import nm_linear_op, unpack_weight
from sparsedm_compiler.backends.cpu.pack import pack
from sparsedm_compiler.masks.nm_mask import nm_mask
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
    assert_same(unpack_weight(held.packed, kernel), held.masked)


@pytest.mark.parametrize("text", ["2:4x16", "1:8x64", "3:8x48"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_unpack_inverts_the_wide_layout(text: str, kernel: tuple[int, ...]) -> None:
    for groups, width in ((1, None), (37, None), (37, 96)):
        held = case(text, groups, 100, torch.bfloat16, kernel, width, wide=True)
        check(held.packed)
        assert read_layout(held.packed).wide
        assert_same(unpack_weight(held.packed, kernel), held.masked)


def test_pack_keeps_signed_zeros_and_denormals() -> None:
    weight = torch.tensor([[-0.0, 1e-45, 0.0, -1e-40], [5.0, -0.0, -0.0, -3.0]])
    mask = nm_mask(weight, Pattern.parse("2:4"))
    found = unpack(pack(weight, mask, Pattern.parse("2:4")))
    kept = mask.nonzero(as_tuple=True)
    assert torch.equal(found.view(torch.int32)[kept], weight.view(torch.int32)[kept])


@pytest.mark.parametrize("text", ["2:4", "1:8x4", "2:4x5"])
def test_check_of_damaged_bytes_never_passes_bad_bounds(text: str) -> None:
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
            layout = read_layout(damaged)
            if (layout.rows, layout.cols) == (rows, cols):
                nm_linear_op(x, damaged, None, rows, "none", 4)
            else:
                with pytest.raises(PackError, match="not one of"):
                    nm_linear_op(x, damaged, None, rows, "none", 4)
    layout = read_layout(held.packed)
    kept, pairs = layout.kept, (rows + 1) // 2
    starts, _ = layout.locate_sections()
    sizes = (len(held.masked) // layout.share * kept * 2,) if layout.share else ()
    sizes = sizes or (2 * pairs * kept, 4 * pairs, pairs)
    for start, size in zip(starts[1:], sizes, strict=False):
        assert all((place, 0xFF) in refused for place in range(start, start + size))


@pytest.mark.parametrize("cut", [0, 1, 79, 80, 500])
def test_read_layout_of_cut_bytes_raises(cut: int) -> None:
    with pytest.raises(PackError):
        read_layout(case("2:4", 8, 20, torch.float32).packed[:cut])


def test_read_layout_of_other_tensors_raises() -> None:
    for tensor in (torch.zeros(4096, dtype=torch.uint8), torch.zeros(99), torch.zeros(2, 2)):
        with pytest.raises(PackError):
            check(tensor)


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "why"),
    [
        ("4:4", (8, 8), torch.float32, "keeps everything"),
        ("2:4", (8, 8), torch.float16, "no CPU kernel for float16"),
        ("1:512", (8, 512), torch.float32, "wider than the 256 columns"),
        ("1:65536x4", (4, 65536), torch.float32, "wider than the 65535 columns"),
    ],
)
def test_pack_of_a_refused_weight_raises_the_reason(
    text: str, shape: tuple[int, ...], dtype: torch.dtype, why: str
) -> None:
    weight, pattern = torch.randn(shape).to(dtype), Pattern.parse(text)
    with pytest.raises(PackError, match=why):
        pack(weight, nm_mask(weight, pattern), pattern)


FIELDS = ("rows", "cols", "n", "m", "share", "group", "col_block", "row_block")
"""The header's integers from the fourth on."""


def stating(packed: Tensor, **fields: int) -> Tensor:
    """A copy whose header states other sizes."""
    damaged = packed.clone()
    words = damaged[:48].view(torch.int32)
    for name, value in fields.items():
        words[3 + FIELDS.index(name)] = (value + 2**31) % 2**32 - 2**31
    return damaged


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("2:4", {"row_block": 257}),
        ("2:4", {"row_block": 255}),
        ("2:4", {"row_block": 0}),
        ("2:4", {"col_block": 2**31 - 4}),
        ("2:4", {"col_block": 18}),
        ("2:4", {"col_block": 0}),
        ("2:4", {"rows": 2**30}),
        ("2:4", {"rows": 2**31 - 1, "row_block": 2}),
        ("2:4", {"cols": 2**30, "m": 2**30, "n": 1}),
        ("2:4", {"share": 2**31 - 1}),
        ("2:4", {"share": -1}),
        ("2:4", {"m": 0}),
        ("2:4", {"n": 4}),
        ("2:4x4", {"row_block": 18}),
        ("2:4x4", {"col_block": 15}),
        ("2:4x4", {"col_block": 2**30}),
        ("2:4x4", {"group": 8}),
    ],
)
def test_read_layout_of_a_contradictory_header_raises(text: str, fields: dict[str, int]) -> None:
    held = case(text, 8, 300, torch.float32, width=16)
    with pytest.raises(PackError):
        check(stating(held.packed, **fields))


@pytest.mark.parametrize("blocks", [(0, 8, 3), (0, 6, 4), (0, 64, 4), (4, 8, 6), (4, 6, 4)])
def test_read_layout_of_blocks_that_split_a_group_raises(blocks: tuple[int, int, int]) -> None:
    """Though the header is true to its own size. blocks: share, columns, rows."""
    check(allocate(Layout(torch.float32, 12, 24, 2, 4, 4, 8, 4)))
    with pytest.raises(PackError, match="blocks that cannot be"):
        check(allocate(Layout(torch.float32, 12, 24, 2, 4, *blocks)))


@pytest.mark.parametrize("text", ["2:4", "1:256", "255:256"])
def test_read_layout_accepts_the_widest_block_of_columns(text: str) -> None:
    held = case(text, 512 // int(text.split(":")[1]), 8, torch.float32, width=256)
    assert read_layout(held.packed).col_block == 256
    check(held.packed)
    assert_same(unpack(held.packed), held.masked)


def runs_within_bounds(packed: Tensor) -> None:
    """Refused, or of a sane size and run (``make sanitize`` sees what a kernel touches)."""
    try:
        check(packed)
    except PackError:
        return
    layout = read_layout(packed)
    assert layout.rows * layout.kept <= packed.numel()
    unpack(packed)
    if layout.cols < 10_000:
        x = torch.randn(3, layout.cols).to(layout.dtype)
        out = nm_linear_op(x, packed, None, layout.rows, "none", 4)
        assert out.shape == (3, layout.rows)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(2, 9)),
    st.tuples(st.sampled_from((*range(10), 16, 32)), st.integers(1, 80), st.integers(1, 50)),
    dtypes,
    st.sampled_from((1, 2, 3, 9, 300)),
    seeds,
)
def test_check_of_a_forged_layout_never_passes_bad_bounds(sizes, blocks, dtype, top, seed) -> None:  # type: ignore[no-untyped-def]
    """A header true to its own size, before random bytes below ``top``."""
    (rows, groups, n, m), (share, col_block, row_block) = sizes, blocks
    near = seed % 4 > 0  # to what pack writes: most of the rest is refused
    wide = share > 9 and near and seed % 8 < 6
    if near:
        rows, row_block = rows * (share or 1), row_block * (share or 2)
        col_block, dtype = m * (1 + col_block % groups), torch.bfloat16 if wide else dtype
    layout = Layout(dtype, rows, groups * m, min(n, m - 1), m, share, col_block, row_block, wide)
    packed, start = allocate(layout), 128
    noise = torch.Generator().manual_seed(seed)
    packed[start:] = torch.randint(0, min(top, 256), packed[start:].shape, generator=noise)
    if share:  # indices of two bytes, small
        begin = layout.locate_sections()[0][1]
        packed[begin + 1 :: 2] = 0
    runs_within_bounds(packed)


near = st.integers(-3, 3)
words = st.one_of(
    near, st.sampled_from((1, 2, 3, 4, 8, 16, 256, 2**16, 2**30, 2**31 - 1, -(2**31)))
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(("2:4", "1:8x4", "2:4x5")),
    dtypes,
    st.dictionaries(st.sampled_from(FIELDS), st.tuples(st.booleans(), words), max_size=3),
    st.lists(st.tuples(st.integers(128, 2**31), st.integers(0, 255)), max_size=20),
    seeds,
)
def test_check_of_damaged_sizes_never_passes_bad_bounds(text, dtype, edits, bytes_, seed) -> None:  # type: ignore[no-untyped-def]
    """Over several blocks of rows and columns, the last ones smaller."""
    torch.manual_seed(seed)
    packed = case(text, 5, 261, dtype, width=16).packed
    header = layout_header(packed)
    stated = {name: header[name] * by + value for name, (by, value) in edits.items()}
    damaged = stating(packed, **stated)
    for place, value in bytes_:
        damaged[128 + place % (damaged.numel() - 128)] = value
    runs_within_bounds(damaged)


def layout_header(packed: Tensor) -> dict[str, int]:
    return dict(zip(FIELDS, packed[12:44].view(torch.int32).tolist(), strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.booleans())
def test_check_of_random_bytes_raises(content: bytes, begins_well: bool) -> None:
    magic = (0x314D4E53).to_bytes(4, "little") if begins_well else b""
    with pytest.raises(PackError):
        check(torch.tensor([*magic, *content], dtype=torch.uint8))


def test_unpack_reads_slices_and_strided_bytes() -> None:
    """Files and larger buffers put the bytes anywhere; a kernel asks for aligned ones."""
    for text in ("2:4", "2:4x4"):
        held = case(text, 8, 20, torch.float32)
        for start, step in ((1, 1), (3, 1), (0, 2)):
            packed = torch.zeros(2 * held.packed.numel() + 8, dtype=torch.uint8)
            packed = packed[start::step][: held.packed.numel()]
            packed.copy_(held.packed)
            check(packed)
            assert_same(unpack(packed), held.masked)
            with pytest.raises(PackError, match="a multiple of 8"):
                nm_linear_op(torch.randn(3, 32), packed, None, 20, "none", 4)


def test_load_of_a_file_with_odd_sizes_is_aligned(tmp_path: Path) -> None:
    """safetensors maps the file: after 3 bytes of another tensor every address is odd."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    net.register_buffer("a", torch.zeros(3, dtype=torch.uint8))
    fast = sdm.compile(
        net, "2:4", mode="infer", backend="eager", kernels={"*": "sparse"}, finalize=True
    )
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = fast(x)
        sdm.save(fast, tmp_path / "net.safetensors")
        again = sdm.load(tmp_path / "net.safetensors", net, backend="eager")
        assert_same(again(x), expected)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("2:4", lambda mask: mask[3, :4].fill_(True)),
        ("2:4", lambda mask: mask[0, 8:12].fill_(False)),
        ("2:4x4", lambda mask: mask[1, :4].copy_(mask[1, :4].logical_not())),
    ],
)
def test_pack_of_a_mask_of_another_pattern_is_refused(text: str, change: Any) -> None:
    weight = torch.randn(8, 16)
    mask = nm_mask(weight, text)
    change(mask)
    with pytest.raises(PackError, match=f"the mask is not one of {text}"):
        pack(weight, mask, Pattern.parse(text))
