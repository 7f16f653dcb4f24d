"""A compiled model as an ONNX file: the same function, the same zeros, standard operators."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from sparsedm_compiler.export.name_weights import name_weights
from sparsedm_compiler.export.onnx_file import require_patterns
from tests.compiler.nets import Chain, X, compiled_chain
from tests.export.nets import make_call, make_student, run_onnx
from tests.oracle import assert_same, brute_mask, masked_patterns, oracle_of
from tests.zoo import FAMILIES, sample_of

pytest.importorskip("onnxscript", reason='needs the extra "export"')
pytest.importorskip("onnxruntime", reason='needs the extra "export"')
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOLERANCE = 1e-5
"""onnxruntime adds the same products in another order; outputs are about 1."""


class Exported(NamedTuple):
    """A file with the student that it was made of."""

    student: nn.Module
    path: Path
    report: sdm.OnnxReport


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The net of all layers, with weights beside the file and any batch size."""
    student = make_student()
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    args, kwargs = make_call()
    report = sdm.export_onnx(
        student, args, path, kwargs=kwargs, dynamic_batch=True, external_data=True
    )
    return Exported(student, path, report)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the constants of a file by name."""
    import onnx_ir

    values = onnx_ir.load(path).graph.initializers
    return {name: torch.from_numpy(v.const_value.numpy().copy()) for name, v in values.items()}


@pytest.mark.parametrize("batch", [1, 2, 65])
def test_onnxruntime_on_an_exported_file_equals_eager(exported: Exported, batch: int) -> None:
    args, kwargs = make_call(batch, seed=batch)
    with torch.no_grad():
        expected = exported.student(*args, **kwargs)
        oracle = oracle_of(exported.student)(*args, **kwargs)
    outputs = run_onnx(exported.path, args, kwargs)
    assert len(outputs) == len(expected)
    for ours, (name, theirs) in zip(outputs, expected.items(), strict=True):
        assert theirs.abs().max() > 0.1
        assert_same(ours, theirs, tolerance=TOLERANCE)
        assert_same(ours, oracle[name], tolerance=TOLERANCE)


def test_exported_file_keeps_names_zeros_and_standard_operators(exported: Exported) -> None:
    import onnx

    model = onnx.load(exported.path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [value.name for value in model.graph.input] == ["x", "t", "scale"]
    assert [value.name for value in model.graph.output] == ["out_x", "planes"]
    firsts = [value.type.tensor_type.shape.dim[:1] for value in model.graph.input]
    assert [[dim.dim_param for dim in first] for first in firsts] == [["batch"], ["batch"], []]
    weights = read_weights(exported.path)
    for name, pattern in masked_patterns(exported.student).items():
        latent = exported.student.get_parameter(name).detach()
        masked = latent * brute_mask(latent, pattern)
        scale = 1.0
        if name == "plane.weight":  # the batch norm behind it becomes part of it
            norm: Any = exported.student.norm
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()[
                :, None, None, None
            ]
        stored = "twin.weight" if name == "rows.weight" else name  # torch.export keeps one of two
        forms = [w if n == stored else w.T for n, w in weights.items() if n.startswith(stored)]
        assert forms, name
        for form in forms:
            assert torch.equal(form == 0, masked == 0)
            assert_same(form, masked * scale, tolerance=1e-6)


def test_report_of_an_export_names_every_weight_with_its_axis(exported: Exported) -> None:
    assert exported.report.ok
    rows = {row.name: row for row in exported.report.rows}
    pruned = {name for name, row in rows.items() if str(row.declared) == "2:4"}
    assert pruned == {
        *("tokens.weight.T", "again.weight.T", "twin.weight", "twin.weight.T"),
        *("plane.weight", "line.weight", "first.weight.T", "last.weight.T"),
    }
    assert all(rows[name].fits and rows[name].tensor_cores for name in pruned)
    assert (rows["tokens.weight.T"].op, rows["tokens.weight.T"].axis) == ("MatMul", 0)
    assert (rows["twin.weight"].op, rows["twin.weight"].axis) == ("Gemm", 1)
    assert (rows["plane.weight"].op, rows["plane.weight"].axis) == ("Conv", 1)
    assert exported.report == sdm.check_onnx(exported.path)
    files = sorted(exported.path.parent.iterdir())
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert exported.report.size == sum(file.stat().st_size for file in files)
    assert f"{len(rows)} weights, {len(pruned)} of them with" in str(exported.report)


def test_export_leaves_the_student_as_it_was(exported: Exported) -> None:
    student = exported.student
    assert isinstance(student.__dict__["forward"], type(student._sparsedm))
    for name, pattern in masked_patterns(student).items():
        latent = student.get_parameter(name)
        assert latent.requires_grad
        assert (latent != 0).all()
        assert str(pattern) == "2:4"


@pytest.mark.parametrize("name", ["unet_condition", "dit"])
def test_onnxruntime_on_an_exported_diffusion_model_equals_eager(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model, args, kwargs = family.make(batch=2)
    student = sdm.compile(model, "2:4", backend="eager")
    report = sdm.export_onnx(
        student, args, tmp_path / "net.onnx", kwargs=kwargs, dynamic_batch=True
    )
    assert report.ok
    assert sum(row.tensor_cores for row in report.rows) >= len(sdm.masked_parameters(student))
    args, kwargs = family.inputs(model, batch=3, seed=1)
    with torch.no_grad():
        expected = sample_of(student(*args, **kwargs))
    (out,) = run_onnx(tmp_path / "net.onnx", args, kwargs)
    assert_same(out, expected, tolerance=TOLERANCE)


def test_finalized_model_when_exported_holds_the_values_of_its_packed_weights(
    tmp_path: Path,
) -> None:
    student = compiled_chain("sparse", finalize=True).eval()
    with torch.no_grad():
        expected = student(X)
    report = sdm.export_onnx(student, X, tmp_path / "net.onnx", output_names=["noise"])
    assert [row.zeros for row in report.rows] == [0.0, 0.5, 0.5, 0.0]
    assert_same(run_onnx(tmp_path / "net.onnx", X, {})[0], expected, tolerance=TOLERANCE)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    with torch.no_grad():
        assert_same(student(X), expected)


def test_frozen_masks_and_adapters_when_exported_are_in_the_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = compiled_chain().eval()
    student(X)
    sdm.freeze_masks(student)
    with torch.no_grad():  # now other weights are the largest
        student.b.weight.copy_(student.b.weight.flip(1))
    adapter = peft.LoraConfig(target_modules=["b"], r=2, init_lora_weights=False)
    student = peft.inject_adapter_in_model(adapter, student).eval()
    with torch.no_grad():
        expected = student(X)
    report = sdm.export_onnx(student, X, tmp_path / "net.onnx")
    rows = {row.name: row for row in report.rows}
    assert rows["b.base_layer.weight"].fits
    assert rows["b.lora_A.default.weight"].declared is None
    assert_same(run_onnx(tmp_path / "net.onnx", X, {})[0], expected, tolerance=TOLERANCE)


def test_export_with_a_dynamic_batch_leaves_its_inputs_as_they_were(tmp_path: Path) -> None:
    x = torch.randn(3, *X.shape[1:])
    sdm.export_onnx(compiled_chain().eval(), x, tmp_path / "net.onnx", dynamic_batch=True)
    assert vars(x) == {}  # no size that later calls would take for a dynamic one


class Gated(Chain):
    """Branches on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if x.sum() > 5 else -out


class Sized(Chain):
    """Works for one batch size alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(2, 16)


class Unknown(Chain):
    """Calls an op that ONNX has no form of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(super().forward(x))


REFUSALS: Mapping[str, tuple[type[sdm.SparseDMError], str]] = {
    "plain": (sdm.ConfigError, "Chain was not compiled; first:"),
    "training": (sdm.ConfigError, r"is in training mode.*model.eval\(\) first"),
    "wrapped": (sdm.ConfigError, "DataParallel wraps the model: export the model inside it"),
    "patched": (sdm.ConfigError, "the forward of Chain is wrapped by .*patch.*: unwrap it first"),
    "one_image": (sdm.ConfigError, "dynamic_batch needs example inputs with a batch of 2 or more"),
    "both": (sdm.ConfigError, "dynamic_batch and dynamic_shapes exclude each other"),
    "sized": (sdm.ConfigError, "Sized cannot have these dynamic sizes: .*"),
    "gated": (sdm.CaptureError, "torch.export cannot hold the forward of Gated: .*"),
    "unknown": (sdm.CaptureError, "ONNX has no form of an op of Unknown: .*airy"),
    "names": (sdm.ConfigError, "output_names names 2 of 1 outputs"),
    "inputs": (sdm.ConfigError, "input_names names 2 of 1 inputs"),
    "folder": (sdm.CheckpointError, "there is no folder"),
    "is_folder": (sdm.CheckpointError, "cannot be written: it is a folder"),
    "keyword": (sdm.CaptureError, "Chain fails on the example: TypeError: .*'foo'"),
    "shape": (sdm.CaptureError, r"Chain fails on the example: \w*RuntimeError"),
}


def make_refused(case: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model and the options with which its export is refused."""
    if case == "plain":
        return Chain().eval(), {}
    if case in ("gated", "sized", "unknown"):
        net = {"gated": Gated, "sized": Sized, "unknown": Unknown}[case]()
        student = sdm.compile(net, "2:4", backend="eager").eval()
        return student, {"dynamic_batch": True} if case == "sized" else {}
    if case in ("keyword", "shape"):  # not called yet
        student = sdm.compile(Chain(), "2:4", backend="eager").eval()
        return student, {"kwargs": {"foo": 1}} if case == "keyword" else {"args": X[:, :3]}
    student = compiled_chain().train(case == "training")
    if case == "patched":
        inner = student.forward

        def patch(*args: Any) -> Any:
            return inner(*args)

        student.forward = patch  # type: ignore[method-assign]
    options: dict[str, dict[str, Any]] = {
        "one_image": {"args": X[:1], "dynamic_batch": True},
        "both": {"dynamic_batch": True, "dynamic_shapes": {}},
        "names": {"output_names": ["a", "b"]},
        "inputs": {"input_names": ["a", "b"]},
        "folder": {"path": "nowhere/net.onnx"},
        "is_folder": {"path": "."},
    }
    return (nn.DataParallel(student) if case == "wrapped" else student), options.get(case, {})


@pytest.mark.parametrize("case", REFUSALS)
def test_export_when_it_cannot_be_exact_is_refused_in_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, options = make_refused(case)
    kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message) as caught:
        sdm.export_onnx(model, **{"args": X, "path": "net.onnx", **options})
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not [*tmp_path.iterdir()]


def test_export_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(sdm.ConfigError, match=r"needs onnxscript.*sparsedm-compiler\[export\]"):
        sdm.export_onnx(compiled_chain().eval(), X, tmp_path / "net.onnx")


def test_weights_that_the_graph_would_not_hold_in_their_pattern_are_refused() -> None:
    import onnx_ir

    from tests.export.test_check_onnx import make_model, node

    def make_graph(weight: Tensor) -> Any:
        model = make_model([node("Gemm", "x", "w", transB=1)], {"w": weight})
        return onnx_ir.from_proto(model).graph

    pattern = sdm.Pattern.parse("2:4")
    kept = torch.ones(8, 16) * (torch.arange(16) % 4 < 2)
    assert name_weights(make_graph(kept), {("w", "tied"): pattern}) == {"w": pattern}
    require_patterns(make_graph(kept), {"w": pattern})
    with pytest.raises(sdm.CaptureError, match="w has lost 2:4 along axis 1, which Gemm sums over"):
        require_patterns(make_graph(torch.ones(8, 16)), {"w": pattern})
    with pytest.raises(sdm.CaptureError, match="gone is no constant factor of a MatMul, Gemm"):
        require_patterns(make_graph(kept), {"gone": pattern})
    with pytest.raises(sdm.CaptureError, match="would not be sparse: it does not read gone"):
        name_weights(make_graph(kept), {("gone",): pattern})
