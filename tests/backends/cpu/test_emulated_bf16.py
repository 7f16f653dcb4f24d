"""AMX and AVX512-BF16 on any CPU: the kernels compiled with these instructions in plain C++.

SPARSEDM_FUZZ=2000 pytest -n2 tests/backends/cpu/test_emulated_bf16.py    # so many random products
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsedm_compiler.backends.cpp_compiler import find_compiler
from sparsedm_compiler.backends.cpu import family, isa, ops, pack
from sparsedm_compiler.backends.cpu.abi import KernelArguments
from sparsedm_compiler.backends.cpu.build import HERE, list_flags
from sparsedm_compiler.backends.cpu.family import CpuFamily
from sparsedm_compiler.backends.cpu.format import BLOCKS, WIDE
from sparsedm_compiler.patterns import Pattern
from tests.backends.cpu import test_fuzz
from tests.backends.cpu.cases import bias_of, case, check_linear

COMPILER = find_compiler()
NUMBERS = int(os.environ.get("SPARSEDM_FUZZ", "100"))
PARTS = 2
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("bf16") / "emulated.so"
    flags = [*list_flags("", "DEFAULT"), "-O1", "-ffp-contract=off", "-Wno-psabi"]
    flags += os.environ.get("SPARSEDM_CXXFLAGS", "").split()  # make sanitize
    given = ["-include", str(Path(__file__).with_name("emulated_bf16.h")), "-fopenmp"]
    sources = [str(HERE / name) for name in ("kernel.cpp", "pack.cpp")]
    subprocess.run([str(COMPILER), *flags, *given, *sources, "-o", str(out)], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.sdm_run.argtypes = [ctypes.POINTER(KernelArguments)]
    loaded.sdm_pack.argtypes = [ctypes.c_void_p] * 3
    loaded.sdm_isa.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(autouse=True)
def _emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (ops, pack, isa):
        monkeypatch.setattr(module, "load_library", lambda: library)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("wide", [WIDE, BLOCKS])
@pytest.mark.parametrize("name", isa.ISAS)
def test_multiplies_exactly_by_every_instruction_set(name: str, wide: int) -> None:
    assert isa.multiplies_exactly(name, wide)


@pytest.mark.parametrize("name", isa.ISAS)
@pytest.mark.parametrize("text", ["1:2@16x32", "1:3@32x64", "2:3@48x32", "1:2@64x32"])
def test_nm_linear_of_blocks_matches_float64(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_find_isa_code", lambda: isa.ISAS.index(name))
    torch.manual_seed(0)
    for tokens, width in ((1, None), (15, 192), (16, None), (17, None), (32, 384), (77, None)):
        held = case(text, 4, 150, torch.bfloat16, width=width, wide=BLOCKS)
        x = torch.randn(tokens, held.masked.shape[1] + 3).bfloat16()[:, 1:-2]
        check_linear(held, x, bias_of(len(held.masked), torch.float32), "gelu", 1)


@pytest.mark.parametrize("part", range(PARTS))
def test_emulated_kernels_match_float64(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_fuzz, "select_isa", lambda: "amx")
    monkeypatch.setattr(test_fuzz, "DTYPES", (torch.bfloat16,))
    for number in range(part, NUMBERS, PARTS):
        test_fuzz.check_product(number, monkeypatch)


def test_list_candidates_has_the_kernel_of_blocks_where_it_was_seen_to_multiply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def list_names(text: str, dtype: torch.dtype = torch.bfloat16) -> set[str]:
        kernels = CpuFamily().list_candidates(Pattern.parse(text), dtype)
        return {kernel.name for kernel in kernels}

    monkeypatch.setattr(family, "select_isa", lambda: "amx")
    monkeypatch.setattr(family, "multiplies_blocks", lambda: True)
    assert list_names("1:2@64x32") == {"cpu_block", "cpu_wide", "cpu_shared"}
    assert "cpu_block" not in list_names("1:2@64x16") | list_names("1:2@8x32")
    assert list_names("1:2@64x32", torch.float32) == {"cpu_shared"}
    monkeypatch.setattr(family, "multiplies_blocks", lambda: False)
    assert list_names("1:2@64x32") == {"cpu_wide", "cpu_shared"}
