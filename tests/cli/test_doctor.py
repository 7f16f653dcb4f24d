"""``sparsedm doctor``: this machine and made-up ones; a broken part is a line, no traceback."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cuda.device import CudaDevice
from sparsedm_compiler.backends.registry import list_families
from sparsedm_compiler.cli import inspect_machine as gathering
from sparsedm_compiler.cli import main
from sparsedm_compiler.cli.inspect_machine import hide_home, inspect_machine
from sparsedm_compiler.optional_deps import EXTRAS
from tests.cli.conftest import Shell

FAMILIES = (
    *("cusparselt.family", "cusparselt.quantized"),
    *("fp8.family", "vnm.family", "gather.family"),
)
EXACT = {"cuda_vnm", "cuda_gather", "triton_block", "cuda_semi"}
ROOT = Path(__file__).parents[2]
TORCH = importlib.metadata.version("torch")
"""The version of the package, which need not name the build."""


def set_card(patch: pytest.MonkeyPatch, capability: tuple[int, int], **facts: Any) -> None:
    """Let this machine have one card, for torch and for the families, and all libraries."""
    card = CudaDevice("Made-up", capability, cuda="13.0", cusparselt=(0, 8, 0))
    for module in (*FAMILIES, "wgmma.family"):
        patch.setattr(f"sparsedm_compiler.backends.{module}.find_device", lambda: card)
    for module in (
        "vnm.family",
        "fp8.family",
        "gather.family",
        "wgmma.family",
        "cusparselt.quantized",
    ):
        name = f"sparsedm_compiler.backends.{module}.why_unavailable"
        patch.setattr(name, lambda: None)
    major, minor = capability
    properties = SimpleNamespace(
        **{"name": "Made-up", "major": major, "minor": minor, "multi_processor_count": 7},
        total_memory=3 * 2**30,
    )
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def no_card(patch: pytest.MonkeyPatch) -> None:
    """Let this machine have no card, and its driver's program not be there."""
    for module in (*FAMILIES, "wgmma.family"):
        patch.setattr(f"sparsedm_compiler.backends.{module}.find_device", lambda: None)
    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setenv("PATH", "/nowhere")


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    """Let this machine have no C++ compiler."""
    patch.setattr("sparsedm_compiler.backends.cpp_compiler.find_compiler", lambda: None)
    sentence = "no C++ compiler here to build CPU kernels with"
    patch.setattr("sparsedm_compiler.backends.cpu.family.why_unavailable", lambda: sentence)


def write_program(folder: Path, text: str) -> None:
    """Write a program that stands for nvidia-smi."""
    folder.mkdir()
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_doctor_lists_every_kernel_with_its_familys_own_reason(shell: Shell) -> None:
    result = shell("doctor")
    assert result.status == (0 if any(f.why_unavailable() is None for f in list_families()) else 1)
    for family in list_families():
        reason = family.why_unavailable()
        names = f"{', '.join(family.names)} ({family.device})"
        line = f"  yes {names}" if reason is None else f"  no  {names}: {reason}"
        assert line in result.out.splitlines()
        assert f"\n      {'; '.join(kind.EXPLANATION for kind in family.accepts)}\n" in result.out
    assert re.search(rf"torch +{re.escape(TORCH)}, built for ", result.out)
    assert f"sparsedm_compiler {sdm.__version__}, python " in result.out
    assert "problems" not in result.out


def test_doctor_json_holds_what_the_text_says(shell: Shell) -> None:
    alone = shell("doctor", "--json")
    values = json.loads(alone.out)
    assert [kernel for entry in values["families"] for kernel in entry["kernels"]] == [
        name for family in list_families() for name in family.names
    ]
    assert values["versions"]["torch"] == TORCH
    assert values["cpu"]["threads"] == torch.get_num_threads()
    assert values["runs_sparse"] is (alone.status == 0)
    beside = shell("doctor", "--json", "machine.json")
    assert "runs here: " in beside.out
    written = json.loads((shell.folder / "machine.json").read_text())
    assert written["families"] == values["families"]
    assert json.loads(shell("doctor", "--json", "-").out)["libraries"] == values["libraries"]
    assert "it is a folder, name a file" in shell("doctor", "--json", shell.folder).reason


def test_doctor_without_compiler_and_card_says_so_and_exits_with_1(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch)
    no_card(monkeypatch)
    result = shell("doctor")
    assert result.status == 1
    sentence = "no C++ compiler here to build CPU kernels with"
    assert f"  no  cpu_free, cpu_shared, cpu_wide, cpu_block (cpu): {sentence}\n" in result.out
    assert re.search(r"C\+\+ compiler +not there\n", result.out)
    assert re.search(r"card +none that torch can use\n", result.out)
    assert re.search(r"NVIDIA driver +not there", result.out)
    assert result.out.endswith("runs here: no sparse kernel; pruned weights run masked dense\n")
    assert "yes" not in [line[2:5] for line in result.out.splitlines()]
    assert json.loads(shell("doctor", "--json").out)["runs_sparse"] is False


@pytest.mark.parametrize(
    ("capability", "running"),
    [
        ((7, 5), set()),
        ((8, 0), EXACT | {"cuda_semi_int8"}),
        ((8, 9), EXACT | {"cuda_semi_fp8", "cuda_semi_int8", "cuda_fp8"}),
    ],
    ids=["turing", "ampere", "ada"],
)
def test_doctor_on_cards_of_other_kinds_names_what_runs(
    capability: tuple[int, int], running: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_card(monkeypatch, capability)
    no_compiler(monkeypatch)
    report = inspect_machine()
    assert {name for family in report.families if family.runs for name in family.kernels} == running
    assert report.runs_sparse is bool(running)
    (card,) = report.cards
    assert (card.name, card.memory_gib, card.multiprocessors) == ("Made-up", 3.0, 7)
    assert card.capability == ".".join(map(str, capability))
    families = {family.kernels[0]: family for family in report.families}
    reason = families["cuda_block"].reason
    assert reason is not None
    assert "9.0 is needed" in reason
    assert families["cuda_semi"].note == "cuSPARSELt 0.8.0 is slower on some cards than 0.8.1"
    assert "kernels= names it" in families["cuda_semi_fp8"].note


def test_doctor_on_a_hopper_card_runs_all_cuda_kernels(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_card(monkeypatch, (9, 0))
    out = shell("doctor").out
    for family in list_families():
        if family.device == "cuda":
            assert f"  yes {', '.join(family.names)} (cuda)\n" in out
    assert out.count("\n      cuSPARSELt 0.8.0 is slower on some cards than 0.8.1") == 3
    assert re.search(r"card 0 +Made-up, compute capability 9.0, 3 GiB, 7 multiprocessors", out)


def test_doctor_with_a_broken_driver_prints_lines(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raising(*_: object) -> bool:
        raise OSError("libcuda.so.1:\n  file too short")

    write_program(tmp_path / "bin", "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", raising)
    monkeypatch.setattr("sparsedm_compiler.backends.vnm.family.find_device", raising)
    monkeypatch.setattr("sparsedm_compiler.backends.vnm.family.list_nvrtc", raising)
    result = shell("doctor")
    words = "OSError: libcuda.so.1: file too short"
    for line in (
        "  nvidia-smi does not answer: NVIDIA-SMI has failed: no driver",
        f"  the cards cannot be read: {words}",
        f"  the libraries of cuda_vnm cannot be read: {words}",
        f"  no  cuda_vnm (cuda): its check failed: {words}",
    ):
        assert line in result.out.splitlines()
    assert result.err == ""


def test_doctor_shows_a_warning_of_the_driver_as_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> bool:
        import warnings

        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert "CUDA initialization: the driver is too old" in inspect_machine().problems


def test_doctor_names_a_card_that_torch_cannot_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_card(monkeypatch)
    write_program(tmp_path / "bin", "echo 'NVIDIA H100 80GB, 570.1'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.version, "cuda", None)
    report = inspect_machine()
    assert report.driver == "570.1"
    card = "torch cannot use NVIDIA H100 80GB (driver 570.1): it is built for the CPU alone"
    assert report.problems == (f"{card}; install a torch built for CUDA",)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0; the driver may be too old" in inspect_machine().problems[0]


def test_doctor_with_a_torch_that_does_not_load_prints_what_is_left(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising() -> str:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(gathering, "read_torch_build", raising)
    result = shell("doctor")
    assert (result.status, result.err) == (1, "")
    words = "ImportError: libcudart.so.13: cannot open shared object file"
    assert f"  torch cannot be imported: {words}\n" in result.out
    assert "  none could be imported\n" in result.out
    assert re.search(rf"torch +{re.escape(TORCH)}\n", result.out)


def test_doctor_describes_the_cache_and_hides_the_home_folder(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = shell.folder / "home"
    (home / "cache" / "choices").mkdir(parents=True)
    (home / "cache" / "choices" / "a.json").write_bytes(bytes(500_000))
    (home / "cache" / "choices" / "b.json").write_bytes(bytes(250_000))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SPARSEDM_CACHE", str(home / "cache"))
    result = shell("doctor", "--json", "machine.json")
    assert "  ~/cache: 2 files, 0.75 MB (2 in choices); it can be written\n" in result.out
    assert re.search(r"SPARSEDM_CACHE +~/cache\n", result.out)
    assert "SPARSEDM_CACHE=FOLDER moves it" in result.out
    text = (shell.folder / "machine.json").read_text()
    assert str(home) not in result.out + text
    cache = json.loads(text)["cache"]
    assert (cache["files"], cache["megabytes"], cache["writable"]) == (2, 0.75, True)


def test_doctor_names_the_cache_that_is_used_where_the_preferred_one_is_not(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shell.folder / "file").write_text("")
    monkeypatch.setenv("SPARSEDM_CACHE", str(shell.folder / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(shell.folder))
    out = shell("doctor").out
    assert f"  in the place of {shell.folder / 'file'}, which cannot be written\n" in out


def test_hide_home_replaces_the_home_folder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/al")
    texts = {"a": ["/home/al/x", "/home/alice", "see /home/al: no", "/data/home/al/x"], "n": 3}
    hidden = {"a": ["~/x", "/home/alice", "see ~: no", "/data/home/al/x"], "n": 3}
    assert hide_home(texts) == hidden
    monkeypatch.setenv("HOME", "/")
    assert hide_home("/a/b") == "/a/b"


def test_doctor_names_missing_packages_with_the_pip_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(name: str) -> str | None:
        return None if name in ("tqdm", "scipy", "datasets") else "1.0"

    monkeypatch.setattr(gathering, "read_version", read)
    out = shell("doctor").out
    missing = 'missing: scipy, tqdm: pip install "sparsedm-compiler[train]"'
    assert re.search(rf"  train +accelerate 1.0, .*; {re.escape(missing)}\n", out)
    assert re.search(r'  datasets +missing: datasets: pip install "sparsedm-', out)
    assert re.search(r"  demo +scikit-learn 1.0\n", out)


def test_extras_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[project.")[0]
    section = re.sub(r"#.*|\"sparsedm-compiler\[[^]]*\]\"", "", section)
    for extra, packages in EXTRAS.items():
        body = re.search(rf"^{extra} = \[([^]]*)\]", section, re.MULTILINE | re.DOTALL)
        assert body is not None
        named = re.findall(r'"([A-Za-z][\w-]*)', body[1])
        assert tuple(named) == packages
    listed = re.findall(r"^([a-z]+) = \[", section, re.MULTILINE)
    assert {*listed} - {"dev", "docs", "structural"} == {*EXTRAS}  # for developers and a benchmark


def test_doctor_dry_run_looks_at_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "inspect_machine", lambda: pytest.fail("it looked"))
    assert "would look at this machine" in shell.dry("doctor", "--json", "machine.json").out


def test_doctor_help_says_what_its_exit_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert "0 at least one sparse kernel runs here; 1 none does" in out


@pytest.mark.parametrize("family", list_families(), ids=lambda family: family.names[0])
def test_every_family_lists_libraries_by_name(family: Any) -> None:
    libraries = family.list_libraries()
    assert libraries
    for name, version in libraries.items():
        assert name
        assert version is None or (version and "\n" not in version)
