"""Dense products in e4m3: their arithmetic, what they refuse, and that only a name gets them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import sparsedm_compiler as sdm
from sparsedm_compiler import PackError
from sparsedm_compiler.autotune import measure as measuring
from sparsedm_compiler.autotune import select_kernel as selecting
from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.cuda.quantize import MOST_COLS, quantize
from sparsedm_compiler.backends.custom_op import ACTS, apply_activation
from sparsedm_compiler.backends.fp8 import family as fp8_family
from sparsedm_compiler.backends.fp8.family import Fp8Family
from sparsedm_compiler.backends.fp8.ops import fp8_linear_op
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.masks.nm_mask import nm_mask
from sparsedm_compiler.patterns import NM, Pattern
from tests.backends.cuda.here import kernels_of, on_cpu, pruned
from tests.oracle import assert_same, oracle_of

RELATIVE = 0.06
"""Of the largest output: e4m3 has 4 bits for each number."""
ways = pytest.mark.parametrize("scaled", [0, 1])


@ways
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("leading", [(16,), (2, 5), (0,), ()])
def test_fp8_linear_matches_the_layer_of_rounded_numbers(
    leading: tuple[int, ...], dtype: torch.dtype, act: str, scaled: int
) -> None:
    weight, mask = pruned((64, 48), "1:2@16x8", dtype)
    pattern = Pattern.parse("1:2@16x8")
    packed = Fp8Family().pack(weight, mask, pattern, KernelConfig("cuda_fp8"))
    x, bias = torch.randn(*leading, 48).to(dtype), torch.randn(64)
    out = fp8_linear_op(x, packed, bias, 64, act, "fp8", scaled)
    assert (out.shape, out.dtype) == ((*leading, 64), dtype)
    if not out.numel():
        return
    q_x, s_x = (one.double() for one in quantize(x.reshape(-1, 48), "fp8"))
    q_w, s_w = (one.double() for one in quantize(weight, "fp8"))
    rounded = ((q_x @ q_w.t()) * s_x * s_w.t() + bias.double()).view(out.shape)
    tolerance = {torch.float32: 1e-5}.get(dtype, 8e-3)
    assert_same(out.double(), apply_activation(rounded, act), tolerance=tolerance)
    dense = apply_activation(F.linear(x.double(), weight.double(), bias.double()), act)
    assert (out - dense).abs().max() < RELATIVE * dense.abs().max()
    again = Fp8Family().unpack(packed, (64, 48), WeightFormat(pattern))
    assert_same(again, (q_w * s_w).float())
    assert not again[~mask].any()


def test_fp8_pack_drops_what_the_mask_drops() -> None:
    weight = torch.randn(32, 48)
    mask = nm_mask(weight, "2:4")
    packed = Fp8Family().pack(weight, mask, NM(2, 4), KernelConfig("cuda_fp8"))
    again = Fp8Family().unpack(packed, (32, 48), WeightFormat(NM(2, 4)))
    assert not again[~mask].any()
    assert (again[mask] - weight[mask]).abs().max() < RELATIVE * weight.abs().max()


@ways
def test_fp8_linear_passes_opcheck_and_has_the_gradient_of_x(scaled: int) -> None:
    weight, mask = pruned((32, 48), "2:4", torch.bfloat16)
    packed = Fp8Family().pack(weight, mask, NM(2, 4), KernelConfig("cuda_fp8"))
    x = torch.randn(2, 5, 48).bfloat16().requires_grad_()
    opcheck(fp8_linear_op, (x, packed, None, 32, "none", "fp8", scaled))
    out = fp8_linear_op(x, packed, None, 32, "none", "fp8", scaled)
    (ours,) = torch.autograd.grad(out.sum(), x)
    (theirs,) = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert (ours - theirs).abs().max() < RELATIVE * theirs.abs().max()


def test_fp8_conv2d_matches_the_dense_convolution() -> None:
    weight, mask = pruned((32, 16, 3, 3), "2:4", torch.bfloat16)
    family = Fp8Family()
    packed = family.pack(weight, mask, NM(2, 4), KernelConfig("cuda_fp8"))
    x = torch.randn(1, 16, 5, 6).bfloat16()
    geometry = {"kernel": (3, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 1)}
    problem = MatmulProblem(tuple(x.shape), x.dtype, **geometry, act="silu")
    op, arguments = family.call(problem, WeightFormat(NM(2, 4)), (1,))
    dense = F.silu(F.conv2d(x, weight, None, (1, 2), (1, 0)))
    out = op(x, packed, None, 32, **arguments)
    assert (out - dense).abs().max() < RELATIVE * dense.abs().max()


def test_fp8_family_refuses_odd_sizes_other_dtypes_and_files() -> None:
    family, pattern = Fp8Family(), NM(2, 4)
    refused = "40 rows are not a multiple of 16, as cuBLASLt wants"
    assert family.why_refused(pattern, 40, 48, torch.bfloat16) == refused
    assert "columns" in str(family.why_refused(pattern, 32, 40, torch.bfloat16))
    assert "float64" in str(family.why_refused(pattern, 32, 32, torch.float64))
    assert "at once" in str(family.why_refused(pattern, 32, 2 * MOST_COLS, torch.bfloat16))
    weight, mask = pruned((40, 48), "2:4", torch.bfloat16)
    with pytest.raises(PackError, match="40 rows are not a multiple"):
        family.pack(weight, mask, pattern, KernelConfig("cuda_fp8"))
    with pytest.raises(PackError, match="no file holds weights packed for cuda_fp8"):
        family.check(torch.zeros(9, dtype=torch.uint8), (32, 32), WeightFormat(pattern))


def test_fp8_family_on_a_card_without_e4m3_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8_family, "find_device", lambda: CudaDevice("A100", (8, 0)))
    assert "A100 has compute capability 8.0, 8.9 is needed" in str(Fp8Family().why_unavailable())


def test_fp8_kernel_runs_where_it_is_pinned_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch)
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).bfloat16()
    x = torch.randn(4, 64).bfloat16()
    pinned = {"1": "cuda_fp8", "2": "sparse"}
    fast = sdm.compile(net, "1:2@16x8", mode="infer", backend="eager", kernels=pinned)
    with torch.no_grad():
        out = fast(x)
    assert kernels_of(fast) == {"1.weight": "cuda_fp8", "2.weight": "triton_block"}
    assert "pinned by kernels=; it quantizes the weight and its inputs" in str(sdm.explain(fast))
    expected = oracle_of(fast)(x)
    assert 0 < (out - expected).abs().max() < RELATIVE * expected.abs().max()


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"cuda_fp8/1": 2.0, "cuda_fp8/0": 1.0}, (0,)),
        ({"cuda_fp8/1": 1.0, "cuda_fp8/0": 2.0}, (1,)),
        ({"cuda_fp8/1": math.inf, "cuda_fp8/0": 2.0}, (0,)),
        (None, (1,)),
        ({"cuda_fp8/1": math.inf, "cuda_fp8/0": math.inf}, None),
    ],
)
def test_pinned_fp8_kernel_takes_its_fastest_setting_that_is_right(
    times: dict[str, float] | None, chosen: tuple[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu(monkeypatch)
    monkeypatch.setattr(selecting, "measure_kernels", lambda *_: times)
    tiles = []
    call = Fp8Family.call

    def watch(self: Fp8Family, problem: MatmulProblem, form: WeightFormat, tile: Any) -> Any:
        tiles.append(tile)
        return call(self, problem, form, tile)

    monkeypatch.setattr(Fp8Family, "call", watch)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).bfloat16()
    pinned = {"1": "cuda_fp8"}
    fast = sdm.compile(net, "2:4", mode="infer", backend="eager", kernels=pinned)
    fast(torch.randn(4, 64).bfloat16())
    assert {*tiles} == ({chosen} if chosen is not None else set())
    assert kernels_of(fast)["1.weight"] == ("dense" if chosen is None else "cuda_fp8")


@pytest.mark.parametrize(
    ("off", "exact", "inexact"), [(0.02, True, True), (0.08, False, True), (0.2, False, False)]
)
def test_kernels_in_8_bits_may_differ_from_dense_by_more(
    off: float, exact: bool, inexact: bool
) -> None:
    dense = torch.tensor([4.0, 1.0, -2.0]).bfloat16()
    out = dense + torch.tensor([0.0, 4 * off, 0.0])
    assert measuring._agree(out, dense, inexact=False) is exact
    assert measuring._agree(out, dense, inexact=True) is inexact
