"""Sentences about cards that this machine does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsedm_compiler.backends.cuda import device as cuda_device
from sparsedm_compiler.backends.cuda.device import (
    CudaDevice,
    find_device,
    note_cusparselt,
    why_no_cusparselt,
    why_no_fp8_cores,
    why_no_nvrtc,
    why_no_tensor_cores,
)

H100 = CudaDevice("NVIDIA H100", (9, 0), cuda="13.0", cusparselt=(0, 8, 1))
T4 = replace(H100, name="Tesla T4", capability=(7, 5))
A100 = replace(H100, name="NVIDIA A100", capability=(8, 0))
MI300 = replace(H100, name="MI300X", capability=(9, 4), cuda=None, hip="6.4", cusparselt=None)
WINDOWS = replace(H100, platform="win32", cusparselt=None)


def test_why_no_functions_on_an_h100_return_none() -> None:
    for sentence in (why_no_tensor_cores, why_no_fp8_cores, why_no_cusparselt, why_no_nvrtc):
        assert sentence(H100) is None
        assert sentence(None) == "no CUDA device can be used"


def test_why_no_tensor_cores_on_an_old_device_names_its_capability() -> None:
    assert why_no_tensor_cores(T4) == (
        "no sparse tensor cores: Tesla T4 has compute capability 7.5, 8.0 is needed"
    )
    assert why_no_tensor_cores(A100) is None
    assert why_no_fp8_cores(A100) == (
        "no sparse tensor cores for float8: NVIDIA A100 has compute capability 8.0, 8.9 is needed"
    )
    assert why_no_fp8_cores(replace(A100, capability=(8, 9))) is None


def test_why_no_functions_on_rocm_name_it() -> None:
    for sentence in (why_no_tensor_cores, why_no_fp8_cores, why_no_nvrtc):
        assert "torch is built for ROCm" in str(sentence(MI300))


@pytest.mark.parametrize("version", [(0, 7, 1), (0, 8, 0), (0, 8, 1), (0, 9, 0), (1, 0, 0)])
def test_why_no_cusparselt_for_any_version_refuses_none(version: tuple[int, int, int]) -> None:
    device = replace(H100, cusparselt=version)
    assert why_no_cusparselt(device) is None
    slow = version < (0, 8, 1)
    number = ".".join(map(str, version))
    note = f"cuSPARSELt {number} is slower on some cards than 0.8.1" if slow else None
    assert note_cusparselt(device) == note


def test_why_no_cusparselt_on_windows_refuses_and_nvrtc_runs() -> None:
    assert "wheels for Windows" in str(why_no_cusparselt(WINDOWS))
    assert why_no_nvrtc(WINDOWS) is None
    assert "built without it" in str(why_no_cusparselt(replace(WINDOWS, platform="linux")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_find_device_without_a_gpu_returns_none() -> None:
    assert find_device() is None
    assert find_device(3) is None


def test_find_device_when_the_driver_fails_returns_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> CudaDevice:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_device, "_read_device", fails)
    assert find_device(0) is None


def test_read_cusparselt_version_without_the_library_returns_the_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", absent)
    assert cuda_device._read_cusparselt_version() == (0, 8, 1)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    assert cuda_device._read_cusparselt_version() is None
