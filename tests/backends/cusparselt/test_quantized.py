"""8-bit kernels: their arithmetic, and that nobody gets them unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import sparsedm_compiler as sdm
from sparsedm_compiler import PackError
from sparsedm_compiler.autotune import measure as measuring
from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.cuda.quantize import KINDS, quantize
from sparsedm_compiler.backends.cusparselt import quantized
from sparsedm_compiler.backends.cusparselt.ops import DEFAULT
from sparsedm_compiler.backends.cusparselt.quantized import (
    QuantizedFamily,
    semi_quantized_linear_op,
)
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.patterns import NM
from tests.backends.cuda.here import kernels_of, pruned, semi_on_cpu
from tests.oracle import assert_same, oracle_of

kinds = pytest.mark.parametrize("kind", list(KINDS))
PATTERN, UNAVAILABLE = NM(2, 4), QuantizedFamily.why_unavailable
RELATIVE = {"int8": 0.02, "fp8": 0.06}
"""Of the largest output: int8 has 7 bits for the largest number, e4m3 has 4 for each."""


def packed_of(
    kind: str, shape: tuple[int, ...] = (64, 32), dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    weight, mask = pruned(shape, "2:4", dtype)
    family = QuantizedFamily(kind)
    return family.pack(weight, mask, PATTERN, KernelConfig(family.names[0])), weight


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("leading", [(16,), (2, 5), (0,), ()])
def test_semi_quantized_linear_matches_the_layer_of_rounded_numbers(
    kind: str, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    packed, weight = packed_of(kind, dtype=dtype)
    x, bias = torch.randn(*leading, 32).to(dtype), torch.randn(64)
    out = semi_quantized_linear_op(x, packed, bias, 64, "none", kind, *DEFAULT)
    assert (out.shape, out.dtype) == ((*leading, 64), dtype)
    if not out.numel():
        return
    q_x, s_x = (one.double() for one in quantize(x.reshape(-1, 32), kind))
    q_w, s_w = (one.double() for one in quantize(weight, kind))
    rounded = ((q_x @ q_w.t()) * s_x * s_w.t() + bias.double()).view(out.shape)
    assert_same(out.double(), rounded, tolerance={torch.float32: 1e-5}.get(dtype, 8e-3))
    dense = F.linear(x.double(), weight.double(), bias.double())
    assert (out - dense).abs().max() < RELATIVE[kind] * dense.abs().max()


@kinds
def test_semi_quantized_linear_of_a_row_that_is_not_finite_is_nan_there_alone(kind: str) -> None:
    packed, _ = packed_of(kind)
    x = torch.randn(5, 32).bfloat16()
    expected = semi_quantized_linear_op(x, packed, None, 64, "gelu", kind, *DEFAULT)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    out = semi_quantized_linear_op(x, packed, None, 64, "gelu", kind, *DEFAULT)
    assert out[[1, 3]].isnan().all()
    assert_same(out[[0, 2, 4]], expected[[0, 2, 4]])


def test_semi_quantized_linear_sums_integers_exactly() -> None:
    """Sums beyond what float32 holds: one scale of a power of two, so that they show."""
    weight = torch.zeros(32, 4096)
    weight[:, ::2] = 127.0
    family = QuantizedFamily("int8")
    packed = family.pack(weight, weight != 0, PATTERN, KernelConfig("cuda_semi_int8"))
    x = torch.full((16, 4096), 127.0)
    x[:, 0] = 126.0
    out = semi_quantized_linear_op(x, packed, None, 32, "none", "int8", *DEFAULT)
    assert_same(out, torch.full((16, 32), float(127 * 127 * 2048 - 127)))


@kinds
def test_semi_quantized_linear_passes_opcheck(kind: str) -> None:
    packed, weight = packed_of(kind)
    x = torch.randn(2, 5, 32).bfloat16().requires_grad_()
    opcheck(semi_quantized_linear_op, (x, packed, None, 64, "none", kind, *DEFAULT))
    out = semi_quantized_linear_op(x, packed, None, 64, "none", kind, *DEFAULT)
    (ours,) = torch.autograd.grad(out.sum(), x)
    (theirs,) = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert (ours - theirs).abs().max() < RELATIVE[kind] * theirs.abs().max()


@kinds
def test_semi_quantized_conv2d_matches_the_dense_convolution(kind: str) -> None:
    packed, weight = packed_of(kind, (32, 32, 3, 3))
    x = torch.randn(1, 32, 5, 6).bfloat16()
    geometry = {"kernel": (3, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 1)}
    family = QuantizedFamily(kind)
    op, arguments = family.call(
        MatmulProblem(tuple(x.shape), x.dtype, **geometry), WeightFormat(PATTERN), DEFAULT
    )
    dense = F.conv2d(x, weight, None, (1, 2), (1, 0))
    assert (op(x, packed, None, 32, **arguments) - dense).abs().max() < RELATIVE[
        kind
    ] * dense.abs().max()
    again = family.unpack(packed, (32, 32, 3, 3), WeightFormat(PATTERN))
    assert (again - weight).abs().max() < RELATIVE[kind] * weight.abs().max()


def test_why_refused_and_check_name_the_reason() -> None:
    family = QuantizedFamily("int8")
    assert family.why_refused(PATTERN, 32, 48, torch.bfloat16) == (
        "48 columns are not a multiple of 32, as cuSPARSELt wants"
    )
    assert "keeps up to 3 of 4" in str(family.why_refused(NM(3, 4), 32, 32, torch.bfloat16))
    assert "float64" in str(family.why_refused(PATTERN, 32, 32, torch.float64))
    with pytest.raises(PackError, match="no file holds weights packed for cuda_semi_int8"):
        family.check(torch.zeros(9, dtype=torch.uint8), (32, 32), WeightFormat(PATTERN))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(F.gelu(self.b(self.a(x)))))


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()


@kinds
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_quantized_kernel_runs_where_it_is_pinned_by_name(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    semi_on_cpu(monkeypatch)
    fast = sdm.compile(
        Wide().bfloat16(),
        "2:4",
        mode="infer",
        backend=backend,
        kernels={"b": f"cuda_semi_{kind}", "c": "sparse"},
        finalize=True,
    )
    with torch.no_grad():
        for _ in range(2):
            out = fast(X)
    assert kernels_of(fast) == {"b.weight": f"cuda_semi_{kind}", "c.weight": "cuda_semi"}
    assert "pinned by kernels=; it quantizes the weight and its inputs" in str(sdm.explain(fast))
    # The weight itself is all there, as it was: 8 bits cannot stand for it.
    assert_same(fast.b.weight, Wide().bfloat16().b.weight)
    assert fast.c.weight.untyped_storage().nbytes() == 2
    dense = oracle_of(sdm_student())(X)
    assert 0 < (out - dense).abs().max() < RELATIVE[kind] * dense.abs().max()
    sdm.save(fast, tmp_path / "file")
    again = sdm.load(tmp_path / "file", Wide().bfloat16(), backend="eager")
    assert_same(again(X), out, tolerance=8e-3)


def sdm_student() -> nn.Module:
    student = sdm.compile(Wide().bfloat16(), "2:4", mode="infer", backend="eager")
    student(X)
    return student


def test_quantized_kernel_pinned_on_an_old_device_shows_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semi_on_cpu(monkeypatch)
    old = CudaDevice("NVIDIA A100", (8, 0), cusparselt=(0, 8, 1))
    monkeypatch.setattr(quantized, "find_device", lambda: old)
    monkeypatch.setattr(quantized, "why_unavailable", lambda: None)
    monkeypatch.setattr(QuantizedFamily, "why_unavailable", UNAVAILABLE)
    fast = sdm.compile(
        Wide().bfloat16(),
        "2:4",
        mode="infer",
        backend="eager",
        kernels={"b": "cuda_semi_fp8", "c": "cuda_semi_int8"},
    )
    fast(X)
    found = {choice.weight: choice for choice in sdm.explain(fast).choices}
    assert found["b.weight"].reason == (
        "no sparse tensor cores for float8: NVIDIA A100 has compute capability 8.0, 8.9 is needed"
    )
    assert found["c.weight"].kernel == "cuda_semi_int8"


def test_quantized_kernel_never_runs_unless_pinned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    semi_on_cpu(monkeypatch)
    monkeypatch.setattr(measuring, "cache_folder", lambda name: tmp_path)
    for how, expected in (("sparse", {"cuda_semi"}), ("auto", {"cuda_semi", "dense"})):
        fast = sdm.compile(
            Wide().bfloat16(), "2:4", mode="infer", backend="eager", kernels={"*": how}
        )
        fast(X)
        assert set(kernels_of(fast).values()) <= expected
    without = sdm.compile(
        Wide().bfloat16(),
        "2:4",
        mode="infer",
        backend="eager",
        kernels={"*": "sparse"},
        exclude_kernels="cuda_semi",
    )
    without(X)
    assert {choice.reason for choice in sdm.explain(without).choices} == {
        "every kernel for it is in exclude_kernels="
    }
