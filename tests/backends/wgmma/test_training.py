"""Training on blocks: packing, gradients against float64, frozen and straight-through masks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsedm_compiler as sdm
from sparsedm_compiler import Pattern
from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.wgmma import family as family_module
from sparsedm_compiler.backends.wgmma.build import Tile, read_sources, specify_linear
from sparsedm_compiler.backends.wgmma.family import BlockFamily
from sparsedm_compiler.backends.wgmma.format import pack, unpack
from sparsedm_compiler.backends.wgmma.launch_training import (
    choose_cut,
    compute_weight_gradient,
    pack_transposed_weight,
    pack_weight,
)
from sparsedm_compiler.backends.wgmma.training import (
    block_train_op,
    block_train_w_grad_op,
    block_train_x_grad_op,
    choose_tile,
    find_blocks_op,
    multiply_blocks,
    parse_blocks,
)
from sparsedm_compiler.backends.wgmma.transposed import (
    choose_transposed_layout,
    expand_blocks,
    find_blocks,
    pack_transposed,
    unpack_transposed,
    why_dense_gradient,
)
from sparsedm_compiler.masks.mask_ste import mask_ste_op
from sparsedm_compiler.masks.nm_mask import nm_mask
from tests.backends.cuda.devices import device as device
from tests.backends.cuda.running import DEVICE, moved, on_device, run_interpreted
from tests.backends.wgmma.emulated import emulate
from tests.backends.wgmma.test_ops import hopper
from tests.oracle import assert_gradients, assert_same, gradients, oracle_of

BF16 = torch.bfloat16
DISASSEMBLER = "backends/nvidia/bin/cuobjdump"
SKIPPING = ("1:4@128x32", "1:2@128x64", "1:8@128x16", "1:4@64x32", "1:2@192x64")
DENSE = ("1:2@64x16", "1:4@128x16", "3:4@64x16", "2:4@128x32", "1:2@128x32")
every_text = pytest.mark.parametrize("text", [*SKIPPING, *DENSE])


def make(text: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of some rows of blocks by two groups of 128 columns, its mask and its blocks."""
    pattern = parse_blocks(text)
    torch.manual_seed(0)
    weight = torch.randn(pattern.rows * (4 if pattern.rows % 128 else 3), 256).to(dtype)
    mask = nm_mask(weight, pattern)
    return weight, mask, find_blocks(mask, pattern)


@every_text
def test_find_blocks_of_a_mask_and_of_a_masked_weight_are_those_that_are_kept(text: str) -> None:
    weight, mask, blocks = make(text)
    pattern = parse_blocks(text)
    assert_same(expand_blocks(blocks, pattern), mask)
    assert_same(find_blocks(weight * mask, pattern), blocks)
    assert (blocks.diff(dim=-1) > 0).all()
    opcheck(find_blocks_op, (weight * mask, text))


def test_find_blocks_of_zeros_keeps_as_many() -> None:
    pattern = parse_blocks("2:4@64x16")
    weight = torch.zeros(64, 128)
    weight[3, 40] = torch.nan
    weight[9, 127] = -1e-30
    assert find_blocks(weight, pattern).tolist() == [[[0, 2], [0, 3]]]


def test_why_dense_gradient_refuses_strips_that_several_blocks_share() -> None:
    assert all(why_dense_gradient(parse_blocks(text)) is None for text in SKIPPING)
    for text in DENSE:
        assert "together keep most of the rows" in str(why_dense_gradient(parse_blocks(text)))


@pytest.mark.parametrize("text", SKIPPING)
def test_packed_transpose_is_unpacked_to_the_bit_and_multiplies_as_the_kernel_reads_it(
    text: str,
) -> None:
    weight, mask, blocks = make(text)
    rows, cols = weight.shape
    packed = pack_transposed(weight, blocks, parse_blocks(text), BF16)
    masked = (weight * mask).to(BF16)
    assert_same(unpack_transposed(packed, rows, cols, BF16), masked)
    layout = choose_transposed_layout(rows, cols)
    assert packed.shape == (layout.units * layout.stages * layout.unit_bytes,)
    assert layout.unit_bytes == 64 * 64 * 2 + 128
    grad = torch.randn(3, rows).to(BF16)
    assert_same(emulate(packed, grad, layout), grad.double() @ masked.double(), tolerance=1e-9)


@on_device
@pytest.mark.parametrize(
    ("text", "dtype"),
    [*((text, torch.float32) for text in (*SKIPPING, *DENSE)), (SKIPPING[0], torch.float16)],
)
def test_packing_kernels_write_what_the_references_do(text: str, dtype: torch.dtype) -> None:
    weight, mask, blocks = make(text, dtype)
    pattern = parse_blocks(text)
    ours = pack_weight(moved(weight), moved(blocks), pattern, torch.float16)
    assert_same(ours.cpu(), pack(weight.to(torch.float16), mask, pattern))
    if why_dense_gradient(pattern) is None:
        ours = pack_transposed_weight(moved(weight), moved(blocks), pattern, torch.float16)
        assert_same(ours.cpu(), pack_transposed(weight, blocks, pattern, torch.float16))


@on_device
def test_packing_kernel_fills_half_a_stage_and_half_a_unit_with_zeros() -> None:
    pattern = parse_blocks("1:2@64x16")
    weight = torch.randn(3 * 64, 3 * 32).half()
    mask = nm_mask(weight, pattern)
    ours = pack_weight(moved(weight), moved(find_blocks(mask, pattern)), pattern, torch.float16)
    assert_same(unpack(ours.cpu(), 192, 96, pattern, torch.float16), weight * mask)


@on_device
@pytest.mark.parametrize("text", ["1:4@128x32", "1:2@64x16", "3:4@64x16"])
@pytest.mark.parametrize(("tokens", "cut"), [(128, None), (37, None), (37, (64, 64, 16, 4, 2, 3))])
def test_weight_gradient_kernel_matches_float64(text: str, tokens: int, cut: Any) -> None:
    _, mask, blocks = make(text)
    rows, cols = mask.shape
    grad, x = torch.randn(tokens, rows).half(), torch.randn(tokens, 2 * cols).half()[:, cols:]
    ours = compute_weight_gradient(
        moved(grad), moved(x), moved(blocks), parse_blocks(text), cut
    ).cpu()
    assert not ours[~mask].any()
    exact = grad.double().t() @ x.double() * mask
    assert_same(ours.double(), exact, tolerance=1e-4)


@on_device
def test_weight_gradient_kernel_of_no_tokens_is_zero() -> None:
    _, mask, blocks = make("1:2@64x16")
    none = [torch.empty(0, size, dtype=torch.float16, device=DEVICE) for size in mask.shape]
    ours = compute_weight_gradient(*none, moved(blocks), parse_blocks("1:2@64x16"))
    assert (tuple(ours.shape), bool(ours.any())) == (tuple(mask.shape), False)


@on_device
def test_weight_gradient_kernel_takes_one_share_where_algorithms_are_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton_kernels = pytest.importorskip("sparsedm_compiler.backends.wgmma.triton_kernels")
    _, _, blocks = make("1:2@64x16")
    grad, x = (moved(torch.ones(64, size).half()) for size in (256, 256))
    grids: list[Any] = []
    real = triton_kernels.weight_gradient_kernel

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return real[grid]

    monkeypatch.setattr(triton_kernels, "weight_gradient_kernel", Kernel())
    pattern, cut = parse_blocks("1:2@64x16"), (64, 64, 16, 4, 1, 2)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        compute_weight_gradient(grad, x, moved(blocks), pattern, cut)
    torch.use_deterministic_algorithms(False)
    assert grids == [(8, 2), (8, 1)]


def test_training_kernels_in_the_interpreter() -> None:
    assert run_interpreted(__file__) == 23


def test_choose_cut_fills_a_device_twice() -> None:
    assert choose_cut(4096, 4608, 288, 128, 132) == (128, 128, 64, 8, 3, 2)
    assert choose_cut(4096, 1152, 288, 128, 132) == (128, 128, 64, 8, 3, 8)
    assert choose_cut(16, 6912, 288, 128, 132) == (128, 128, 16, 8, 3, 1)
    assert choose_cut(600, 192, 32, 64, 132) == (64, 32, 64, 4, 3, 2)


def test_kernels_of_training_are_built_once_before_the_first_call(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    card = CudaDevice("H100", (9, 0), shared_bytes=227 * 1024)
    monkeypatch.setattr(family_module, "find_device", lambda: card)
    monkeypatch.setattr(family_module, "build_ahead", lambda uses, device: built.append([*uses]))
    student = student_of(device, "1:4@128x32")
    with torch.autocast(device, BF16):
        student(X.to(device))
    (uses,) = built
    assert len(uses) == 8  # two products by each of two weights, forward and backward
    assert {(layout.picked, tile, dtype) for layout, tile, dtype, _ in uses} == {
        (picked, Tile(64, 2), BF16) for picked in (False, True)
    }


def test_choose_tile_leaves_few_multiprocessors_idle() -> None:
    assert choose_tile(4096, 4608) == Tile(128, 3, raster=8)
    assert choose_tile(4096, 1152) == Tile(96, 3)
    assert choose_tile(16, 128) == Tile(64, 2)


@every_text
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_multiply_blocks_on_a_cpu_matches_float64(
    text: str, frozen: bool, dtype: torch.dtype
) -> None:
    weight, mask, blocks = make(text, dtype)
    weight = (weight if frozen else weight * mask).requires_grad_()  # as graphs pass it
    bias = torch.randn(len(weight), requires_grad=True)
    x = torch.randn(2, 5, 256).to(BF16).requires_grad_()
    masked = (weight * mask).detach().to(BF16).double().requires_grad_()
    exact = F.linear(x.double(), masked, bias.double())
    seed = torch.randn(exact.shape).to(BF16)
    out = multiply_blocks(x, weight, bias, blocks, text, frozen)
    assert (out.dtype, out.shape) == (BF16, exact.shape)
    assert_same(out.double(), exact, tolerance=2e-2)
    ours = torch.autograd.grad(out, (x, weight, bias), seed)
    theirs = list(torch.autograd.grad(exact, (x, masked, bias), seed.double()))
    if frozen:
        theirs[1] = theirs[1] * mask
        assert not ours[1][~mask].any()
    for gradient, exact, operand in zip(ours, theirs, (x, weight, bias), strict=True):
        assert gradient.dtype is operand.dtype
        assert_same(gradient.double(), exact.double(), tolerance=2e-2)


@pytest.mark.parametrize("text", ["1:4@128x32", "1:2@64x16"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tokens", [0, 3])
def test_training_ops_pass_opcheck(text: str, frozen: bool, tokens: int) -> None:
    weight, _, blocks = make(text)
    weight.requires_grad_()
    x = torch.randn(tokens, 256).to(BF16).requires_grad_()
    bias = torch.randn(len(weight)).to(BF16).requires_grad_()
    out, back = block_train_op(x, weight, bias, blocks, text, frozen)
    opcheck(block_train_op, (x, weight, bias, blocks, text, frozen))
    plain, grad = weight.detach(), torch.randn_like(out)
    opcheck(block_train_x_grad_op, (grad, plain, blocks, back, text, frozen))
    opcheck(block_train_w_grad_op, (grad, x.detach(), plain, blocks, text, frozen))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernel_of_the_transpose_commits_each_stage_once(tmp_path: Path) -> None:
    """Two commits for a stage would make every wait one for the stage that was just begun."""
    disassembler = Path(pytest.importorskip("triton").__file__).parent / DISASSEMBLER
    layout = choose_transposed_layout(256, 256)
    kernel = specify_linear(layout, Tile(128, 3), dtype=BF16, act="none", room=227 * 1024)
    (tmp_path / "kernel.cu").write_text(read_sources(128, False, BF16))
    macros = [f"-D{name}={value}" for name, value in kernel.macros]
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas=-v", *macros]
    run = subprocess.run(
        [*command, "kernel.cu"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2
    assert "serialized" not in run.stderr
    listed = [str(disassembler), "-sass", "-fun", "wgmma_linear", "kernel.cubin"]
    code = subprocess.run(listed, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*[0-9a-f]{4}\*/\s+([^;]+);", code)
    products = [i for i, line in enumerate(lines) if "HGMMA.64x128x16.F32.BF16" in line]
    commits = [i for i in products if "gsb0" in lines[i]]
    assert (len(products), len(commits)) == (8, 2)
    assert all(lines[i + 1].startswith("BRA") for i in commits)  # past the commit of no products


class Ops(TorchDispatchMode):
    """Remembers the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    weight, _, blocks = make("1:4@128x32")
    x = torch.randn(3, 256).to(BF16)
    both = {block_train_x_grad_op, block_train_w_grad_op}
    for wants_x in (True, False):
        mine, yours = x.clone().requires_grad_(wants_x), weight.clone().requires_grad_(not wants_x)
        out = multiply_blocks(mine, yours, None, blocks, "1:4@128x32", True)
        with Ops() as ops:
            out.sum().backward()
        wanted = block_train_x_grad_op if wants_x else block_train_w_grad_op
        assert both & {*ops.seen} == {wanted}


class Net(nn.Module):
    """Two layers of blocks, used twice, one without a bias, one in a checkpointed part."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(16, 128), nn.Linear(128, 16)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            hidden = F.gelu(self.up(x))
            if self.checkpointed:
                x = x + checkpoint(self.down, hidden, use_reentrant=False)
            else:
                x = x + self.down(hidden)
        return self.last(x)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def student_of(device: str, text: str, backend: str = "eager", **options: Any) -> nn.Module:
    net = Net(**options).to(device)
    return sdm.compile(net, text, backend=backend, kernels={"*": "sparse"})


def masks_of(student: nn.Module) -> dict[str, Tensor]:
    weights = sdm.masked_parameters(student)
    return {name: nm_mask(weight, pattern) for name, (weight, pattern) in weights.items()}


@pytest.mark.parametrize(
    ("text", "backend"),
    [("1:4@128x32", "eager"), ("1:2@64x16", "eager"), ("1:4@128x32", "inductor")],
)
def test_block_student_trains_as_the_masked_model(device: str, text: str, backend: str) -> None:
    student, x = student_of(device, text, backend), X.to(device)
    with torch.autocast(device, BF16):
        student(x)
        # Products round to bfloat16 in another order than the oracle's.
        assert_gradients(student, oracle_of(student), ((x,), {}), tolerance=0.1)
    choices = {choice.weight: choice for choice in sdm.explain(student).choices}
    assert {choice.kernel for choice in choices.values()} == {"cuda_block"}
    reason = choices["up.weight"].reason
    assert "until freeze_masks" in reason
    assert ("the gradient of x is dense" in reason) == (text in DENSE)


@pytest.mark.parametrize(
    ("backend", "checkpointed"), [("eager", False), ("eager", True), ("inductor", False)]
)
def test_frozen_block_student_gets_gradients_in_kept_blocks_alone(
    device: str, backend: str, checkpointed: bool
) -> None:
    student, x = student_of(device, "1:4@128x32", backend, checkpointed=checkpointed), X.to(device)
    with torch.autocast(device, BF16):
        student(x)
        masks = masks_of(student)
        sdm.freeze_masks(student)
        ours = gradients(student, ((x,), {}))
        theirs = gradients(oracle_of(student), ((x,), {}))
        with torch.no_grad():  # moves no mask
            student.up.weight[masks["up.weight"]] *= 1e-3
            student.up.weight[~masks["up.weight"]] = 1e3
            moved_out = student(x)
            student.up.weight.mul_(masks["up.weight"])
            assert_same(moved_out, student(x))
    for name, gradient in ours.items():
        assert gradient.dtype is torch.float32
        mask = masks.get(name, torch.ones_like(gradient).bool())
        assert_same(gradient, theirs[name] * mask, tolerance=0.1)
    for name, mask in masks.items():
        assert ours[name][mask].any()
        assert not ours[name][~mask].any()
    choices = {choice.weight: choice for choice in sdm.explain(student).choices}
    assert choices["up.weight"].kernel == "cuda_block"
    assert choices["up.weight"].reason == "pinned by kernels="
    assert choices["down.weight"].kernel == ("dense" if checkpointed else "cuda_block")


def test_frozen_block_student_computes_no_mask_and_finds_no_blocks(device: str) -> None:
    seen: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    student = sdm.compile(Net().to(device), "1:4@128x32", backend=backend, kernels={"*": "sparse"})
    counts = []
    for _ in range(2):
        seen.clear()
        with torch.autocast(device, BF16):
            student(X.to(device))
        sdm.freeze_masks(student)
        ops = (multiply_blocks, mask_ste_op, find_blocks_op, torch.where)
        counts.append([seen.count(op) for op in ops])
    assert counts == [[4, 2, 2, 0], [4, 0, 0, 0]]


def test_frozen_block_student_with_dynamic_batches(device: str) -> None:
    student = student_of(device, "1:4@128x32", "aot_eager")
    with torch.autocast(device, BF16):
        student(X.to(device))
        sdm.freeze_masks(student)
        for count in (1, 2, 4):
            x = torch.randn(count, 5, 16, device=device)
            assert_same(student(x), oracle_of(student)(x), tolerance=0.1)


def test_training_where_blocks_do_not_fit_stays_dense_with_the_reason(device: str) -> None:
    for text, autocast, why in (
        ("1:4@128x32", False, "no wgmma kernel for float32, only for half precision"),
        ("1:2@32x8", True, "blocks that are not multiples of 64 rows and 16 columns"),
        ("1:4@128x32+1:4", True, "does not run in training with N:M within blocks"),
    ):
        student, x = student_of(device, text), X.to(device)
        with torch.autocast(device, BF16, enabled=autocast):
            out = student(x)
            assert_same(out, oracle_of(student)(x))
        choices = sdm.explain(student).choices
        expected = "cuda_semi" if "+" in text else "dense"
        assert {choice.kernel for choice in choices} <= {expected, "dense"}
        family = BlockFamily()
        if expected == "dense":
            assert all(why in choice.reason for choice in choices)
        else:
            said = family.why_refused_in_training(Pattern.parse(text), 256, 128, BF16)
            assert why in str(said)


class TestOnACard:
    pytestmark = hopper

    @pytest.mark.parametrize("text", ["1:4@128x32", "1:2@128x64", "1:8@128x16", "1:2@64x16"])
    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("tokens", [16, 300, 4096])
    def test_multiply_blocks_matches_float64(self, text: str, frozen: bool, tokens: int) -> None:
        weight, mask, blocks = (part.cuda() for part in make(text))
        weight = (weight if frozen else weight * mask).requires_grad_()
        x = torch.randn(tokens, 256, device="cuda").to(BF16).requires_grad_()
        grad = torch.randn(tokens, len(weight), device="cuda").to(BF16)
        out = multiply_blocks(x, weight, None, blocks, text, frozen)
        ours = (out, *torch.autograd.grad(out, (x, weight), grad))
        masked = (weight * mask).detach().to(BF16).double()
        wide = grad.double().t() @ x.detach().double()
        exact = x.double() @ masked.t(), grad.double() @ masked, wide * mask if frozen else wide
        for a, b in zip(ours, exact, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < 4e-3
        assert not (frozen and ours[2][~mask].any())

    def test_it_is_captured_in_a_cuda_graph(self) -> None:
        weight, _, blocks = (part.cuda() for part in make("1:4@128x32"))
        weight.requires_grad_()
        x = torch.randn(512, 256, device="cuda").to(BF16)
        grad = torch.randn(512, len(weight), device="cuda").to(BF16)

        def run() -> tuple[Tensor, ...]:
            out = multiply_blocks(x, weight, None, blocks, "1:4@128x32", True)
            return out, *torch.autograd.grad(out, weight, grad)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, theirs in zip(captured, run(), strict=True):
            assert_same(ours, theirs, tolerance=1e-4)
