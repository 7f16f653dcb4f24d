"""The kernels that the search tries, for every kind of vectors."""

from __future__ import annotations

import pytest
import torch

from sparsedm_compiler.backends.cpu import family
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.patterns import Pattern

WIDEST = {"avx512": 12, "neon": 12, "avx2": 6, "portable": 6}
"""Vectors of tokens whose sums for two rows the registers hold, as in multiply.h."""


@pytest.mark.parametrize("isa", WIDEST)
@pytest.mark.parametrize("text", ["3:4", "2:4", "1:4", "1:8", "1:16", "2:4x4", "1:2@64x16"])
def test_list_candidates_tries_no_kernel_twice(
    isa: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "read_isa", lambda: isa)
    kernels = CpuFamily().list_candidates(Pattern.parse(text), torch.float32)
    widest = 6 if "x" in text else WIDEST[isa]
    held = [(kernel.layout, min(kernel.tile[0], widest)) for kernel in kernels]
    assert len(held) == len(set(held)) >= 2
    assert all(kernel.tile[0] <= widest for kernel in kernels)
