"""The gathered products equal masked dense but for rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from sparsedm_compiler import KernelError, Pattern
from sparsedm_compiler.backends.gather.format import TYPES, pack, require_layout
from sparsedm_compiler.backends.gather.ops import (
    list_tiles,
    reference_linear,
    run_linear,
)
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.triton_support import is_interpreted
from tests.backends.cpu.cases import ACTS, assert_rounded
from tests.backends.cuda.running import moved, on_cuda, on_device, run_interpreted
from tests.backends.gather.cases import LEADS, PATTERNS, Case

# numpy, in the interpreter: the exponential in a sigmoid may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def bias_of(rows: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.randn(rows).to(dtype)


texts, dtypes = st.sampled_from(PATTERNS), st.sampled_from(TYPES)
seeds = st.integers(0, 2**31)


def test_in_the_interpreter() -> None:
    assert run_interpreted(__file__) > 50


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_reference_linear_matches_float64(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    for text in PATTERNS:
        case = Case(text, 2, 9, dtype)
        for lead, kind in zip(LEADS, (*TYPES, None, *TYPES), strict=True):
            x, bias = torch.randn(*lead, case.cols).to(dtype), bias_of(case.rows, kind)
            out = reference_linear(x, case.packed, bias, case.rows, act, str(case.pattern), ())
            case.check(out, x, bias, act)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_list_tiles_are_few_and_powers_of_two(text: str, dtype: torch.dtype) -> None:
    tiles = list_tiles(require_layout(Pattern.parse(text)), dtype)
    assert 1 <= len(tiles) == len({*tiles}) <= 7
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
    for tile in list_tiles(case.layout, dtype):
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
    out = run_linear(moved(x), packed, None, 16, act, "2:4x16", (16, 16, 16, 1, 1)).cpu()
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
    st.integers(1, 2),
    st.integers(1, 40),
    st.sampled_from((1, 15, 16, 40, 150)),
    dtypes,
    st.tuples(*[st.sampled_from((16, 32, 64))] * 3),  # 150 tokens: more than 8 blocks of 16
    st.sampled_from(((0, 1), (1, 1), (0, 3), (1, 5))),
    st.sampled_from((None, *TYPES)),
    st.sampled_from(ACTS),
    seeds,
)
def test_run_linear_handles_tails_of_any_shape(  # type: ignore[no-untyped-def]
    text, shares, groups, tokens, dtype, cut, way, kind, act, seed
) -> None:
    """Tails of tokens, of kept columns and of rows."""
    torch.manual_seed(seed)
    case = Case(text, shares, groups, dtype)
    x = torch.randn(tokens, case.cols).to(dtype)
    case.run(x, bias_of(case.rows, kind), act, (*cut, 1, 1, *way))


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
        run_linear(x, moved(case.packed), None, case.rows, "none", str(case.pattern), tile),
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
            run_linear(moved(x), moved(case.packed), bias, 16, "none", str(case.pattern), tile)


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
    for tile in list_tiles(case.layout, dtype):
        out = run_linear(x, case.packed.cuda(), None, case.rows, "none", str(case.pattern), tile)
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
        x, case.packed.cuda(), None, case.rows, "none", str(case.pattern), (256, 16, 16, 4, 1)
    )
    case.check(out, x.cpu(), None, "none")
