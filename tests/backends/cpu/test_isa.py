"""The instruction set for widely shared bfloat16 masks is one that was seen to multiply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsedm_compiler.backends.cpu import isa, ops
from sparsedm_compiler.backends.cpu.build import load_library


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    isa.select_isa.cache_clear()
    yield
    isa.select_isa.cache_clear()


def test_select_isa_on_this_machine_multiplies_exactly() -> None:
    assert ops.select_isa is isa.select_isa
    assert isa.multiplies_exactly("plain")
    assert isa.multiplies_exactly(isa.select_isa())


@pytest.mark.skipif(
    load_library().sdm_isa() != b"avx512" or not torch.cpu._is_avx512_bf16_supported(),
    reason="the CPU has no AVX512-BF16",
)
def test_select_isa_when_one_miscalculates_returns_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isa.select_isa() in ("dpbf16", "amx")
    isa.select_isa.cache_clear()
    monkeypatch.setattr(isa, "multiplies_exactly", lambda name: False)
    assert isa.select_isa() == "plain"
