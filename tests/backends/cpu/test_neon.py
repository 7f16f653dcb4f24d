"""The kernels on ARM: compiled with the vectors of aarch64 and run by an emulator.

SPARSEDM_FUZZ=2000 pytest -n2 tests/backends/cpu/test_neon.py    # so many random products
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sparsedm_compiler.backends.cpu import isa, ops, pack
from tests.backends.cpu.emulation import EmulatedLibrary, build, why_no_emulation
from tests.backends.cpu.test_fuzz import check_product

NUMBERS = int(os.environ.get("SPARSEDM_FUZZ", "100"))
PARTS = 4
missing = why_no_emulation()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedLibrary]:
    emulated = EmulatedLibrary(build(tmp_path_factory.mktemp("neon")))
    yield emulated
    emulated.close()


@pytest.fixture(autouse=True)
def _on_arm(library: EmulatedLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (ops, pack, isa):
        monkeypatch.setattr(module, "load_library", lambda: library)
    yield
    torch.set_num_threads(1)


def test_sdm_isa_on_aarch64_is_neon(library: EmulatedLibrary) -> None:
    assert library.sdm_isa() == b"neon"


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_of_neon_match_float64(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(part, NUMBERS, PARTS):
        check_product(number, monkeypatch)
