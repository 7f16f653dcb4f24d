"""The engine for widely shared bfloat16 masks is one that was seen to multiply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparsedm_compiler.backends.cpu import isa as engines
from sparsedm_compiler.backends.cpu import ops
from sparsedm_compiler.backends.cpu.build import library


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    engines.engine.cache_clear()
    yield
    engines.engine.cache_clear()


def test_the_engine_of_this_machine_multiplies() -> None:
    assert ops.engine is engines.engine
    assert engines.multiplies("plain")
    assert engines.multiplies(engines.engine())


@pytest.mark.skipif(
    library().sdm_isa() != b"avx512" or not torch.cpu._is_avx512_bf16_supported(),
    reason="the CPU has no AVX512-BF16",
)
def test_one_that_miscalculates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.engine() in ("dpbf16", "amx")
    engines.engine.cache_clear()
    monkeypatch.setattr(engines, "multiplies", lambda name: False)
    assert engines.engine() == "plain"
