"""Law 1 where CUDA kernels run the weights: the same model, whatever is done to it.

Every test runs twice: on the CPU, where the families' references stand in for the kernels, and on
a GPU where there is one.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.registry import find_family
from sparsedm_compiler.models.uvit import UViT
from sparsedm_compiler.selection.transposable_tiles import build_plan
from tests.backends.cuda.devices import device as device
from tests.backends.cuda.here import kernels_of
from tests.oracle import assert_gradients, assert_same, hand_masked, masked_patterns, oracle_of

BF16 = torch.bfloat16
KERNELS = {
    **{"2:4": "cuda_semi", "64:2:8": "cuda_vnm", "16:1:8": "cuda_vnm", "1:4x16": "cuda_gather"},
    **{"1:2@32x16": "triton_block", "1:2@64x16+2:4": "triton_block", "1:2@32x4": "cuda_gather"},
    **{"1:8": "cuda_semi"},
}
CLOSE = 0.05
"""Of outputs near 1 after a dozen layers in bfloat16."""

patterns = pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "1:4x16"])  # one by kernel
ways = pytest.mark.parametrize(
    ("pattern", "backend"),
    [
        *((pattern, "eager") for pattern in KERNELS),
        ("64:2:8", "inductor"),
        ("2:4", "inductor-graphs"),
    ],
)


class Convs(nn.Module):
    """A convolution, then layers of images as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)
        self.wide, self.point = nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.silu(self.point(self.wide(self.first(x)))))


def uvit(device: str, dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    net = UViT(img_size=8, patch_size=2, embed_dim=64, depth=2, num_heads=2, num_classes=5)
    return net.to(device, dtype).eval()


def call(device: str, batch: int = 2, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    x, t = torch.randn(batch, 3, 8, 8), torch.linspace(0.1, 0.9, batch)
    return x.to(device, dtype), t.to(device, dtype), torch.arange(batch, device=device) % 5


def fast_of(model: nn.Module, pattern: str, backend: str = "eager", **options: Any) -> nn.Module:
    options = {"kernels": {"*": "sparse"}, **options}
    return sdm.compile(model, pattern, mode="infer", backend=backend, **options)


@torch.no_grad()
def check(fast: nn.Module, *inputs: Tensor, plain: nn.Module | None = None) -> Tensor:
    """It gives its oracle's output, which is not the dense model's.

    ``plain``: the dense model; None for one of the model's own parameters.
    """
    out = fast(*inputs).clone()
    assert_same(out, oracle_of(fast)(*inputs), tolerance=CLOSE)
    dense = (plain or hand_masked(fast, {}))(*inputs)
    assert (out - dense).abs().max() > 4 * (out - oracle_of(fast)(*inputs)).abs().max()
    return out


@ways
def test_cuda_families_match_the_oracle_for_every_batch(
    device: str, pattern: str, backend: str
) -> None:
    fast = fast_of(uvit(device), pattern, backend)
    for batch in (1, 2, 3):
        for _ in range(3):  # CUDA graphs: warm, record, replay
            check(fast, *call(device, batch))
    kernels = [*kernels_of(fast).values()]
    assert kernels.count(KERNELS[pattern]) >= 8
    assert set(kernels) <= {"dense", KERNELS[pattern]}


@ways
def test_cuda_families_match_the_oracle_for_images_of_every_layout(
    device: str, pattern: str, backend: str
) -> None:
    torch.manual_seed(0)
    fast = fast_of(Convs().to(device, BF16), pattern, backend)
    for size in (8, 11):
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, size, size).to(device, BF16).contiguous(memory_format=form)
            check(fast, x)
    assert KERNELS[pattern] in kernels_of(fast).values()


@patterns
def test_cuda_families_follow_copies_updates_and_hooks(device: str, pattern: str) -> None:
    fast, inputs = fast_of(uvit(device), pattern), call(device)
    before = check(fast, *inputs)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.2).roll(1)
        check(twin, *inputs)
        assert masked_patterns(twin) == masked_patterns(fast)
    name = next(iter(masked_patterns(fast))).rpartition(".")[0]
    handle = fast.get_submodule(name).register_forward_hook(lambda m, args, out: out * 2)
    assert not torch.equal(fast(*inputs), before)
    handle.remove()
    assert_same(fast(*inputs), before)


@patterns
def test_cuda_families_run_under_an_outer_compiler(device: str, pattern: str) -> None:
    fast, inputs = fast_of(uvit(device), pattern), call(device)
    expected = check(fast, *inputs)
    with torch.no_grad():
        assert_same(torch.compile(fast, backend="eager")(*inputs), expected)


@patterns
def test_cuda_families_follow_autocast_and_casts(device: str, pattern: str) -> None:
    fast = fast_of(uvit(device, torch.float32), pattern)
    inputs = call(device, dtype=torch.float32)
    with torch.autocast(device, BF16):
        check(fast, *inputs)
    assert KERNELS[pattern] in kernels_of(fast).values()
    fast.to(torch.float16)
    plain = uvit(device, torch.float32).to(torch.float16)
    check(fast, *call(device, dtype=torch.float16), plain=plain)
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float16}


@patterns
def test_cuda_families_finalize_save_and_load(device: str, pattern: str, tmp_path: Path) -> None:
    plain, fast = fast_of(uvit(device), pattern), fast_of(uvit(device), pattern, finalize=True)
    inputs = call(device)
    expected = check(plain, *inputs)
    for _ in range(2):
        assert_same(fast(*inputs), expected)
    name = next(choice.weight for choice in sdm.explain(fast).choices if choice.kernel != "dense")
    assert fast.get_parameter(name).untyped_storage().nbytes() == 2
    for key, tensor in oracle_of(plain).state_dict().items():
        assert_same(fast.state_dict()[key], tensor)
    sdm.save(fast, tmp_path / "file")
    loaded = sdm.load(tmp_path / "file", uvit(device), backend="eager")
    for _ in range(2):
        assert_same(loaded(*inputs), expected)
    assert loaded.get_parameter(name).untyped_storage().nbytes() == 2


@patterns
def test_training_updates_every_weight(device: str, pattern: str) -> None:
    student = sdm.compile(uvit(device, torch.float32), pattern, backend="eager")
    inputs = call(device, dtype=torch.float32)
    student(*inputs)
    assert_gradients(student, oracle_of(student), (inputs, {}), tolerance=1e-4)


@patterns
def test_calls_that_would_run_dense_raise(device: str, pattern: str) -> None:
    fast, inputs = fast_of(uvit(device), pattern), call(device)
    with torch.compiler.set_stance("force_eager"), pytest.raises(sdm.DenseRunError):
        fast(*inputs)
    check(fast, *inputs)


@patterns
def test_explain_shows_the_times_of_measured_choices(device: str, pattern: str) -> None:
    fast, inputs = fast_of(uvit(device), pattern, kernels={}), call(device)
    check(fast, *inputs)
    choices = sdm.explain(fast).choices
    measured = [choice for choice in choices if choice.dense_ms is not None]
    assert len(measured) >= 8
    for choice in measured:
        assert choice.sparse_ms is not None
        tried = choice.reason.split()[0] if choice.kernel == "dense" else choice.kernel
        charged = choice.sparse_ms + find_family(tried.split("/")[0]).call_ms
        assert (choice.kernel == "dense") == (charged >= 0.96 * choice.dense_ms)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestCudaGraphs:
    """What only a card can show."""

    def test_student_is_captured_by_its_user_while_an_answer_is_owed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
        fast, inputs = fast_of(uvit("cuda"), "2:4"), call("cuda")
        with torch.no_grad():
            expected = [fast(*inputs).clone() for _ in range(3)][-1]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = fast(*inputs)
            out.zero_()
            graph.replay()
        assert_same(out, expected)

    def test_transposable_student_trains_under_graphs_of_inductor(self) -> None:
        build_plan.cache_clear()
        model, inputs = uvit("cuda", torch.float32), call("cuda", dtype=torch.float32)
        student = sdm.compile(model, "2:4t", backend="inductor-graphs")
        for _ in range(4):  # warm, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            student.zero_grad()  # a graph writes gradients where the one before it did
            student(*inputs).square().mean().backward()
        assert_gradients(student, oracle_of(student), (inputs, {}), tolerance=1e-3)

    def test_weights_when_edited_are_seen_by_a_student_on_a_card(self) -> None:
        fast, inputs = fast_of(uvit("cuda"), "2:4"), call("cuda")
        for _ in range(3):
            check(fast, *inputs)
            with torch.no_grad():
                for parameter in fast.parameters():
                    parameter.mul_(1.1).roll(1)
        fast.float().to(BF16)  # at another address
        check(fast, *inputs)
