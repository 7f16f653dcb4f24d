"""What is timed of a product with an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sparsedm_compiler import Pattern
from sparsedm_compiler.autotune.measure import (
    COLD_BYTES,
    AutotuneBudget,
    KernelTrial,
    bind_calls,
    measure_kernels,
)
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.ops import nm_linear_op
from sparsedm_compiler.backends.kernel_family import KernelConfig, MatmulProblem
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask

FAMILY = CpuFamily()
needs_kernels = pytest.mark.skipif(FAMILY.why_unavailable() is not None, reason="needs a compiler")


@needs_kernels
@pytest.mark.parametrize("fused", [False, True])
def test_measure_kernels_leaves_out_an_activation_that_is_fused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fused: bool
) -> None:
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    inputs = torch.randn(3, 16)
    monkeypatch.setattr(
        "sparsedm_compiler.autotune.measure.make_input", lambda problem, device: inputs
    )
    outputs: dict[str, Any] = {}

    def time_calls(
        self: CpuFamily, calls: Mapping[str, Callable[[], Any]], device: Any, *, graphs: bool
    ) -> dict[str, float]:
        outputs.update({name: call()[0] for name, call in calls.items()})
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(CpuFamily, "time_calls", time_calls)
    weight, pattern = torch.randn(16, 16), Pattern.parse("2:4")
    problem = MatmulProblem((3, 16), torch.float32, act="gelu")
    trial = KernelTrial(weight, "w", pattern, (problem,), fused=fused)
    kernels = FAMILY.list_candidates(pattern, torch.float32)
    times = measure_kernels(trial, kernels, AutotuneBudget(9.0))
    product = F.linear(inputs, apply_mask(weight, nm_mask(weight, pattern)))
    assert times is not None
    assert set(times) == set(outputs) == {"dense", *map(str, kernels)}
    for out in outputs.values():
        torch.testing.assert_close(out, product if fused else F.gelu(product))


@needs_kernels
def test_small_weights_are_timed_out_of_the_cache_and_large_ones_as_they_lie() -> None:
    for rows, cols in ((32, 64), (2048, 2048)):
        weight, pattern = torch.randn(rows, cols), Pattern.parse("2:4")
        problem = MatmulProblem((1, cols), torch.float32)
        trial = KernelTrial(weight, "w", pattern, (problem,))
        kernels = FAMILY.list_candidates(pattern, torch.float32)[:2]
        small = rows == 32
        for cold in (False, True):
            read = count_read_copies(trial, kernels, cold=cold)
            assert read.keys() == {"dense", *map(str, kernels)}
            # Between two calls that read one copy, all copies of all calls have been read.
            assert all((count > 1) == (small and cold) for count in read.values())
            if small and cold:
                assert sum(read.values()) * weight.nbytes // 4 >= COLD_BYTES / 2
            bound = bind_calls(trial, kernels, cold=cold)
            first = {name: call()[0] for name, call in bound.items()}
            for name, call in bound.items():
                assert torch.equal(call()[0], first[name])


def count_read_copies(
    trial: KernelTrial, kernels: tuple[KernelConfig, ...], *, cold: bool
) -> dict[str, int]:
    """Returns the copies of the weight that each call takes turns on."""
    seen: dict[str, set[int]] = {}
    calls = bind_calls(trial, kernels, cold=cold)
    with WeightReads() as mode:
        for name, call in calls.items():
            for _ in range(1000):
                call()
                if mode.addresses[0] in seen.get(name, set()):
                    break
                seen.setdefault(name, set()).add(mode.addresses[0])
                mode.addresses.clear()
            mode.addresses.clear()
    return {name: len(addresses) for name, addresses in seen.items()}


class WeightReads(TorchFunctionMode):
    """Notes where the weight of every product lies."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func is nm_linear_op:
            self.addresses.append(args[1].data_ptr())
        return func(*args, **(kwargs or {}))
