"""AOTInductor packages: what they hold, and that sparse kernels in them are exact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.backends.cpp_compiler import find_compiler
from sparsedm_compiler.backends.registry import find_family
from sparsedm_compiler.export import package
from sparsedm_compiler.export.trace import make_example, trace_masked
from tests.compiler.nets import X, compiled_chain
from tests.export.nets import make_call, make_student
from tests.oracle import assert_same


def make_program(student: nn.Module) -> Any:
    """Returns what ``export_package`` gives to AOTInductor, and the kernels by weight."""
    args, kwargs = make_call()
    example = make_example(args, kwargs, dynamic_batch=True)
    return package._pack(student, trace_masked(student, example).program, example)


def test_program_with_sparse_kernels_equals_the_model_that_runs_them() -> None:
    student = make_student("sparse")
    program, kernels = make_program(student)
    pruned = {*sdm.masked_parameters(student)}
    assert {*kernels} == {name for name in pruned if name != "line.weight"}  # Conv1d has no kernel
    calls = [str(node.target) for node in program.graph.nodes if "sparsedm" in str(node.target)]
    assert sorted({*calls}) == ["sparsedm.nm_conv2d.default", "sparsedm.nm_linear.default"]
    args, kwargs = make_call(3, seed=3)
    with torch.no_grad():
        expected = student(*args, **kwargs)
    out = program.module()(*args, **kwargs)
    for name, value in expected.items():
        assert_same(out[name], value, tolerance=1e-6)
    stored = sum(tensor.nbytes for tensor in program.state_dict.values())
    dense = sum(tensor.nbytes for tensor in student.parameters())
    assert stored < dense


def test_package_with_sparse_kernels_when_opened_equals_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    student = compiled_chain("sparse").eval()
    path = tmp_path / "net.pt2"
    names = sdm.export_package(student, X, path, dynamic_batch=True, sparse_kernels=True)
    assert names == ("b.weight", "c.weight")
    run = sdm.load_package(path)
    assert run.get_metadata()["sparsedm_kernels"] == "cpu_free"  # type: ignore[attr-defined]
    for x in (X, torch.randn(5, 16)):
        with torch.no_grad():
            assert_same(run(x), student(x), tolerance=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    kernels = type(find_family("cpu_free"))
    monkeypatch.setattr(kernels, "why_unavailable", lambda self: "there is no C++ compiler")
    with pytest.raises(sdm.CheckpointError, match=r"net\.pt2 calls the kernel cpu_free: there is"):
        sdm.load_package(path)


def test_package_that_cannot_be_made_or_opened_is_refused(tmp_path: Path) -> None:
    student = compiled_chain("sparse").eval()
    with pytest.raises(sdm.ConfigError, match=r"is a \.pt2 file, not 'net\.onnx'"):
        sdm.export_package(student, X, tmp_path / "net.onnx")
    with pytest.raises(sdm.CheckpointError, match="there is no folder"):
        sdm.export_package(student, X, tmp_path / "nowhere/net.pt2")
    with pytest.raises(sdm.ConfigError, match="sparse kernels take dynamic_batch, no other"):
        sdm.export_package(
            student, X, tmp_path / "net.pt2", dynamic_shapes={"x": {}}, sparse_kernels=True
        )
    holder = nn.Sequential(student).eval()
    with pytest.raises(sdm.ConfigError, match="Sequential only holds compiled modules"):
        sdm.export_package(holder, X, tmp_path / "net.pt2", sparse_kernels=True)
    with pytest.raises(sdm.CheckpointError, match="there is no package"):
        sdm.load_package(tmp_path / "net.pt2")
    (tmp_path / "net.pt2").write_text("no package")
    with pytest.raises(sdm.CheckpointError, match=r"net\.pt2 does not load here: "):
        sdm.load_package(tmp_path / "net.pt2")


def test_package_when_its_folder_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(sdm.CheckpointError, match="cannot be written: read-only"):
        sdm.export_package(compiled_chain().eval(), X, tmp_path / "net.pt2")
