"""The name of a CPU tells apart those that their hosts call alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsedm_compiler.backends.processor import read_cpu_name

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    read_cpu_name.cache_clear()
    yield
    read_cpu_name.cache_clear()


def read_of(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    read_cpu_name.cache_clear()
    return read_cpu_name()


def test_read_cpu_name_tells_two_models_of_one_name_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [read_of(X86.format(model=model), monkeypatch) for model in (1, 17)]
    assert names == ["AMD EPYC, family 25, model 1", "AMD EPYC, family 25, model 17"]


def test_read_cpu_name_of_arm_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert read_of(ARM, monkeypatch) == "aarch64, CPU implementer 0x41, CPU part 0xd40"


def test_read_cpu_name_without_cpuinfo_names_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    read_cpu_name.cache_clear()
    assert read_cpu_name() == "arm"
