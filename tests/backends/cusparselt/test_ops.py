"""What only a card can show of the semi-structured kernels."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import sparsedm_compiler as sdm
from sparsedm_compiler import KernelError, Pattern
from sparsedm_compiler.backends.cuda.device import find_device
from sparsedm_compiler.backends.cusparselt.algorithms import find_algorithms
from sparsedm_compiler.backends.cusparselt.family import CuSparseLtFamily
from sparsedm_compiler.backends.cusparselt.ops import DEFAULT, semi_linear_op
from sparsedm_compiler.backends.cusparselt.quantized import (
    KINDS,
    QuantizedFamily,
    semi_quantized_linear_op,
)
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.models.uvit import UViT
from sparsedm_compiler.patterns import NM
from tests.autotune.test_select_kernel import Net
from tests.backends.cuda.here import ROUNDING, kernels_of, pruned
from tests.oracle import assert_same, oracle_of

FAMILY, KERNEL, FORM = CuSparseLtFamily(), KernelConfig("cuda_semi"), WeightFormat(NM(2, 4))
WHY_NOT = FAMILY.why_unavailable()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
both = pytest.mark.parametrize("backend", ["eager", "inductor"])
BF16 = torch.bfloat16


def packed_of(
    shape: tuple[int, ...], dtype: torch.dtype = BF16, pattern: str = "2:4"
) -> tuple[Tensor, Tensor]:
    weight, mask = (each.cuda() for each in pruned(shape, pattern, dtype))
    return FAMILY.pack(weight, mask, Pattern.parse(pattern), KERNEL), weight


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = exact.abs().max().item()
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * max(scale, 1)
    )


def test_find_device_on_a_gpu_describes_it() -> None:
    here = find_device()
    assert here is not None
    assert here.capability >= (8, 0)
    assert here.cusparselt is not None
    assert min(here.multiprocessors, here.shared_bytes, here.l2_bytes) > 0
    assert FAMILY.describe_machine()[:2] == (here, torch.__version__)


@halves
@pytest.mark.parametrize("tokens", [1, 7, 8, 154, 2048])
@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (96, 48), (1536, 512), (512, 2048)])
def test_semi_linear_matches_float64(dtype: torch.dtype, tokens: int, rows: int, cols: int) -> None:
    packed, weight = packed_of((rows, cols), dtype)
    x, bias = torch.randn(tokens, cols, device="cuda").to(dtype), torch.randn(rows, device="cuda")
    for b in (None, bias, bias.to(dtype)):
        out = semi_linear_op(x, packed, b, rows, *DEFAULT)
        assert (out.shape, out.stride(), out.dtype) == ((tokens, rows), (rows, 1), dtype)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.to(dtype).double())
        assert_near(out, exact, dtype)


@pytest.mark.parametrize("leading", [(), (0,), (2, 5), (2, 4, 8)])
def test_semi_linear_takes_any_leading_shape(leading: tuple[int, ...]) -> None:
    packed, weight = packed_of((64, 32))
    x = torch.randn(*leading, 32, device="cuda").to(BF16)
    out = semi_linear_op(x, packed, None, 64, *DEFAULT)
    assert out.is_contiguous()
    assert out.shape == (*leading, 64)
    if out.numel():
        assert_near(out, F.linear(x.double(), weight.double()), BF16)


def test_semi_linear_takes_inputs_of_any_strides() -> None:
    packed, weight = packed_of((64, 32))
    wide = torch.randn(16, 9, 64, device="cuda").to(BF16)
    for x in (wide[..., ::2], wide[..., 1:33], wide[:, ::2, :32], wide.transpose(0, 1)[..., 5:37]):
        out = semi_linear_op(x, packed, None, 64, *DEFAULT)
        assert_near(out, F.linear(x.double(), weight.double()), BF16)
    bias = torch.randn(65, device="cuda").to(BF16)[1:]  # at an odd address
    out = semi_linear_op(wide[:, 0, :32], packed, bias, 64, *DEFAULT)
    assert_near(out, F.linear(wide[:, 0, :32].double(), weight.double(), bias.double()), BF16)


def test_semi_linear_with_a_whole_multiple_of_tokens_does_not_copy() -> None:
    packed, _ = packed_of((512, 512))
    x, bias = torch.randn(64, 512, device="cuda").to(BF16), torch.zeros(512, device="cuda").to(BF16)
    semi_linear_op(x, packed, bias, 512, *DEFAULT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        semi_linear_op(x, packed, bias, 512, *DEFAULT)
    names = {event.name for event in seen.events()}
    assert "aten::_cslt_sparse_mm" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::constant_pad_nd", "aten::contiguous"}


@halves
def test_semi_linear_with_every_algorithm_is_right_or_raises(dtype: torch.dtype) -> None:
    packed, weight = packed_of((256, 512), dtype)
    x = torch.randn(136, 512, device="cuda").to(dtype)
    exact = F.linear(x.double(), weight.double())
    ran = []
    for kernel in FAMILY.list_candidates(NM(2, 4), dtype):
        with contextlib.suppress(KernelError):
            out = semi_linear_op(x, packed, None, 256, *kernel.tile)
            assert_near(out, exact, dtype)
            ran.append(kernel)
    assert ran[0].tile == DEFAULT
    assert len(FAMILY.list_candidates(NM(2, 4), dtype)) == len(find_algorithms(dtype)) > 5
    with pytest.raises(KernelError, match="refuses algorithm 9999"):
        semi_linear_op(x, packed, None, 256, 9999, 1, -1)
    assert_near(semi_linear_op(x, packed, None, 256, *DEFAULT), exact, dtype)  # nothing is broken


@halves
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "2:8"])
@pytest.mark.parametrize("shape", [(32, 64), (48, 2064), (16, 16, 3, 3)])
def test_unpack_returns_weights_to_the_bit(
    dtype: torch.dtype, pattern: str, shape: tuple[int, ...]
) -> None:
    weight, mask = pruned(shape, pattern, dtype)
    kept = mask.reshape(-1).nonzero().flatten()
    tiny = torch.finfo(dtype).smallest_normal
    for place, value in enumerate((0.0, tiny, tiny / 8, -tiny / 8, torch.finfo(dtype).max)):
        weight.view(-1)[kept[place::11]] = value  # subnormal ones too
    packed = FAMILY.pack(weight.cuda(), mask.cuda(), Pattern.parse(pattern), KERNEL)
    again = FAMILY.unpack(packed, shape, FORM)
    assert again.is_cuda
    assert again.stride() == weight.stride()
    assert_same(again.cpu().view(torch.int16), weight.view(torch.int16))
    held = FAMILY.to_portable(packed, shape, FORM)
    assert (held.device.type, FAMILY.check(held, shape, FORM)) == ("cpu", dtype)
    assert_same(FAMILY.unpack(held, shape, FORM), weight)


def test_unpack_of_a_negative_zero_loses_its_sign_only() -> None:
    weight, mask = pruned((16, 16), "2:4", BF16)
    weight.view(-1)[mask.reshape(-1).nonzero()[::3].flatten()] = -0.0
    packed = FAMILY.pack(weight.cuda(), mask.cuda(), NM(2, 4), KERNEL)
    assert bool((FAMILY.unpack(packed, (16, 16), FORM).cpu() == weight).all())


def test_pack_takes_nine_sixteenths_of_the_memory() -> None:
    packed, weight = packed_of((1024, 1024))
    assert packed.nbytes <= weight.nbytes * 0.6


@pytest.mark.parametrize("tokens", [8, 5])
def test_semi_linear_passes_opcheck(tokens: int) -> None:
    packed, weight = packed_of((64, 32))
    x = torch.randn(2, tokens, 32, device="cuda").to(BF16).requires_grad_()
    opcheck(semi_linear_op, (x, packed, torch.randn(64, device="cuda"), 64, *DEFAULT))
    (ours,) = torch.autograd.grad(semi_linear_op(x, packed, None, 64, *DEFAULT).sum(), x)
    (theirs,) = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert_near(ours, theirs, BF16)


def replayed(run: Callable[[Tensor], Tensor], x: Tensor, then: Tensor) -> Tensor:
    """What ``run`` captured in a CUDA graph for x gives for another x."""
    x = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run(x)  # loads what is loaded once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run(x)
    for _ in range(3):
        x.copy_(then)
        graph.replay()
    torch.cuda.synchronize()
    return out.clone()


@pytest.mark.parametrize("tokens", [64, 77])
def test_semi_linear_is_captured_in_a_cuda_graph(tokens: int) -> None:
    packed, _ = packed_of((256, 128))
    bias = torch.randn(256, device="cuda").to(BF16)
    x, then = (torch.randn(tokens, 128, device="cuda").to(BF16) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        return semi_linear_op(x, packed, bias, 256, *DEFAULT)

    assert_same(replayed(run, x, then), run(then))


@halves
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_semi_conv2d_matches_float64(dtype: torch.dtype, channels_last: bool, kernel: int) -> None:
    packed, weight = packed_of((64, 32, kernel, kernel), dtype)
    x = torch.randn(3, 32, 9, 10, device="cuda").to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    pairs = {"stride": (2, 1), "padding": (kernel // 2, 0), "dilation": (1, 1)}
    work = MatmulProblem(
        tuple(x.shape), dtype, channels_last, kernel=(kernel, kernel), act="silu", **pairs
    )
    op, arguments = FAMILY.call(work, FORM, DEFAULT)
    exact = F.conv2d(x.double(), weight.double(), None, *pairs.values())
    out = op(x, packed, None, 64, **arguments)
    assert_near(out, F.silu(exact), dtype)
    dense = F.conv2d(x, weight, None, *pairs.values())
    assert out.stride() == dense.stride()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("tokens", [5, 64])
def test_semi_quantized_linear_on_a_gpu_matches_the_cpu(kind: str, tokens: int) -> None:
    family = QuantizedFamily(kind)
    if (why := family.why_unavailable()) is not None:
        pytest.skip(why)
    weight, mask = pruned((96, 128), "2:4", BF16)
    kernel = KernelConfig(family.names[0])
    here = family.pack(weight, mask, NM(2, 4), kernel)
    there = family.pack(weight.cuda(), mask.cuda(), NM(2, 4), kernel)
    x, bias = torch.randn(tokens, 128).to(BF16), torch.randn(96)
    expected = semi_quantized_linear_op(x, here, bias, 96, kind, *DEFAULT)
    beside = bias.cuda()

    def run(x: Tensor) -> Tensor:
        return semi_quantized_linear_op(x, there, beside, 96, kind, *DEFAULT)

    out = run(x.cuda())
    assert (out.stride(), out.dtype) == ((96, 1), BF16)
    assert_same(out.cpu(), expected, tolerance=1e-2)
    assert_same(replayed(run, torch.zeros_like(x).cuda(), x.cuda()), out)
    again = family.unpack(there, (96, 128), FORM).cpu()
    assert_same(again, family.unpack(here, (96, 128), FORM), tolerance=1e-6)


def compiled(net: nn.Module, **options: Any) -> nn.Module:
    options = {"backend": "eager", "kernels": {"*": "cuda_semi"}, **options}
    return sdm.compile(net.cuda().eval(), "2:4", mode="infer", **options)


def x_of(batch: int = 2, dtype: torch.dtype = BF16) -> Tensor:
    seeded = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 8, 16, generator=seeded).to(dtype).cuda()


@both
@halves
def test_a_model_of_every_kind_of_use(backend: str, dtype: torch.dtype) -> None:
    fast = compiled(Net().to(dtype), backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = x_of(batch, dtype)
            assert_near(fast(x), oracle_of(fast)(x), dtype)
    assert set(kernels_of(fast).values()) == {"dense", "cuda_semi"}


@both
def test_a_uvit_whose_tokens_are_no_multiple_of_eight(backend: str) -> None:
    torch.manual_seed(0)
    net = UViT(img_size=8, patch_size=2, embed_dim=64, depth=3, num_heads=2, num_classes=5)
    fast = compiled(net.to(BF16), backend=backend)
    x, t = torch.randn(3, 3, 8, 8, device="cuda").to(BF16), torch.tensor([0.1, 0.5, 0.9]).cuda()
    y = torch.tensor([0, 1, 4]).cuda()
    with torch.no_grad():
        assert_same(fast(x, t.to(BF16), y), oracle_of(fast)(x, t.to(BF16), y), tolerance=0.06)


def test_autocast() -> None:
    fast = compiled(Net())
    x = x_of(dtype=torch.float32)
    with torch.autocast("cuda", BF16), torch.no_grad():
        assert_near(fast(x), oracle_of(fast)(x), BF16)
    assert "cuda_semi" in kernels_of(fast).values()


def test_measured_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sparsedm_compiler.autotune.measure.cache_folder", lambda name: tmp_path)
    fast = compiled(Net().to(BF16), kernels=None)
    with torch.no_grad():
        assert_near(fast(x_of()), oracle_of(fast)(x_of()), BF16)
    assert {choice.dense_ms is not None for choice in sdm.explain(fast).choices} == {True, False}
    assert list(tmp_path.glob("*.json"))


def test_a_finalized_model_travels(tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(4)]).to(BF16)
    x = torch.randn(8, 1024, device="cuda").to(BF16)
    fast = compiled(net, finalize=True, policy="all")
    dense = 4 * 1024 * 1024 * 2
    with torch.no_grad():
        expected = fast(x)
        assert_same(fast(x), expected)
    assert sum(p.untyped_storage().nbytes() for p in fast.parameters()) == 4 * 2
    held = fast._sparsedm.weights.packed.values()
    assert sum(each.data.nbytes for each in held) <= 0.6 * dense
    oracle = oracle_of(called_twin(net, x))
    for name, tensor in fast.state_dict().items():
        assert_same(tensor, oracle.state_dict()[name])
    sdm.save(fast, tmp_path / "file")
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = sdm.load(tmp_path / "file", copy.deepcopy(net).cuda(), backend="eager")
    pickled = torch.load(file, weights_only=False, map_location="cuda")
    with torch.no_grad():
        for twin in (loaded, pickled, copy.deepcopy(fast)):
            for _ in range(2):
                assert_same(twin(x), expected)
            assert twin[0].weight.untyped_storage().nbytes() == 2
        at_home = fast.cpu()
        assert_same(at_home(x.cpu()).float(), expected.cpu().float(), tolerance=2e-2)
        assert_same(at_home[0].weight, oracle[0].weight.cpu())
        back = at_home.cuda()
        assert_same(back(x), expected)


def called_twin(net: nn.Module, x: Tensor) -> nn.Module:
    """The same model, called, with all its weights."""
    twin = compiled(copy.deepcopy(net), policy="all")
    with torch.no_grad():
        twin(x)
    return twin
