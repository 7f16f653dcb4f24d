"""A kernel family is one class, registered: compile, explain, save and load then know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler import ConfigError, PackError
from sparsedm_compiler.backends.custom_op import apply_activation, fake_linear, register
from sparsedm_compiler.backends.kernel_family import (
    KernelConfig,
    KernelFamily,
    MatmulProblem,
    OpCall,
    WeightFormat,
)
from sparsedm_compiler.backends.registry import (
    find_families,
    find_feature_major_ops,
    find_token_multiples,
    find_training_families,
    register_family,
    unregister_family,
)
from sparsedm_compiler.backends.weight_matrix import from_matrix, to_matrix
from sparsedm_compiler.patterns import NM, VNM, Pattern, SharedNM
from tests.oracle import assert_same, oracle_of


def run_toy(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, act: str) -> Tensor:
    return apply_activation(F.linear(x, packed, bias), act)


toy_linear_op = register(
    "toy_linear", "str act", {"CPU": run_toy}, fake=fake_linear, reference=run_toy
)


class ToyFamily(KernelFamily):
    """Stores shared-mask weights with their zeros and multiplies them by the dense op."""

    device = "cpu"
    names = ("toy",)
    accepts = (SharedNM,)

    def why_unavailable(self) -> str | None:
        return None

    def _refuse(self, pattern: Pattern, rows: int, cols: int, dtype: torch.dtype) -> str | None:
        return f"{rows} rows are too many for a toy" if rows > 16 else None

    def list_candidates(self, pattern: Pattern, dtype: torch.dtype) -> tuple[KernelConfig, ...]:
        return (KernelConfig("toy"),)

    def pack(self, weight: Tensor, mask: Tensor, pattern: Pattern, kernel: KernelConfig) -> Tensor:
        self.require_accepted(pattern)
        return to_matrix(weight.detach() * mask)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat) -> Tensor:
        return from_matrix(packed, shape[2:])

    def check(
        self, packed: Tensor, shape: tuple[int, ...], weight_format: WeightFormat
    ) -> torch.dtype:
        if tuple(packed.shape) != shape:
            raise PackError(f"it is packed as {tuple(packed.shape)}, not {shape}")
        return packed.dtype

    def call(
        self, problem: MatmulProblem, weight_format: WeightFormat, tile: tuple[int, ...]
    ) -> OpCall:
        return toy_linear_op, {"act": problem.act}

    def describe_machine(self) -> tuple[Any, ...]:
        return ("toy",)


class Net(nn.Module):
    """Four layers, of which the inner two are pruned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.plain, self.active = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.active(self.plain(self.first(x)))))


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def toy() -> Iterator[KernelFamily]:
    family = register_family(ToyFamily())
    yield family
    unregister_family(family)


def compile_toy(pattern: str = "2:4x4", **options: Any) -> nn.Module:
    kernels = {"*": "toy"}
    return sdm.compile(Net(), pattern, mode="infer", backend="eager", kernels=kernels, **options)


def reasons_of(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {choice.weight: (choice.kernel, choice.reason) for choice in sdm.explain(model).choices}


@pytest.mark.usefixtures("toy")
def test_compile_with_a_registered_family_runs_its_kernel() -> None:
    fast = compile_toy()
    with torch.no_grad():
        assert_same(fast(X), oracle_of(fast)(X))
    pinned = ("toy", "pinned by kernels=")
    assert reasons_of(fast) == {"plain.weight": pinned, "active.weight": pinned}
    assert " toy" in str(sdm.explain(fast))


@pytest.mark.usefixtures("toy")
def test_compile_without_a_pin_measures_a_registered_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_calls(self: KernelFamily, calls: Any, *_: Any, graphs: bool) -> dict[str, float]:
        return {name: 1.0 if name == "toy" else 2.0 for name in calls}

    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    monkeypatch.setattr(KernelFamily, "time_calls", time_calls)
    others = ["cpu_free", "cpu_shared", "cpu_wide"]
    fast = sdm.compile(Net(), "2:4x4", mode="infer", backend="eager", exclude_kernels=others)
    with torch.no_grad():
        assert_same(fast(X), oracle_of(fast)(X))
    assert set(reasons_of(fast).values()) == {("toy", "fastest measured")}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("finalize", [False, True])
def test_save_and_load_with_a_registered_family_round_trip(tmp_path: Path, finalize: bool) -> None:
    fast = compile_toy(finalize=finalize)
    with torch.no_grad():
        expected = fast(X)
        fast(X)
        sdm.save(fast, tmp_path / "toy.safetensors")
        loaded = sdm.load(tmp_path / "toy.safetensors", Net(), backend="eager")
        assert_same(loaded(X), expected)
    assert {kernel for kernel, _ in reasons_of(loaded).values()} == {"toy"}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("pattern", ["2:4", "4:2:8", "2:4t"])
def test_a_kind_of_pattern_that_is_not_listed_is_refused(pattern: str) -> None:
    fast = compile_toy(pattern)
    with torch.no_grad():
        assert_same(fast(X), oracle_of(fast)(X))
    sentence = f"toy runs SharedNM ({SharedNM.EXPLANATION}), not {pattern}"
    assert set(reasons_of(fast).values()) == {("dense", sentence)}


def test_why_refused_asks_the_family_only_about_accepted_patterns(toy: KernelFamily) -> None:
    assert toy.why_refused(SharedNM(2, 4, 4), 16, 16, torch.float32) is None
    assert toy.why_refused(SharedNM(2, 4, 4), 32, 16, torch.float32) == (
        "32 rows are too many for a toy"
    )
    with pytest.raises(PackError, match="toy runs SharedNM"):
        toy.pack(torch.ones(16, 16), torch.ones(16, 16), NM(2, 4), KernelConfig("toy"))


def test_find_accepted_returns_the_first_implied_pattern_of_a_listed_kind() -> None:
    (cpu,) = find_families("cpu")
    assert cpu.find_accepted(SharedNM(2, 4, 4)) == SharedNM(2, 4, 4)
    assert cpu.find_accepted(VNM(2, 8, 64)) == NM(2, 8)
    assert ToyFamily().find_accepted(VNM(2, 8, 64)) is None


def test_register_family_with_a_name_that_exists_raises(toy: KernelFamily) -> None:
    with pytest.raises(ConfigError, match="there is a kernel 'toy' already"):
        register_family(ToyFamily())
    assert find_families("cpu")[1:] == (toy,)


def test_compile_with_a_family_that_is_not_registered_raises() -> None:
    with pytest.raises(ConfigError, match="kernel 'toy' is none of auto, dense, sparse, cpu_free"):
        compile_toy()


def test_declared_ops_of_a_registered_family_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "token_multiple": 24,
        "token_ops": (toy_linear_op,),
        "feature_major_op": toy_linear_op,
        "training_op": toy_linear_op,
    }.items():
        monkeypatch.setattr(ToyFamily, name, value)
    family = register_family(ToyFamily())
    try:
        assert find_token_multiples()[toy_linear_op] == 24
        assert toy_linear_op in find_feature_major_ops()
        assert find_training_families()[-1] is family
    finally:
        unregister_family(family)
    assert toy_linear_op not in {*find_token_multiples(), *find_feature_major_ops()}
