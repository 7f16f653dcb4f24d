"""Which kernel runs a folded weight, and the reason that explain shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.autotune import measure as measuring
from sparsedm_compiler.backends.kernel_family import KernelFamily
from tests.oracle import assert_same, oracle_of


class Net(nn.Module):
    """A first and a last layer that stay dense, and between them one of each kind of use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.plain, self.active, self.twice = (nn.Linear(16, 16) for _ in range(3))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.line = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.active(self.plain(self.first(x))), approximate="tanh")
        x = self.twice(self.twice(x))
        image = F.silu(self.conv(x.transpose(1, 2).unflatten(2, (4, -1)))).flatten(2)
        return self.last(self.line(image).transpose(1, 2))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of choices; the kernels built are those of all tests."""
    monkeypatch.setattr(measuring, "cache_folder", lambda name: tmp_path)
    return tmp_path


def fast_of(**options: Any) -> nn.Module:
    return sdm.compile(Net(), "2:4", mode="infer", **{"backend": "eager", **options})


def choices(model: nn.Module) -> dict[str, sdm.Choice]:
    return {choice.weight: choice for choice in sdm.explain(model).choices}


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))


def measured(monkeypatch: pytest.MonkeyPatch, **times: float) -> list[set[str]]:
    """Make every measurement come out as ``times`` (dense, and any kernel); what was measured."""
    seen: list[set[str]] = []

    def fake(calls: dict[str, Any]) -> dict[str, float]:
        for call in calls.values():
            call()
        seen.append({name.partition("/")[0] for name in calls})
        return {name: times["dense" if name == "dense" else "sparse"] for name in calls}

    monkeypatch.setattr(KernelFamily, "time_calls", lambda self, calls, *_, graphs: fake(calls))
    return seen


@pytest.mark.usefixtures("cache")
def test_autotuning_when_one_kernel_is_faster_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for sparse, kernel in ((1.0, "cpu_free"), (1.9, "cpu_free"), (1.91, "dense"), (1.95, "dense")):
        with monkeypatch.context() as patched:
            patched.setattr(measuring, "_read_times", lambda path: None)
            seen = measured(patched, dense=2.0, sparse=sparse)
            fast = fast_of()
            out = fast(X)
        assert_same(out, oracle_of(fast)(X), tolerance=1e-5)
        found = choices(fast)
        assert seen == [{"dense", "cpu_free"}] * 4
        assert {found[w].kernel for w in ("plain.weight", "conv.weight")} == {kernel}
        assert (found["plain.weight"].dense_ms, found["plain.weight"].sparse_ms) == (2.0, sparse)
        assert found["line.weight"].reason.startswith("read by conv1d")
        assert found["twice.weight"].inputs == ((2, 8, 16), (2, 8, 16))


def test_autotuning_when_run_again_reads_the_choice_from_disk(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measured(monkeypatch, dense=2.0, sparse=1.0)
    fast_of()(X)
    files = sorted(cache.glob("*.json"))
    assert len(seen) == len(files) == 4
    again = fast_of()
    again(X)
    assert len(seen) == 4
    assert choices(again)["plain.weight"].sparse_ms == 1.0
    for file in files:
        file.write_text("{")  # cut short by a full disk
    fast_of()(X)
    assert len(seen) == 8
    assert json.loads(files[0].read_text())["dense"] == 2.0
    torch.set_num_threads(2)
    try:
        fast_of()(X)
    finally:
        torch.set_num_threads(1)
    assert len(seen) == 12  # other threads, other times


def refuses() -> None:
    raise sdm.KernelError("not this size")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "call",
    [refuses, lambda: [torch.ones(2, 8, 16)] * 2, lambda: [torch.full((2, 8, 16), torch.nan)] * 2],
    ids=["refuses", "wrong", "NaN"],
)
def test_autotuning_when_a_kernel_fails_its_check_keeps_dense(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, dense=2.0, sparse=1.0)
    monkeypatch.setattr(measuring, "_sparse_calls", lambda *about: call)
    for _ in range(2):  # measured, then from disk
        fast = fast_of(kernels={"conv": "dense"})
        assert_same(fast(X), oracle_of(fast)(X))
        found = choices(fast)["plain.weight"]
        assert (found.kernel, found.sparse_ms) == ("dense", None)
        assert found.reason == "cpu_free refused its size, or gave other numbers than dense"


@pytest.mark.usefixtures("cache")
def test_autotuning_without_time_keeps_dense_with_the_reason() -> None:
    fast = fast_of(autotune_seconds=0)
    assert_same(fast(X), oracle_of(fast)(X))
    found = choices(fast)["plain.weight"]
    assert (found.kernel, found.dense_ms) == ("dense", None)
    assert found.reason == "not measured: autotune_seconds=0 were spent"


@pytest.mark.usefixtures("cache")
def test_kernels_when_pinned_or_excluded_are_chosen_or_not() -> None:
    fast = fast_of(kernels={"plain": "cpu_free", "conv": "dense", "active": "cpu_shared"})
    fast(X)
    found = choices(fast)
    assert found["plain.weight"].kernel == "cpu_free"
    assert found["conv.weight"].kernel == "dense"
    assert found["plain.weight"].reason == found["conv.weight"].reason == "pinned by kernels="
    assert "'cpu_shared', asked by kernels=, does not run" in found["active.weight"].reason
    fast = fast_of(exclude_kernels="cpu_free")
    fast(X)
    assert choices(fast)["plain.weight"].reason == "every kernel for it is in exclude_kernels="
    assert {choice.kernel for choice in choices(fast).values()} == {"dense"}


def test_layers_with_shared_masks_get_their_own_kernel() -> None:
    fast = sdm.compile(Net(), "2:4x4", mode="infer", backend="eager", kernels={"*": "sparse"})
    fast(X)
    assert choices(fast)["plain.weight"].kernel == "cpu_shared"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernels": {"plain": "fast"}}, "kernel 'fast' is none of auto, dense, sparse"),
        ({"kernels": {"plane": "dense"}}, "kernels 'plane' names no parameter"),
        ({"exclude_kernels": ["amx"]}, "kernel 'amx' is none of"),
        ({"mode": "train", "finalize": True}, "finalize=True drops the dense weights"),
    ],
)
def test_kernel_options_with_bad_values_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(sdm.ConfigError, match=said):
        sdm.compile(Net(), "2:4", **{"mode": "infer", **options})


def test_activations_after_a_sparse_layer_are_fused_into_the_kernel() -> None:
    graphs: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm.code)
        return gm

    fast = fast_of(backend=backend, kernels={"*": "sparse"})
    assert_same(fast(X), oracle_of(fast)(X), tolerance=1e-5)
    assert "'gelu_tanh'" in graphs[0]
    assert "'silu'" in graphs[0]
    assert "torch._C._nn.gelu" not in graphs[0]
    assert "functional.silu" not in graphs[0]
    assert graphs[0].count("sparsedm.nm_linear") == 4


def test_layer_with_a_bias_not_of_one_value_per_row_stays_dense() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
            self.shift = nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.net[0](x)
            return self.net[2](F.linear(x, self.net[1].weight, self.shift))

    fast = sdm.compile(Odd(), "2:4", mode="infer", backend="eager", kernels={"*": "sparse"})
    assert_same(fast(X), oracle_of(fast)(X))
    assert "a bias that is not one value per row" in choices(fast)["net.1.weight"].reason


@pytest.mark.usefixtures("cache")
def test_autotuning_under_another_default_device_decides_the_same() -> None:
    expected = fast_of(kernels={"*": "sparse"})(X)
    fast, measured_too = fast_of(kernels={"*": "sparse"}), fast_of()
    with torch.device("meta"):
        assert_same(fast(X), expected)
        measured_too(X)
    assert choices(measured_too)["plain.weight"].dense_ms is not None


@pytest.mark.parametrize("backend", ["inductor", "inductor-graphs"])
def test_graph_around_sparse_kernels_with_inductor_runs(backend: str) -> None:
    fast = fast_of(backend=backend, kernels={"*": "sparse"})
    with torch.no_grad():
        for batch in (2, 3, 5):  # static shapes, then symbolic ones
            x = torch.randn(batch, 8, 16)
            assert_same(fast(x), oracle_of(fast)(x), tolerance=1e-5)
    assert {choice.kernel for choice in choices(fast).values()} == {"dense", "cpu_free"}


def test_gradients_of_the_input_through_sparse_kernels_match_oracle() -> None:
    fast = fast_of(kernels={"*": "sparse"})
    x = X.clone().requires_grad_()
    (ours,) = torch.autograd.grad(fast(x).sin().sum(), x)
    twin = X.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(oracle_of(fast)(twin).sin().sum(), twin)
    assert_same(ours, theirs, tolerance=1e-5)
