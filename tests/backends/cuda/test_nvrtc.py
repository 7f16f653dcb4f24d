"""The CUDA kernels compile to the instructions they are meant for; no GPU is needed for that."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedm_compiler import KernelError
from sparsedm_compiler.backends.cuda import nvrtc
from sparsedm_compiler.backends.cuda.family import hash_sources
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.backends.vnm.launch import (
    Tile,
    read_sources,
    specify_linear,
    specify_transpose,
)

pytestmark = pytest.mark.skipif(nvrtc.why_unavailable() is not None, reason="needs NVRTC")
BIG = Tile(64, 64, 4, 2, 4)


def disassembler() -> Path | None:
    """Triton brings one along."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "backends/nvidia/bin/nvdisasm"
    return path if path.exists() else None


def code(
    dtype: torch.dtype, capability: tuple[int, int], tile: Tile = BIG, act: str = "gelu"
) -> bytes:
    build = specify_linear(
        tile, 8, 64, dtype=dtype, bias=dtype, act=act, feature_major=tile is not BIG
    )
    return nvrtc.compile_kernel(read_sources(), capability, build.macros)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_compile_kernel_for_every_capability_gives_machine_code(
    capability: tuple[int, int],
) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert code(dtype, capability)[:4] == b"\x7fELF"


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compile_kernel_uses_sparse_tensor_core_instructions(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    (tmp_path / "code.cubin").write_bytes(code(dtype, (9, 0)))
    command = [str(disassembler()), "-c", str(tmp_path / "code.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = text.count("HMMA.SP.16832.F32" + (".BF16" if dtype == torch.bfloat16 else ""))
    assert products == 4 * 8  # row tiles by token tiles of a warp, once: the loop is not unrolled
    assert text.count("LDSM.16.MT88.4") == 8
    assert not {"LDL", "STL"} & {*text.split()}  # nothing spills


def test_compile_kernel_twice_reads_the_code_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "cache_folder", lambda name: tmp_path)
    first = nvrtc.compile_kernel(read_sources(), (9, 0), specify_transpose(torch.float16).macros)
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert (
        nvrtc.compile_kernel(read_sources(), (9, 0), specify_transpose(torch.float16).macros)
        == first
    )
    assert len([*tmp_path.iterdir()]) == 1


def test_compile_kernel_of_bad_source_raises_the_compilers_words() -> None:
    with pytest.raises(KernelError, match='identifier "nonsense" is undefined'):
        nvrtc.compile_kernel("__global__ void f() { nonsense; }", (9, 0), ())


def test_compile_kernel_for_an_unknown_capability_raises() -> None:
    with pytest.raises(KernelError, match=r"does not know compute capability 99\.0"):
        nvrtc.compile_kernel(read_sources(), (99, 0), ())


def test_load_nvrtc_without_the_library_raises_with_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(KernelError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.load_nvrtc.__wrapped__()


def test_launch_structures_when_compared_with_those_of_cuda_h_lie_alike() -> None:
    config, attribute = nvrtc._LaunchConfig, nvrtc._LaunchAttribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    assert (config.stream.offset, config.attributes.offset, config.count.offset) == (32, 40, 48)
    assert (attribute.value.offset, nvrtc._OVERLAP.value[0]) == (8, 1)


class Driver:
    """A driver in which the threads of a list have a context."""

    def __init__(self, *bound: threading.Thread) -> None:
        self.bound = [*bound]
        self.calls: list[str] = []

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802 - the driver's name
        context._obj.value = 7 if threading.current_thread() in self.bound else None
        return 0

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> int:
            self.calls.append(name)
            return 0

        return call


def test_bind_context_gives_a_thread_one_once_and_leaves_those_that_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_load_driver", lambda: driver)

    def bind() -> None:
        for _ in range(3):
            nvrtc.bind_context(0)

    for knows in (True, False):
        thread = threading.Thread(target=bind)
        driver.bound = [thread] * knows
        thread.start()
        thread.join()
        binding = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
        assert driver.calls == ([] if knows else binding)


def test_hash_sources_depends_on_the_kernels_of_a_family_and_of_all(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("a")
    (tmp_path / "notes.md").write_text("a")
    before = hash_sources.__wrapped__(tmp_path)
    (tmp_path / "notes.md").write_text("b")
    assert hash_sources.__wrapped__(tmp_path) == before
    (tmp_path / "kernels.py").write_text("b")
    assert hash_sources.__wrapped__(tmp_path) != before
    hashes = {
        family.describe_machine()[-1] for family in list_families() if family.device == "cuda"
    }
    assert len(hashes) == 5  # wgmma and cusparselt have two families each in one folder
