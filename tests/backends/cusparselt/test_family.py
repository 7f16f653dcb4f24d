"""``semi_linear`` on a CPU, and what its family packs, refuses and says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from sparsedm_compiler import KernelError, PackError, Pattern
from sparsedm_compiler.backends.cusparselt.family import CuSparseLtFamily
from sparsedm_compiler.backends.cusparselt.ops import DEFAULT, semi_linear, semi_linear_op
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.config import list_kernels
from sparsedm_compiler.patterns import NM
from tests.backends.cuda.here import ROUNDING, pruned
from tests.oracle import assert_same, brute_mask

FAMILY, KERNEL = CuSparseLtFamily(), KernelConfig("cuda_semi")
HALVES = (torch.float16, torch.bfloat16)


def packed_of(
    shape: tuple[int, ...], pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, mask = pruned(shape, pattern, dtype)
    return FAMILY.pack(weight, mask, Pattern.parse(pattern), KERNEL), weight


def test_list_kernels_names_the_kernels_of_all_families() -> None:
    names = [name for family in list_families() for name in family.names]
    assert ("auto", "dense", "sparse", *names) == list_kernels()


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        *(("2:4", 2), ("1:4", 1), ("1:8", 1), ("2:8", 2), ("1:2", 2), ("1:3", 2), ("2:4x16", 2)),
        *(("1:2@16x2", 2), ("1:2@16x8+2:4", 2), ("1:2@16x8", 4), ("1:2@16x8+3:4", 3)),
        *(("64:2:8", 2), ("3:4", 3), ("2:3", 4), ("2:6", 4), ("4:8", 4), ("31:32", 4), ("3:16", 3)),
    ],
)
def test_why_refused_allows_patterns_of_at_most_two_of_four(pattern: str, most: int) -> None:
    """Refused beyond two, and never exceeded by masks of random weights."""
    parsed = Pattern.parse(pattern)
    assert parsed.most_kept(4) == most
    refusal = FAMILY.why_refused(parsed, 64, 96, torch.bfloat16)
    assert (refusal is None) == (most <= 2)
    if refusal is not None:
        assert refusal.startswith(f"{pattern} keeps up to {most} of 4 columns, which sparse")
    torch.manual_seed(0)
    mask = brute_mask(torch.randn(640, max(1, 48 // parsed.width) * parsed.width), parsed)
    mask = mask[:, : mask.shape[1] // 4 * 4]
    assert mask.unflatten(1, (-1, 4)).sum(2).max() <= most


@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "said"),
    [
        (16, 16, torch.float32, "no 2:4 kernel for float32: sparse tensor cores take float16"),
        (24, 16, torch.bfloat16, "24 rows are not a multiple of 16"),
        (16, 24, torch.float16, "24 columns are not a multiple of 16"),
    ],
)
def test_why_refused_and_pack_name_the_reason(
    rows: int, cols: int, dtype: torch.dtype, said: str
) -> None:
    assert said in str(FAMILY.why_refused(NM(2, 4), rows, cols, dtype))
    with pytest.raises(PackError, match=said):
        FAMILY.pack(*pruned((rows, cols), "2:4", dtype), NM(2, 4), KERNEL)


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "2:8", "1:2", "2:4x4", "16:2:8", "1:2@16x8+2:4"])
@pytest.mark.parametrize("shape", [(32, 64), (16, 16, 3, 3)])
def test_unpack_returns_weights_to_the_bit(pattern: str, shape: tuple[int, ...]) -> None:
    weight, mask = pruned(shape, pattern, torch.float16)
    weight.view(-1)[mask.reshape(-1).nonzero()[::7].flatten()] = -0.0  # kept, and zero
    parsed = Pattern.parse(pattern)
    packed = FAMILY.pack(weight, mask, parsed, KERNEL)
    assert FAMILY.check(packed, shape, WeightFormat(parsed)) is torch.float16
    assert FAMILY.to_portable(packed, shape, WeightFormat(parsed)) is packed
    again = FAMILY.unpack(packed, shape, WeightFormat(parsed))
    assert again.stride() == weight.stride()
    assert_same(again.view(torch.int16), weight.view(torch.int16))
    with pytest.raises(PackError, match="it is packed as"):
        FAMILY.check(packed, (shape[0] * 2, *shape[1:]), WeightFormat(parsed))


def test_pack_with_a_mask_of_three_raises_whatever_the_values() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[5, :3] = True
    with pytest.raises(PackError, match="keeps 3 of 4"):
        FAMILY.pack(torch.zeros(16, 16).half(), mask, NM(2, 4), KERNEL)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("leading", [(16,), (3,), (2, 5), (), (0,), (2, 0)])
def test_semi_linear_matches_the_linear_layer(
    dtype: torch.dtype, act: str, leading: tuple[int, ...]
) -> None:
    packed, weight = packed_of((48, 32), dtype=dtype)
    torch.manual_seed(1)
    x, bias = torch.randn(*leading, 32).to(dtype), torch.randn(48)
    op, arguments = FAMILY.call(
        MatmulProblem(tuple(x.shape), dtype, act=act), WeightFormat(NM(2, 4)), DEFAULT
    )
    for b in (None, bias, bias.to(dtype)):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.to(dtype).double())
        if act != "none":
            exact = F.silu(exact) if act == "silu" else F.gelu(exact, approximate=_form(act))
        out = op(x, packed, b, 48, **arguments)
        assert (out.dtype, out.shape) == (dtype, (*leading, 48))
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), exact, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


def _form(act: str) -> str:
    return "tanh" if act == "gelu_tanh" else "none"


def test_semi_linear_takes_inputs_of_any_strides() -> None:
    packed, _ = packed_of((16, 32))
    wide = torch.randn(4, 9, 64).bfloat16()
    for x in (wide[..., ::2], wide[..., 1:33], wide[:, ::2, :32], wide.transpose(0, 1)[..., 5:37]):
        expected = semi_linear_op(
            x.clone(memory_format=torch.contiguous_format), packed, None, 16, *DEFAULT
        )
        assert_same(semi_linear_op(x, packed, None, 16, *DEFAULT), expected)


def test_semi_linear_of_another_dtype_or_size_raises() -> None:
    packed, _ = packed_of((16, 32))
    with pytest.raises(KernelError, match=r"packed for torch.bfloat16 takes inputs of it"):
        semi_linear_op(torch.randn(8, 32).half(), packed, None, 16, *DEFAULT)
    with pytest.raises(KernelError, match="the packed weight is 16 x 32, not 16 x 48"):
        semi_linear_op(torch.randn(8, 48).bfloat16(), packed, None, 16, *DEFAULT)


@pytest.mark.parametrize("tokens", [8, 5])
def test_semi_linear_passes_opcheck(tokens: int) -> None:
    packed, _ = packed_of((16, 32))
    x = torch.randn(2, tokens, 32).bfloat16().requires_grad_()
    for bias in (None, torch.randn(16).bfloat16()):
        opcheck(semi_linear_op, (x, packed, bias, 16, *DEFAULT))


def test_semi_linear_gradient_of_the_input_is_dense() -> None:
    packed, weight = packed_of((16, 32), dtype=torch.float16)
    x = torch.randn(3, 32).half().requires_grad_()
    (ours,) = torch.autograd.grad(
        semi_linear(x, packed, None, 16, act="silu", **DEFAULT._asdict()).sum(), x
    )
    (theirs,) = torch.autograd.grad(F.silu(F.linear(x, weight)).sum(), x)
    assert_same(ours, theirs, tolerance=ROUNDING[torch.float16])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 3), (1, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 2), (2, 3)),
    ],
)
def test_semi_conv2d_matches_the_dense_convolution(
    channels_last: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    packed, weight = packed_of((32, 16, *kernel), dtype=torch.float16)
    x = torch.randn(2, 16, 9, 8).half()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32).half()
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    work = MatmulProblem(tuple(x.shape), x.dtype, channels_last, act="silu", **geometry)
    op, arguments = FAMILY.call(work, WeightFormat(NM(2, 4)), DEFAULT)
    out = op(x, packed, bias, 32, **arguments)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    torch.testing.assert_close(out.double(), F.silu(exact), atol=3e-3, rtol=3e-3)
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert out.stride() == exact.contiguous(memory_format=form).stride()


def test_extract_patches_of_a_pointwise_convolution_is_a_view() -> None:
    from sparsedm_compiler.backends.cuda.im2col import extract_patches

    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    assert extract_patches(x, (1, 1), (1, 1), (0, 0), (1, 1)).data_ptr() == x.data_ptr()


def test_list_candidates_are_the_algorithms_of_the_library() -> None:
    found = FAMILY.list_candidates(NM(2, 4), torch.bfloat16)
    assert found[0] == KernelConfig("cuda_semi", (), DEFAULT)
    assert len({kernel.untiled for kernel in found}) == 1  # packed once for all of them
