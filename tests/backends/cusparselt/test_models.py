"""Models whose weights the semi-structured kernels run, from compile to a file and back."""

from __future__ import annotations

import copy
import io
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends import packing
from sparsedm_compiler.backends.cusparselt.format import read_header
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.models.uvit import UViT
from tests.autotune.test_select_kernel import Net
from tests.backends.cuda.here import ROUNDING, kernels_of, semi_on_cpu
from tests.oracle import assert_same, oracle_of

both = pytest.mark.parametrize("backend", ["eager", "inductor"])
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _semi(monkeypatch: pytest.MonkeyPatch) -> None:
    semi_on_cpu(monkeypatch)


def fast_of(
    dtype: torch.dtype = BF16, pattern: str = "2:4", backend: str = "eager", **options: Any
) -> nn.Module:
    options = {"kernels": {"*": "sparse"}, **options}
    return sdm.compile(Net().to(dtype), pattern, mode="infer", backend=backend, **options)


def x_of(batch: int = 2, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(batch)).to(dtype)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert_same(ours, theirs, tolerance=ROUNDING[ours.dtype])


@pytest.mark.parametrize(
    ("pattern", "dtype", "backend"),
    [
        *product(("2:4", "1:8"), (torch.float16, BF16), ("eager",)),
        ("2:4", torch.float16, "inductor"),
        ("1:8", BF16, "inductor"),
    ],
)
def test_semi_models_match_the_oracle_for_every_batch(
    backend: str, dtype: torch.dtype, pattern: str
) -> None:
    fast = fast_of(dtype, pattern, backend)
    with torch.no_grad():
        for batch in (2, 3, 5):  # static shapes, then symbolic ones
            x = x_of(batch, dtype)
            assert_near(fast(x), oracle_of(fast)(x))
    found = kernels_of(fast)
    assert found.pop("line.weight") == "dense"
    assert set(found.values()) == {"cuda_semi"}
    assert "cuda_semi" in str(sdm.explain(fast))


@both
def test_semi_models_take_channels_last_images(backend: str) -> None:
    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(4, 16, 3), nn.Conv2d(32, 4, 1)
            self.wide = nn.Conv2d(16, 32, 3, padding=1, stride=2)
            self.point = nn.Conv2d(32, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wide(self.first(x))
            return self.last(torch.relu(self.point(x)))

    fast = sdm.compile(
        Convs().to(BF16), "2:4", mode="infer", backend=backend, kernels={"*": "sparse"}
    )
    with torch.no_grad():
        for size in (9, 10, 12):
            for form in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(2, 4, size, size).to(BF16).contiguous(memory_format=form)
                expected = oracle_of(fast)(x) if fast(x) is not None else x
                assert_near(fast(x), expected)
                assert fast(x).stride() == expected.contiguous(memory_format=form).stride()
    assert set(kernels_of(fast).values()) == {"cuda_semi"}


@both
def test_semi_models_match_the_oracle_on_a_small_uvit(backend: str) -> None:
    torch.manual_seed(0)
    net = UViT(img_size=8, patch_size=2, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    fast = sdm.compile(
        net.to(BF16).eval(), "2:4", mode="infer", backend=backend, kernels={"*": "sparse"}
    )
    x, t, y = (
        torch.randn(3, 3, 8, 8).to(BF16),
        torch.tensor([0.1, 0.5, 0.9]).to(BF16),
        torch.tensor([0, 1, 4]),
    )
    with torch.no_grad():
        ours = fast(x, t, y)
        assert_same(ours, oracle_of(fast)(x, t, y), tolerance=0.06)
    assert list(kernels_of(fast).values()).count("cuda_semi") >= 12


def test_autocast_runs_the_weights_in_its_dtype() -> None:
    fast = fast_of(torch.float32)
    with torch.autocast("cpu", BF16), torch.no_grad():
        out = fast(x_of(dtype=torch.float32))
        assert_near(out, oracle_of(fast)(x_of(dtype=torch.float32)))
    assert set(kernels_of(fast).values()) == {"dense", "cuda_semi"}
    plain = fast_of(torch.float32)
    plain(x_of(dtype=torch.float32))
    reasons = {choice.reason for choice in sdm.explain(plain).choices}
    assert any("no 2:4 kernel for float32: sparse tensor cores take" in why for why in reasons)


@pytest.mark.parametrize("pattern", ["3:4", "15:16"])
def test_patterns_beyond_two_of_four_stay_dense_with_the_reason(pattern: str) -> None:
    fast = fast_of(pattern=pattern)
    assert_same(fast(x_of()), oracle_of(fast)(x_of()))
    found = {choice.weight: choice for choice in sdm.explain(fast).choices}
    assert found["plain.weight"].kernel == "dense"
    assert found["plain.weight"].reason.startswith(f"{pattern} keeps up to ")


def finalized() -> tuple[nn.Module, Tensor]:
    fast = fast_of(finalize=True)
    expected = fast(x_of())
    assert_same(fast(x_of()), expected)
    assert fast.plain.weight.untyped_storage().nbytes() == 2
    return fast, expected


def test_a_finalized_model_and_its_copies_run() -> None:
    fast, expected = finalized()
    state, oracle = fast.state_dict(), oracle_of(fast_called())
    for name, tensor in oracle.state_dict().items():
        assert_same(state[name], tensor)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert_same(twin(x_of()), expected)
        assert twin.plain.weight.untyped_storage().nbytes() == 2


def fast_called() -> nn.Module:
    fast = fast_of()
    fast(x_of())
    return fast


def test_a_file_holds_the_portable_form_and_loads_dense(tmp_path: Path) -> None:
    fast, expected = finalized()
    sdm.save(fast, tmp_path / "file")
    held = load_file(tmp_path / "file")
    assert read_header(held["plain.weight.sparsedm_packed"]) == (BF16, 16, 16)
    loaded = sdm.load(tmp_path / "file", Net().to(BF16), backend="eager")
    oracle = oracle_of(fast_called())
    assert_same(loaded.plain.weight, oracle.plain.weight)
    assert_same(loaded(x_of()), expected)
    assert loaded.plain.weight.untyped_storage().nbytes() == 2  # packed anew
    assert_same(loaded(x_of()), expected)


def test_load_of_a_damaged_file_raises(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    fast, _ = finalized()
    sdm.save(fast, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(tmp_path / "file")
    for name, broken in (("short", slice(0, -1)), ("long", slice(0, 8))):
        damaged = {
            **tensors,
            "plain.weight.sparsedm_packed": tensors["plain.weight.sparsedm_packed"][broken].clone(),
        }
        save_file(damaged, tmp_path / name, meta)
        with pytest.raises(sdm.CheckpointError, match="metadata is damaged"):
            sdm.load(tmp_path / name, Net())
    renamed = {**meta, "sparsedm": meta["sparsedm"].replace('"cuda_semi"', '"cuda_gone"')}
    save_file(tensors, tmp_path / "renamed", renamed)
    with pytest.raises(sdm.CheckpointError, match="no kernel is called 'cuda_gone'"):
        sdm.load(tmp_path / "renamed", Net())


def test_a_machine_without_the_kernels_gets_the_dense_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, expected = finalized()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    with monkeypatch.context() as elsewhere:
        for family in list_families():
            elsewhere.setattr(type(family), "device", "elsewhere")
        twin = torch.load(file, weights_only=False)
        assert_near(twin(x_of()), expected)
        assert set(kernels_of(twin).values()) == {"dense"}
        assert_same(twin.plain.weight, oracle_of(fast_called()).plain.weight)


@pytest.mark.parametrize("kernel", ["cuda_semi", "cpu_free"])
def test_unpickling_ignores_map_location(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "cpu_free":
        monkeypatch.undo()
    fast = fast_of(finalize=True)
    fast(x_of())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False, map_location="meta")
    held = twin._sparsedm.weights
    assert {each.kernel.name for each in held.packed.values()} == {kernel}
    assert {each.data.device.type for each in held.packed.values()} == {"cpu"}
    held.settle(twin)
    assert held.packed == {}


def test_a_dtype_that_no_kernel_runs_brings_the_dense_weights_back() -> None:
    fast, expected = finalized()
    fast.float()
    assert_same(fast(x_of().float()), expected.float(), tolerance=2e-2)
    assert_same(fast.plain.weight, oracle_of(fast_called()).plain.weight.float())
    assert fast._sparsedm.weights.packed == {}
    half = fast_of(finalize=True)
    half(x_of())
    half.half()
    assert_same(half(x_of().half()).float(), expected.float(), tolerance=2e-2)
    assert half.plain.weight.untyped_storage().nbytes() == 2


def test_packed_weight_on_another_device_suits_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = finalized()
    packed = fast._sparsedm.weights.packed["plain.weight"]
    monkeypatch.setattr(packing, "find_families", lambda device: list_families())
    assert packed.suits(fast.plain.weight)
    assert not packed.suits(fast.plain.weight.to("meta"))
    assert not packed.suits(fast.plain.weight.float())


def test_settle_on_another_device_restores_the_values() -> None:
    fast, _ = finalized()
    folds = fast._sparsedm.weights
    fast.to("meta")
    folds.settle(fast)
    assert folds.packed == {}
    assert fast.plain.weight.stride() == (16, 1)
    assert fast.plain.weight.device.type == "meta"
