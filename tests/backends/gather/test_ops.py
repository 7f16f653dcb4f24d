"""Packing loses nothing, and the gathered products equal masked dense but for rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler import KernelError, PackError, Pattern
from sparsedm_compiler.backends.gather.ops import (
    TYPES,
    list_tiles,
    pack,
    reference_linear,
    run_linear,
    unpack,
    view_sections,
    why_refused,
)
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask
from sparsedm_compiler.triton_support import is_interpreted
from tests.backends.cpu.cases import ACTS, assert_rounded
from tests.backends.cuda.running import moved, on_cuda, on_device, run_interpreted

# numpy, in the interpreter: the exponential in a sigmoid may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

PATTERNS = ("1:8x16", "2:4x16", "2:4x48", "3:5x32", "1:2x64", "1:4x128", "2:8x192", "7:8x16")
LEADS = ((1,), (7,), (257,), (2, 3), (), (0,), (2, 0, 5))


class Case:
    """A random weight of whole shares: the pattern, its masked form and its packed form."""

    def __init__(self, text: str, shares: int, groups: int, dtype: torch.dtype) -> None:
        self.pattern = Pattern.parse(text)
        groups = max(groups, -(-16 // self.pattern.n))
        self.rows, self.cols = shares * self.pattern.height, groups * self.pattern.m
        weight = torch.randn(self.rows, self.cols).to(dtype)
        mask = nm_mask(weight, self.pattern)
        self.masked = apply_mask(weight, mask)
        self.packed = pack(weight, mask, self.pattern)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The pattern as the op takes it."""
        return self.pattern.n, self.pattern.m, self.pattern.height

    def check(self, out: Tensor, x: Tensor, bias: Tensor | None, act: str) -> None:
        """Against float64. The interpreter cuts bits off a bfloat16 where others round."""
        b = None if bias is None else bias.double()
        exact = F.linear(x.double(), self.masked.double(), b)
        sums = F.linear(
            x.double().abs(), self.masked.double().abs(), None if b is None else b.abs()
        )
        count = self.cols * self.pattern.n // self.pattern.m
        cut = is_interpreted() and out.dtype == torch.bfloat16
        assert out.dtype == x.dtype
        assert_rounded(out.cpu(), exact, sums, count, act, cut=cut)

    def run(self, x: Tensor, bias: Tensor | None, act: str, tile: tuple[int, ...]) -> Tensor:
        given = None if bias is None else bias.to(moved(x).device)
        out = run_linear(moved(x), moved(self.packed), given, self.rows, act, *self.shape, tile)
        assert out.is_contiguous()
        assert out.shape == (*x.shape[:-1], self.rows)
        self.check(out, x, bias, act)
        return out


def bias_of(rows: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.randn(rows).to(dtype)


texts, dtypes = st.sampled_from(PATTERNS), st.sampled_from(TYPES)
seeds = st.integers(0, 2**31)


def test_in_the_interpreter() -> None:
    assert run_interpreted(__file__) > 50


@examples(max_examples=100, deadline=None, derandomize=True)
@given(texts, st.integers(1, 3), st.integers(1, 40), dtypes, seeds)
def test_unpack_inverts_pack(  # type: ignore[no-untyped-def]
    text, shares, groups, dtype, seed
) -> None:
    torch.manual_seed(seed)
    case = Case(text, shares, groups, dtype)
    found = unpack(case.packed, case.rows, case.cols, case.pattern, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), case.masked.view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pack_stores_values_and_ascending_columns_once(dtype: torch.dtype) -> None:
    """Values by share, kept column and row, then the ascending columns: nothing is stored twice."""
    case = Case("2:8x48", 2, 11, dtype)
    values, columns = view_sections(case.packed, case.rows, case.cols, case.pattern, dtype)
    assert case.packed.numel() == case.rows * 22 * dtype.itemsize + 2 * 22 * 4
    assert columns.dtype == torch.int32
    assert (columns.diff() > 0).all()
    for share, (value, column) in enumerate(zip(values, columns, strict=True)):
        rows = case.masked[48 * share : 48 * (share + 1)]
        assert torch.equal(rows[:, column.long()], value.t())
    for part in (values, columns):
        assert part.untyped_storage().data_ptr() == case.packed.untyped_storage().data_ptr()
        assert part.data_ptr() % 16 == 0


def test_pack_aligns_sections_to_16_bytes() -> None:
    case = Case("17:19x16", 1, 1, torch.float16)
    assert case.packed.numel() == 16 * 17 * 2 + 80
    _, columns = view_sections(case.packed, 16, 19, case.pattern, torch.float16)
    assert columns.data_ptr() - case.packed.data_ptr() == 16 * 17 * 2


def test_pack_keeps_signed_zeros_nan_and_denormals() -> None:
    weight = torch.tensor([-0.0, 1e-45, torch.nan, 0.0]).repeat(16, 16)
    mask = (torch.arange(64) % 4 != 3).expand(16, 64)
    pattern = Pattern.parse("3:4x16")
    found = unpack(pack(weight, mask, pattern), 16, 64, pattern, torch.float32)
    assert torch.equal(found.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize(
    ("text", "rows", "cols", "dtype", "why"),
    [
        ("1:8x16", 64, 256, torch.float64, "no gather kernel for float64"),
        ("4:4x16", 64, 256, torch.float32, "4:4x16 keeps everything"),
        ("2:4", 64, 256, torch.float16, "2:4 shares no mask among rows"),
        ("64:2:8", 64, 256, torch.float16, "64:2:8 shares no mask among rows"),
        ("2:4x24", 48, 256, torch.float16, "24 rows that share a mask are no multiple of 16"),
        ("2:4x16", 64, 258, torch.float16, "258 columns are not whole groups of 4"),
        ("2:4x32", 80, 256, torch.float16, "80 rows are not whole shares of 32"),
        ("1:8x16", 64, 120, torch.bfloat16, "15 kept columns are fewer than 16"),
        ("1:8x16", 64, 128, torch.bfloat16, None),
    ],
)
def test_why_refused_names_the_reason(
    text: str, rows: int, cols: int, dtype: torch.dtype, why: str | None
) -> None:
    assert why_refused(Pattern.parse(text), rows, cols, dtype) == why
    if why is not None:
        weight = torch.zeros(rows, cols, dtype=dtype)
        with pytest.raises(PackError, match=f"cannot be packed to {text}: {why}"):
            pack(weight, weight.bool(), Pattern.parse(text))


def test_pack_with_a_mask_of_another_pattern_raises() -> None:
    pattern, weight = Pattern.parse("2:4x16"), torch.randn(32, 64)
    mask = nm_mask(weight, pattern)
    unshared, unequal = mask.clone(), mask.clone()
    unshared[5] = ~unshared[5]
    unequal[:16, 0] = ~unequal[:16, 0]
    for wrong in (unshared, unequal):
        with pytest.raises(PackError, match="the mask is not one of 2:4x16"):
            pack(weight, wrong, pattern)


def test_view_sections_of_another_size_raises() -> None:
    case = Case("2:4x16", 2, 16, torch.float16)
    for packed, rows, dtype in (
        (case.packed, 48, torch.float16),
        (case.packed, 32, torch.float32),
        (case.packed[:-1], 32, torch.float16),
        (case.packed.view(torch.int8), 32, torch.float16),
        (torch.cat([case.packed[:1], case.packed])[1:], 32, torch.float16),
    ):
        with pytest.raises(PackError, match=f"not one of {rows} x 64 to 2:4x16"):
            view_sections(packed, rows, 64, case.pattern, dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_reference_linear_matches_float64(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    for text in PATTERNS:
        case = Case(text, 2, 9, dtype)
        for lead, kind in zip(LEADS, (*TYPES, None, *TYPES), strict=True):
            x, bias = torch.randn(*lead, case.cols).to(dtype), bias_of(case.rows, kind)
            out = reference_linear(x, case.packed, bias, case.rows, act, *case.shape, ())
            case.check(out, x, bias, act)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_list_tiles_are_few_and_powers_of_two(text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    tiles = list_tiles(pattern, dtype)
    assert 1 <= len(tiles) == len({*tiles}) <= 6
    for tile in tiles:
        assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:3])


@on_device
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (text, dtype)
        for i, text in enumerate(PATTERNS)
        for j, dtype in enumerate(TYPES)
        if not is_interpreted() or (i + j) % 3 == 0  # one dtype of each pattern
    ],
    ids=str,
)
def test_run_linear_with_every_tile_matches_float64(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case(text, 2, 20, dtype)
    for tile in list_tiles(case.pattern, dtype):
        case.run(torch.randn(70, case.cols).to(dtype), bias_of(case.rows, dtype), "none", tile)


@on_device
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *TYPES], ids=str)
def test_run_linear_applies_bias_and_activation(
    kind: torch.dtype | None, dtype: torch.dtype, act: str
) -> None:
    torch.manual_seed(0)
    case = Case("2:4x48", 2, 10, dtype)
    x = 3 * torch.randn(41, case.cols)
    case.run(x.to(dtype), bias_of(case.rows, kind), act, (32, 32, 16, 1, 1))


@on_device
@pytest.mark.parametrize("act", ACTS)
def test_run_linear_activation_alone_is_exact(act: str) -> None:
    """Every output is act(x[t, 0]), no sum to be rounded, which would hide a wrong constant."""
    pattern, weight, x = Pattern.parse("2:4x16"), torch.zeros(16, 32), torch.zeros(41, 32)
    weight[:, 0], x[:, 0] = 1, torch.linspace(-6, 6, 41)
    packed = moved(pack(weight, nm_mask(weight, pattern), pattern))
    out = run_linear(moved(x), packed, None, 16, act, 2, 4, 16, (16, 16, 16, 1, 1)).cpu()
    exact = x[:, :1].double().expand(41, 16)
    assert_rounded(out, exact, exact.abs(), 0, act)


@on_device
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_run_linear_takes_any_leading_shape(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    case = Case("2:4x16", 2, 10, torch.float16)
    case.run(torch.randn(*lead, case.cols).half(), None, "none", (16, 16, 16, 1, 1))


@on_device
@examples(max_examples=40, deadline=None, derandomize=True)
@given(
    texts,
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from((1, 15, 16, 40, 150)),
    dtypes,
    st.tuples(*[st.sampled_from((16, 32, 64))] * 3),  # 150 tokens: more than 8 blocks of 16
    st.sampled_from((None, *TYPES)),
    st.sampled_from(ACTS),
    seeds,
)
def test_run_linear_handles_tails_of_any_shape(  # type: ignore[no-untyped-def]
    text, shares, groups, tokens, dtype, cut, kind, act, seed
) -> None:
    """Tails of tokens, of kept columns and of rows."""
    torch.manual_seed(seed)
    case = Case(text, shares, groups, dtype)
    x = torch.randn(tokens, case.cols).to(dtype)
    case.run(x, bias_of(case.rows, kind), act, (*cut, 1, 1))


@on_device
@pytest.mark.parametrize("way", ["slice", "transpose", "every other", "offset", "far"])
def test_run_linear_takes_views(way: str) -> None:
    torch.manual_seed(0)
    case = Case("2:4x16", 2, 10, torch.float16)
    far = torch.zeros(2 * 2**23 + 40).as_strided((3, 40), (2**23, 1))
    x = {
        "slice": torch.randn(37, 70)[:, 5:45],
        "transpose": torch.randn(40, 37).t(),
        "every other": torch.randn(37, 80)[:, ::2],
        "offset": torch.randn(3 * 8 * 40 + 1)[1:].view(3, 8, 40)[:, ::2],
        "far": far.copy_(torch.randn(3, 40)),  # 256 tokens of it reach 2^31 elements far
    }[way]
    view = torch.empty_strided(x.shape, x.stride(), dtype=torch.float16).copy_(x)
    case.run(view, None, "none", (256, 16, 16, 4, 1))


@on_device
def test_run_linear_takes_an_expanded_token() -> None:
    torch.manual_seed(0)
    case = Case("2:4x16", 2, 10, torch.float16)
    x, tile = moved(torch.randn(1, 40).half()).expand(37, 40), (16, 16, 16, 1, 1)
    case.check(
        run_linear(x, moved(case.packed), None, case.rows, "none", *case.shape, tile),
        x.cpu(),
        None,
        "none",
    )


@on_device
def test_run_linear_with_a_bad_bias_raises() -> None:
    case = Case("2:4x16", 1, 8, torch.float32)
    tile, x = (16, 16, 16, 1, 1), torch.randn(3, 32)
    for bias in (torch.randn(1), torch.randn(16, 1), torch.randn(16).double()):
        with pytest.raises(KernelError, match="not a number for each of 16 rows"):
            run_linear(moved(x), moved(case.packed), bias, 16, "none", *case.shape, tile)


@on_device
def test_run_linear_takes_a_bias_of_any_stride() -> None:
    case = Case("2:4x16", 1, 8, torch.float32)
    case.run(torch.randn(3, 32), torch.randn(32)[::2], "silu", (16, 16, 16, 1, 1))


@on_cuda
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_run_linear_beyond_2_to_the_31_elements(dtype: torch.dtype) -> None:
    case = Case("1:8x64", 1, 256, dtype)
    x = torch.zeros(2**20 + 70, case.cols, dtype=dtype, device="cuda")
    x[-70:] = torch.randn(70, case.cols).to(dtype)
    for tile in list_tiles(case.pattern, dtype):
        out = run_linear(x, case.packed.cuda(), None, case.rows, "none", *case.shape, tile)
        assert not out[:-70].any()
        case.check(out[-70:], x[-70:].cpu(), None, "none")


@on_cuda
def test_run_linear_with_strides_beyond_2_to_the_31_elements() -> None:
    case = Case("2:4x16", 2, 10, torch.float16)
    x = torch.zeros(200 * 2**24, dtype=torch.float16, device="cuda").as_strided(
        (200, 40), (2**24, 1)
    )
    x.copy_(torch.randn(200, 40))
    out = run_linear(
        x, case.packed.cuda(), None, case.rows, "none", *case.shape, (256, 16, 16, 4, 1)
    )
    case.check(out, x.cpu(), None, "none")
