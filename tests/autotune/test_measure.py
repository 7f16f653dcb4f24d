"""What is timed of a product with an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compiler import Pattern
from sparsedm_compiler.autotune.measure import AutotuneBudget, KernelTrial, measure_kernels
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.kernel_family import MatmulProblem
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
