"""A convolution that normalizes and activates its input: against float64, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparsedm_compiler import KernelError
from sparsedm_compiler.backends.cpu.build import why_unavailable
from sparsedm_compiler.backends.cpu.norm_conv import nm_norm_conv2d_op, reference_norm_conv2d
from tests.backends.cpu.cases import Norm, case, check_norm_conv
from tests.oracle import assert_same

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="needs a C++ compiler")
SAME = ((1, 1), (1, 1), (1, 1))
POINT = ((1, 1), (0, 0), (1, 1))
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [32, 16, 8, 4, 1])
@pytest.mark.parametrize("images", [1, 3])
def test_norm_conv_of_the_shapes_of_unets_matches_float64(
    dtype: torch.dtype, size: int, images: int
) -> None:
    torch.set_num_threads(images)
    held = case("1:4", 16, 48, dtype, (3, 3))
    x = (3 * torch.randn(images, 64, size, size) + 2).to(dtype)
    for shape in (None, (1, 64, 1, 1), (images, 64, 1, 1)):
        offset = None if shape is None else torch.randn(shape).to(dtype)
        norm = Norm(32, offset, torch.randn(64).to(dtype), torch.randn(64).to(dtype))
        for form in (torch.contiguous_format, torch.channels_last):
            check_norm_conv(held, x.to(memory_format=form), norm, None, SAME, "none", 5)


def test_norm_conv_of_a_single_tap_normalizes_without_padding() -> None:
    held, x = case("2:4", 8, 20, torch.float32, (1, 1)), torch.randn(2, 32, 5, 7)
    kept = x.clone()
    check_norm_conv(held, x, Norm(4, None, None, None, "none"), None, POINT, "silu", 4)
    assert torch.equal(x, kept)


def test_norm_conv_of_values_far_from_zero_keeps_their_variance() -> None:
    """A variance as mean of squares less square of the mean would be gone at once."""
    held, x = case("2:4", 4, 16, torch.float32, (3, 3)), torch.randn(1, 16, 40, 40) + 3000
    check_norm_conv(held, x, Norm(4, None, torch.randn(16), None), None, SAME, "none", 4)


def test_norm_conv_pads_with_zeros_behind_the_activation() -> None:
    held = case("2:4", 2, 8, torch.float32, (3, 3))
    norm = Norm(2, None, None, torch.full((8,), 5.0), "silu")
    check_norm_conv(held, torch.randn(1, 8, 6, 6), norm, None, SAME, "none", 4)


def test_norm_conv_of_nan_is_nan() -> None:
    held, x = case("2:4", 2, 8, torch.float32, (3, 3)), torch.randn(1, 8, 6, 6)
    x[0, 0, 0, 0] = torch.nan
    assert nm_norm_conv2d_op(x, held.packed, None, 8, *arguments(groups=1)).isnan().all()


def arguments(
    offset: Any = None, weight: Any = None, bias: Any = None, groups: int = 2, act: str = "silu"
) -> tuple[Any, ...]:
    return offset, weight, bias, groups, 1e-5, act, *GEOMETRY, "none", 4


@pytest.mark.parametrize("offset", [None, torch.ones(2, 8, 1, 1)], ids=["plain", "offset"])
def test_opcheck_of_norm_conv(offset: torch.Tensor | None) -> None:
    held, x = case("2:4", 2, 12, torch.float32, (3, 3)), torch.randn(2, 8, 9, 11)
    given = (x, held.packed, None, 12, *arguments(offset, torch.ones(8), torch.ones(8)))
    torch.library.opcheck(nm_norm_conv2d_op, given)


def test_reference_of_norm_conv_is_the_kernel_but_for_rounding() -> None:
    held, x = case("2:4", 2, 12, torch.float32, (3, 3)), torch.randn(2, 8, 9, 11)
    given = (x, held.packed, torch.randn(12), 12)
    given = (*given, *arguments(torch.randn(1, 8, 1, 1), torch.randn(8), torch.randn(8)))
    assert_same(nm_norm_conv2d_op(*given), reference_norm_conv2d(*given), tolerance=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 3},
        {"groups": 0},
        {"act": "gelu"},
        {"offset": torch.ones(1, 7, 1, 1)},
        {"offset": torch.ones(3, 8, 1, 1)},
        {"offset": torch.ones(8)},
        {"weight": torch.ones(7)},
        {"bias": torch.ones(8, 1)},
    ],
    ids=lambda wrong: " ".join(wrong),
)
def test_norm_that_does_not_fit_raises(wrong: dict[str, Any]) -> None:
    held, x = case("2:4", 2, 12, torch.float32, (3, 3)), torch.randn(2, 8, 9, 11)
    for run in (nm_norm_conv2d_op, reference_norm_conv2d):
        with pytest.raises(KernelError, match=r"groups and '.*' does not fit x of \[2, 8, 9, 11\]"):
            run(x, held.packed, None, 12, *arguments(**wrong))
