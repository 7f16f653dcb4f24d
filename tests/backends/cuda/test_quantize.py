"""Rows rounded to 8 bits: the kernel gives the reference's bits, norms and activations included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from sparsedm_compiler.backends.cuda.device import FP8_CORES
from sparsedm_compiler.backends.cuda.finish import finish_sums, reference_finish
from sparsedm_compiler.backends.cuda.quantize import (
    KINDS,
    TOKENS,
    normalize,
    quantize,
    quantize_rows,
    quantize_rows_op,
    run_quantize_rows,
)
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.triton_support import is_interpreted
from tests.backends.cpu.cases import ACTS, activated
from tests.backends.cuda.running import moved, on_device, run_interpreted
from tests.oracle import assert_same

# numpy, in the interpreter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
TYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN: tuple[Any, ...] = ("none", "none", None, None, None, None, 0.0)
kinds = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(autouse=True)
def skip_e4m3_on_older_cards(request: pytest.FixtureRequest) -> None:
    if is_interpreted() or not torch.cuda.is_available() or "kind" not in request.fixturenames:
        return
    lacks_e4m3 = torch.cuda.get_device_capability() < FP8_CORES
    if lacks_e4m3 and request.getfixturevalue("kind") == "fp8":
        pytest.skip("the card has no e4m3")


def test_in_the_interpreter() -> None:
    assert run_interpreted(__file__) > 10


def draw_rows(tokens: int, cols: int, seed: int) -> Tensor:
    """Rows of all magnitudes; of the first ones, one of zeros, of NaN, of Inf, of ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator)
    x *= torch.tensor([1.0, 1e-4, 300.0, 1e-30, 1e30])[torch.arange(tokens) % 5, None]
    x[1 % tokens] = 0.0
    x[2 % tokens, cols // 2] = torch.nan
    x[3 % tokens, -1] = -torch.inf
    x[4 % tokens] = (torch.arange(cols) % 255 - 127) / 2  # half of them between two integers
    x[4 % tokens, 0] = 127.0
    return x


def assert_same_bits(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


@kinds
def test_quantize_gives_nearest_numbers_ties_to_even(kind: str) -> None:
    dtype, largest = KINDS[kind]
    steps = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = steps[steps.isfinite() & (steps.abs() <= largest)].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat((numbers, middles, middles * 1.0001, middles * 0.9999))
    rounded, factors = quantize(row[None], kind)
    assert factors.item() == pytest.approx(1.0)
    distance = (row[:, None] - numbers).abs()
    assert_same((rounded.float()[0] - row).abs(), distance.amin(1))
    tied = rounded.float()[0, len(numbers) : len(numbers) + len(middles)]
    even = rounded[0, len(numbers) : len(numbers) + len(middles)].view(torch.uint8) & 1
    assert bool(((even == 0) | (tied.abs() == largest)).all())


@kinds
def test_quantize_of_rows_that_are_not_finite_or_zero(kind: str) -> None:
    _, largest = KINDS[kind]
    x = torch.ones(5, 8)
    x[0, 3], x[1, 0], x[2, 7], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    rounded, factors = quantize(x, kind)
    assert factors[:3].isnan().all()
    assert not rounded[:4].float().any()
    assert factors[3] > 0
    assert bool((rounded[4].float() == largest).all())
    assert factors[4].item() == pytest.approx(1 / largest)


@kinds
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (0, 40), (40,)])
def test_quantize_rows_pads_tokens_with_zeros(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rounded, factors = quantize_rows(x, kind)
    tokens = x.numel() // 40
    assert rounded.shape == (-(-tokens // TOKENS) * TOKENS, 40)
    assert factors.shape == rounded.shape[:1]
    assert not rounded[tokens:].float().any()
    opcheck(quantize_rows_op, (x, kind, *PLAIN))


@kinds
def test_a_layer_in_8_bits_is_off_by_what_explain_says(kind: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1152), torch.randn(256, 1152)
    q_x, s_x = quantize(x, kind)
    q_w, s_w = quantize(weight, kind)
    out = (q_x.double() @ q_w.double().t()) * s_x * s_w.t()
    exact = x.double() @ weight.double().t()
    error = float((out - exact).norm() / exact.norm())
    (family,) = (f for f in list_families() if f.names == (f"cuda_semi_{kind}",))
    assert f"about {100 * error:.0f} % of the output" in family.inexact


@on_device
@kinds
@examples(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 20),
    st.sampled_from((16, 40, 100, 1152)),
    st.sampled_from(TYPES),
    st.integers(0, 2**31),
)
def test_run_quantize_rows_gives_the_bits_of_the_reference(  # type: ignore[no-untyped-def]
    kind, tokens, cols, dtype, seed
) -> None:
    x = draw_rows(tokens, cols, seed).to(dtype)
    ours = run_quantize_rows(moved(x), kind, *PLAIN)
    assert_same_bits(ours, quantize_rows_op(x, kind, *PLAIN))


@on_device
@kinds
def test_run_quantize_rows_takes_views_of_any_strides(kind: str) -> None:
    x = draw_rows(30, 90, 0)
    for view in (x[:, 5:45], x.t(), x[:, ::2], x.view(2, 15, 90)[:, ::2], x[:0], x[0]):
        ours = run_quantize_rows(moved(view), kind, *PLAIN)
        assert_same_bits(ours, quantize_rows_op(view, kind, *PLAIN))


@on_device
@kinds
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("affine", ["none", "weight", "both", "modulated"])
def test_run_quantize_rows_normalizes_as_torch_does(kind: str, norm: str, affine: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 144) * 3 + 1
    weight, bias = torch.randn(144), torch.randn(144)
    scale, shift = torch.randn(2, 144), torch.randn(2, 144)
    arguments: list[Any] = [weight, bias if affine == "both" else None, None, None]
    if affine in ("none", "modulated"):
        arguments = [None, None, *((scale, shift) if affine == "modulated" else (None, None))]
    run = F.layer_norm if norm == "layer" else F.rms_norm
    y = run(x, (144,), arguments[0], eps=1e-5) + (0 if arguments[1] is None else bias)
    if affine == "modulated":
        y = y * (1 + scale[:, None]) + shift[:, None]
    assert_same(normalize(x, "none", norm, *arguments, 1e-5), y, tolerance=1e-5)
    device = moved(x).device
    on = [None if one is None else one.to(device) for one in arguments]
    rounded, factors = run_quantize_rows(moved(x), kind, "none", norm, *on, 1e-5)
    assert_near((rounded, factors), y.flatten(0, 1), kind)


@on_device
@kinds
@pytest.mark.parametrize("act", ACTS)
def test_run_quantize_rows_activates(kind: str, act: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 100) * 3
    y = activated(x.double(), act).float()  # torch's float32 gelu loses its tail under AVX2
    assert_same(normalize(x, act, "none", None, None, None, None, 0.0), y, tolerance=1e-5)
    assert_near(run_quantize_rows(moved(x), kind, act, *PLAIN[1:]), y, kind)


def assert_near(ours: tuple[Tensor, Tensor], y: Tensor, kind: str) -> None:
    """To half a step, and what float32 rounds before: few numbers fall on the other side."""
    rounded, factors = (one.cpu() for one in ours)
    dequantized = (rounded.float() * factors[:, None])[: len(y)]
    expected, theirs = quantize(y, kind)
    assert_same(factors[: len(y), None], theirs, tolerance=1e-5)
    step = theirs if kind == "int8" else (y.abs() / 8).clamp_min(theirs / 2**9)
    assert bool(((dequantized - y).abs() <= 0.505 * step + 1e-6).all())
    same = rounded[: len(y)].view(torch.uint8) == expected.view(torch.uint8)
    assert same.float().mean() > 0.99


@on_device
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("act", ACTS)
def test_finish_sums_matches_its_reference(parts: int | None, act: str) -> None:
    torch.manual_seed(0)
    for dtype, scaled, biased in ((torch.float32, True, True), (torch.int32, True, False)):
        lead = (19,) if parts is None else (parts, 13)
        sums = (100 * torch.randn(*lead, 700)).to(dtype)
        scales = (torch.rand(19) / 50, torch.rand(700)) if scaled else None
        bias = torch.randn(700).bfloat16() if biased else None
        out, expected = torch.empty(13, 700), torch.empty(13, 700)
        reference_finish(sums, scales, bias, act, expected)
        ours = moved(out)
        on = None if scales is None else (moved(scales[0]), moved(scales[1]))
        finish_sums(moved(sums), on, None if bias is None else moved(bias), act, ours)
        assert_same(ours.cpu(), expected, tolerance=1e-5)
