"""Sentences about cards that this machine does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsedm_compiler.backends.cuda import device as support
from sparsedm_compiler.backends.cuda.device import (
    Card,
    card,
    no_cusparselt,
    no_fp8_cores,
    no_nvrtc,
    no_tensor_cores,
)

H100 = Card("NVIDIA H100", (9, 0), cuda="13.0", cusparselt=(0, 8, 1))
T4 = replace(H100, name="Tesla T4", capability=(7, 5))
A100 = replace(H100, name="NVIDIA A100", capability=(8, 0))
MI300 = replace(H100, name="MI300X", capability=(9, 4), cuda=None, hip="6.4", cusparselt=None)
WINDOWS = replace(H100, platform="win32", cusparselt=None)


def test_an_h100_runs_everything() -> None:
    for sentence in (no_tensor_cores, no_fp8_cores, no_cusparselt, no_nvrtc):
        assert sentence(H100) is None
        assert sentence(None) == "no CUDA device can be used"


def test_old_cards_are_named_with_what_they_lack() -> None:
    assert no_tensor_cores(T4) == (
        "no sparse tensor cores: Tesla T4 has compute capability 7.5, 8.0 is needed"
    )
    assert no_tensor_cores(A100) is None
    assert no_fp8_cores(A100) == (
        "no sparse tensor cores for float8: NVIDIA A100 has compute capability 8.0, 8.9 is needed"
    )
    assert no_fp8_cores(replace(A100, capability=(8, 9))) is None


def test_rocm_is_named() -> None:
    for sentence in (no_tensor_cores, no_fp8_cores, no_nvrtc):
        assert "torch is built for ROCm" in str(sentence(MI300))


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ((0, 7, 1), False),
        ((0, 8, 0), False),
        ((0, 8, 1), True),
        ((0, 9, 0), True),
        ((1, 0, 0), True),
    ],
)
def test_old_cusparselt_is_refused(version: tuple[int, int, int], fits: bool) -> None:
    why = no_cusparselt(replace(H100, cusparselt=version))
    assert (why is None) == fits
    if why is not None:
        assert why.startswith(f"cuSPARSELt {'.'.join(map(str, version))} is too old")
        assert "0.8.0, which is slower than dense on H100" in why


def test_windows_has_nvrtc_but_no_cusparselt() -> None:
    assert "wheels for Windows" in str(no_cusparselt(WINDOWS))
    assert no_nvrtc(WINDOWS) is None
    assert "built without it" in str(no_cusparselt(replace(WINDOWS, platform="linux")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_here_is_no_card() -> None:
    assert card() is None
    assert card(3) is None


def test_a_device_that_fails_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(index: int) -> Card:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "_card", fails)
    assert card(0) is None


def test_the_version_of_the_header_stands_in_for_a_library_that_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(support.ctypes, "CDLL", absent)
    assert support._cusparselt() == (0, 8, 1)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    assert support._cusparselt() is None
