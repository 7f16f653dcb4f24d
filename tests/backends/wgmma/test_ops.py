"""The op of wgmma.cu: its reference on a CPU, and the kernels themselves on a Hopper card."""

from __future__ import annotations

import ctypes
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import sparsedm_compiler as sdm
from sparsedm_compiler import KernelError, Pattern
from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.custom_op import ACTS, apply_activation
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem, WeightFormat
from sparsedm_compiler.backends.wgmma import build, launch
from sparsedm_compiler.backends.wgmma.build import Tile, write_product
from sparsedm_compiler.backends.wgmma.family import BLOCKS, SEMI, TILES, BlockFamily, SemiFamily
from sparsedm_compiler.backends.wgmma.format import ROWS, TYPES, choose_layout, pack
from sparsedm_compiler.backends.wgmma.launch import choose_splits
from sparsedm_compiler.backends.wgmma.ops import align_rows, run_linear, wgmma_linear_op
from tests.backends.cuda.here import kernels_of, on_cpu
from tests.backends.wgmma.test_format import pruned
from tests.oracle import assert_same, oracle_of

FAMILY = BlockFamily()
WHY_NOT = FAMILY.why_unavailable()
hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
SMALL = (64, 2, 0, 0)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PATTERNS = (
    *("1:2@64x16", "1:4@128x16", "1:8@64x16", "3:4@64x16", "1:2@128x64"),
    *("1:2@64x32+2:4", "1:4@128x32+2:4", "2:4", "1:8"),
)


def assert_near(out: Tensor, exact: Tensor) -> None:
    """Within one rounding of the result and what sums in float32 lose."""
    scale = float(exact.abs().max())
    bound = 2 * UNIT[out.dtype] * exact.abs() + 1e-5 * max(scale, 1.0)
    excess = (out.double() - exact.double()).abs() - bound
    assert bool((excess <= 0).all()), float(excess.max())


def operands(
    text: str, tokens: int, rows: int, cols: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, weight, packed, bias)."""
    weight, mask = pruned(text, rows, cols, dtype)
    weight = weight / cols**0.5
    packed = pack(weight, mask, Pattern.parse(text))
    x = torch.randn(tokens, cols).to(dtype)
    return x.to(device), weight.to(device), packed.to(device), torch.randn(rows).to(device)


@pytest.mark.parametrize("text", ["1:2@64x16", "1:4@128x32+2:4", "2:4"])
@pytest.mark.parametrize("act", ACTS)
def test_wgmma_linear_on_a_cpu_matches_float64(text: str, act: str) -> None:
    x, weight, packed, bias = operands(text, 5, 128, 128, torch.bfloat16)
    out = wgmma_linear_op(x, packed, bias, 128, act, text, list(SMALL))
    exact = apply_activation(F.linear(x.double(), weight.double(), bias.double()), act)
    assert_near(out, exact)


def test_wgmma_linear_on_a_cpu_passes_opcheck() -> None:
    x, weight, packed, bias = operands("1:2@64x16", 6, 64, 64, torch.bfloat16)
    x = x.view(2, 3, 64).requires_grad_()
    opcheck(wgmma_linear_op, (x, packed, bias, 64, "none", "1:2@64x16", list(SMALL)))
    ours = torch.autograd.grad(
        wgmma_linear_op(x, packed, None, 64, "none", "1:2@64x16", list(SMALL)).sum(), x
    )
    theirs = torch.autograd.grad(F.linear(x, weight).sum(), x)
    assert_same(ours[0], theirs[0], tolerance=2e-2)


@pytest.mark.parametrize(
    ("tiles", "stages", "splits"), [(1, 48, 8), (132, 48, 1), (66, 48, 2), (30, 8, 2), (40, 3, 1)]
)
def test_choose_splits_fills_the_device(tiles: int, stages: int, splits: int) -> None:
    assert choose_splits(tiles, stages, 132) == splits


def test_write_product_names_the_instruction() -> None:
    dense = write_product(96, sparse=False, dtype=torch.bfloat16)
    assert "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16" in dense
    assert "%47}, %48, %49, p, 1, 1, 0, 0;" in dense
    sparse = write_product(64, sparse=True, dtype=torch.float16)
    assert "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16" in sparse
    assert "%31}, %32, %33, %34, %36, p, 1, 1, 0, 0;" in sparse


def test_build_ahead_compiles_tiles_of_another_raster_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(build, "compile_kernel", lambda *job, feature: compiled.append(job))
    card = CudaDevice("H100", (9, 0), shared_bytes=227 * 1024)
    layout = choose_layout(Pattern.parse("1:2@64x16"), ROWS, ROWS)
    tiles = Tile(64, 2), Tile(64, 2, raster=8), Tile(128, 2)
    uses = itertools.product([layout], tiles, [torch.bfloat16], ["none", "gelu"])
    build.build_ahead(uses, card)
    assert len(compiled) == 4


def test_list_candidates_fit_into_shared_memory() -> None:
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        layout = choose_layout(pattern, ROWS, ROWS)
        family = SemiFamily() if text in ("2:4", "1:8") else FAMILY
        kernels = family.list_candidates(pattern, torch.bfloat16)
        assert {kernel.name for kernel in kernels} == {SEMI if text in ("2:4", "1:8") else BLOCKS}
        assert kernels
        for kernel in kernels:
            tile = Tile(*kernel.tile)
            stages = tile.count_stages(layout, 227 * 1024)
            assert stages >= 3
            assert tile.count_shared_bytes(layout, stages) <= 227 * 1024


def test_list_candidates_leaves_out_tiles_that_do_not_fit() -> None:
    few = FAMILY.list_candidates(Pattern.parse("1:2@128x64"), torch.bfloat16)
    assert 0 < len(few) < len(TILES)


class Net(nn.Module):
    """Linear layers and convolutions wide enough for blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 128), nn.Linear(128, 16)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)
        self.conv = nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(F.gelu(self.up(x)))
        image = x.view(-1, 4, 4, 128).permute(0, 3, 1, 2)
        x = x + F.silu(self.conv(image)).permute(0, 2, 3, 1).reshape(x.shape)
        return self.last(x)


@pytest.mark.parametrize("text", ["1:2@64x16", "1:2@64x32+2:4"])
def test_a_model_of_blocks_matches_the_oracle(text: str, device: str) -> None:
    net = Net().to(device, torch.bfloat16).eval()
    student = sdm.compile(
        net, text, mode="infer", backend="eager", kernels={"*": BLOCKS}, finalize=False
    )
    x = torch.randn(2, 16, 16, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        out = student(x)
        assert_same(out, oracle_of(student)(x), tolerance=5e-2)
    assert kernels_of(student) == dict.fromkeys(("up.weight", "down.weight", "conv.weight"), BLOCKS)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=hopper)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        on_cpu(monkeypatch)
    name: str = request.param
    return name


@pytest.mark.parametrize(
    "flat",
    [
        torch.randn(65).as_strided((1, 64), (65, 1)),
        torch.randn(1, 1155)[:, 3:],
        torch.randn(64, 1).t(),
        torch.randn(1, 64).as_strided((1, 64), (0, 1)),
        torch.randn(1).expand(1, 64),
        torch.randn(7, 80)[:, 1:65],
        torch.randn(1, 64).expand(5, 64),
    ],
    ids=lambda flat: str((*flat.shape, *flat.stride())),
)
def test_align_rows_gives_strides_that_a_tensor_map_takes(flat: Tensor) -> None:
    given = align_rows(flat)
    assert_same(given, flat)
    assert given.stride(1) == 1
    assert given.stride(0) >= given.shape[1]
    assert given.stride(0) * given.element_size() % 16 == given.data_ptr() % 16 == 0


def test_launch_arguments_are_as_large_as_the_kernel_copies() -> None:
    arguments = launch.LaunchArguments()
    assert ctypes.sizeof(arguments) == 384  # a multiple of 64, to which nvcc aligns tensor maps
    arguments.set_map("out_map", bytes(range(128)))
    assert bytes(arguments) == bytes(128) + bytes(range(128)) + bytes(128)


class TestOnHopper:
    """What only a card can show."""

    pytestmark = hopper

    @pytest.mark.parametrize("text", PATTERNS)
    @pytest.mark.parametrize("tile", TILES, ids=str)
    def test_every_tile_matches_float64(self, text: str, tile: Tile) -> None:
        layout = choose_layout(Pattern.parse(text), 640, 512)
        if not tile.count_stages(layout, 227 * 1024):
            pytest.skip("does not fit")
        setting = [tile.tokens, tile.groups, tile.slices, tile.raster]
        for tokens, rows, cols in ((333, 640, 512), (7, 1152, 1152), (2000, 128, 256)):
            x, weight, packed, bias = operands(text, tokens, rows, cols, torch.bfloat16, "cuda")
            junk = torch.full((tokens, rows), torch.nan, dtype=x.dtype, device="cuda")
            del junk
            for _ in range(3):
                out = run_linear(x, packed, bias, rows, "none", text, setting)
                assert_near(out, F.linear(x.double(), weight.double(), bias.double()))

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("act", ACTS)
    @pytest.mark.parametrize("text", ["1:4@64x16", "2:4"])
    def test_every_dtype_bias_and_activation(self, dtype: torch.dtype, act: str, text: str) -> None:
        for tokens, slices in itertools.product((1, 130, 1024), (0, 2)):
            x, weight, packed, bias = operands(text, tokens, 256, 512, dtype, "cuda")
            for b in (None, bias, bias.to(dtype)):
                out = run_linear(x, packed, b, 256, act, text, [128, 2, slices, 0])
                exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
                assert_near(out, apply_activation(exact, act))

    @pytest.mark.parametrize("text", ["1:4@64x16", "2:4"])
    def test_chain_of_kernels_when_each_begins_before_the_last_ends_matches_float64(
        self, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "OVERLAPS", True)
        for prepared in (launch._prepare, launch._load):
            prepared.cache_clear()
        for tokens in (40, 4096):  # few: columns are split, and a second kernel adds the parts
            x, weight, packed, _ = operands(text, tokens, 512, 512, torch.bfloat16, "cuda")
            chain = [x.clone()]

            def run(chain: list[Tensor] = chain, packed: Tensor = packed) -> None:
                del chain[1:]
                for _ in range(5):
                    chain.append(
                        run_linear(chain[-1], packed, None, 512, "none", text, [128, 2, 0, 0])
                    )

            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            for _ in range(20):
                chain[0].copy_(torch.randn_like(x))
                graph.replay()
                for before, after in itertools.pairwise(chain):
                    assert_near(after, F.linear(before.double(), weight.double()))
        for prepared in (launch._prepare, launch._load):
            prepared.cache_clear()

    def test_inputs_of_any_strides_and_shapes(self) -> None:
        text = "1:2@64x16"
        _, weight, packed, bias = operands(text, 1, 128, 64, torch.bfloat16, "cuda")
        wide = torch.randn(16, 9, 144, device="cuda").to(torch.bfloat16)
        views = (
            wide[..., :128:2],
            wide[..., 1:65],
            wide[:, ::2, :64],
            wide.transpose(0, 1)[..., 5:69],
        )
        for x in (*views, wide[:0, :, :64]):
            out = run_linear(x, packed, bias, 128, "none", text, list(SMALL))
            assert (out.shape, out.is_contiguous()) == ((*x.shape[:-1], 128), True)
            if x.numel():
                assert_near(out, F.linear(x.double(), weight.double(), bias.double()))
        for x in (wide[:1, 0, 3:67], torch.randn(64, 1, device="cuda").bfloat16().t()):
            out = run_linear(x, packed, bias, 128, "none", text, list(SMALL))
            assert_near(out, F.linear(x.double(), weight.double(), bias.double()))

    def test_a_thread_that_has_not_touched_the_card_launches(self) -> None:
        text, results = "1:2@64x16", []
        x, weight, packed, _ = operands(text, 40, 128, 64, torch.bfloat16, "cuda")

        def run() -> None:
            results.append(run_linear(x, packed, None, 128, "none", text, list(SMALL)))

        for _ in range(2):  # the second when everything is loaded
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert len(results) == 2
        for out in results:
            assert_near(out, F.linear(x.double(), weight.double()))

    def test_it_is_captured_in_a_cuda_graph(self) -> None:
        text = "1:2@64x16"
        for tokens in (64, 2048):  # with the columns split, and without
            x, _, packed, bias = operands(text, tokens, 256, 1024, torch.bfloat16, "cuda")

            def run(x: Tensor, packed: Tensor = packed, bias: Tensor = bias) -> Tensor:
                return run_linear(x, packed, bias, 256, "gelu", text, [128, 2, 0, 0])

            run(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert_same(out, run(x))

    @pytest.mark.parametrize("text", ["1:4@64x16", "2:4"])
    def test_results_are_the_same_in_every_run(self, text: str) -> None:
        x, _, packed, bias = operands(text, 4096, 1152, 1152, torch.bfloat16, "cuda")
        first = run_linear(x, packed, bias, 1152, "gelu", text, [128, 3, 4, 8])
        for _ in range(20):
            assert_same(run_linear(x, packed, bias, 1152, "gelu", text, [128, 3, 4, 8]), first)

    def test_bad_operands_raise(self) -> None:
        x, _, packed, bias = operands("2:4", 8, 64, 64, torch.bfloat16, "cuda")
        with pytest.raises(KernelError, match="not one of 64 x 64"):
            run_linear(x, packed[:-1], bias, 64, "none", "2:4", list(SMALL))
        with pytest.raises(KernelError, match="a bias of"):
            run_linear(x, packed, bias[1:], 64, "none", "2:4", list(SMALL))

    def test_pack_on_the_card_gives_the_bytes_of_the_cpu(self) -> None:
        for text in PATTERNS:
            weight, mask = pruned(text, 256, 512, torch.float16)
            pattern = Pattern.parse(text)
            there = pack(weight.cuda(), mask.cuda(), pattern)
            assert_same(there.cpu(), pack(weight, mask, pattern))
            form = WeightFormat(pattern, torch.float16, KernelConfig(BLOCKS, (0,)))
            family = SemiFamily() if text in ("2:4", "1:8") else FAMILY
            assert_same(family.unpack(there, (256, 512), form).cpu(), weight)

    def test_conv2d_matches_float64(self) -> None:
        weight, mask = pruned("1:2@64x16", 128, 64 * 9, torch.bfloat16)
        shaped = weight.view(128, 3, 3, 64).permute(0, 3, 1, 2).contiguous()
        marks = mask.view(128, 3, 3, 64).permute(0, 3, 1, 2).contiguous()
        pattern = Pattern.parse("1:2@64x16")
        packed = FAMILY.pack(shaped.cuda(), marks.cuda(), pattern, KernelConfig(BLOCKS, (1,)))
        x = torch.randn(3, 64, 9, 10, device="cuda").to(torch.bfloat16)
        pairs = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1)}
        work = MatmulProblem(tuple(x.shape), x.dtype, kernel=(3, 3), act="silu", **pairs)
        form = WeightFormat(pattern, x.dtype, KernelConfig(BLOCKS, (1,)))
        op, arguments = FAMILY.call(work, form, SMALL)
        out = op(x, packed, None, 128, **arguments)
        exact = F.conv2d(x.double(), shaped.cuda().double(), None, *pairs.values())
        assert_near(out, F.silu(exact))
