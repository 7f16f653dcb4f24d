"""The patterns of ONNX weights along the axis that each product sums over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsedm_compiler as sdm
from tests.oracle import brute_mask

onnx = pytest.importorskip("onnx", reason='needs the extra "export"')
pytest.importorskip("onnx_ir", reason='needs the extra "export"')


def prune(*shape: int, pattern: str = "2:4", axis: int = 1, rows: int = 0) -> Tensor:
    """Returns random values that keep a pattern along ``axis``; output channels lie on ``rows``."""
    generator = torch.Generator().manual_seed(len(shape) * 10 + axis)
    turned = torch.randn(*shape, generator=generator).movedim((rows, axis), (0, 1)).contiguous()
    return (turned * brute_mask(turned, pattern)).movedim((0, 1), (rows, axis)).contiguous()


def make_model(nodes: list[Any], weights: dict[str, Tensor], record: str | None = None) -> Any:
    """Returns an ONNX model of nodes that lead from x to y."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    if record is not None:
        helper.set_model_props(model, {"sparsedm": record})
    return model


def write(
    path: Path, nodes: list[Any], weights: dict[str, Tensor], record: str | None = None
) -> Path:
    """Writes such a model and returns its path."""
    onnx.save(make_model(nodes, weights, record), path)
    return path


def node(op: str, *inputs: str, out: str = "y", **attributes: Any) -> Any:
    """Returns a node of a graph."""
    return onnx.helper.make_node(op, [*inputs], [out], **attributes)


CASES: dict[str, tuple[list[Any], Tensor, int]] = {
    "matmul": ([node("MatMul", "x", "w")], prune(16, 8, axis=0, rows=1), 0),
    "matmul_left": ([node("MatMul", "w", "x")], prune(8, 16, axis=1, rows=0), 1),
    "matmul_batched": ([node("MatMul", "x", "w")], prune(3, 16, 8, axis=1, rows=2), 1),
    "gemm": ([node("Gemm", "x", "w")], prune(16, 8, axis=0, rows=1), 0),
    "gemm_turned": ([node("Gemm", "x", "w", transB=1)], prune(8, 16), 1),
    "gemm_left": ([node("Gemm", "w", "x")], prune(8, 16), 1),
    "gemm_left_turned": ([node("Gemm", "w", "x", transA=1)], prune(16, 8, axis=0, rows=1), 0),
    "conv": ([node("Conv", "x", "w")], prune(8, 16, 3, 3), 1),
    "conv1d": ([node("Conv", "x", "w")], prune(8, 16, 3), 1),
    "conv_transpose": ([node("ConvTranspose", "x", "w")], prune(16, 8, 3, 3, axis=0, rows=1), 0),
    "transpose": (
        [node("Transpose", "w", out="v", perm=[1, 0]), node("MatMul", "x", "v")],
        prune(8, 16),
        1,
    ),
    "transpose_of_a_cast": (
        [
            node("Cast", "w", out="c", to=1),
            node("Transpose", "c", out="v"),
            node("MatMul", "x", "v"),
        ],
        prune(8, 16),
        1,
    ),
    "transposed_twice": (
        [
            node("Transpose", "w", out="u", perm=[1, 2, 0]),
            node("Transpose", "u", out="v", perm=[2, 0, 1]),
            node("MatMul", "x", "v"),
        ],
        prune(3, 16, 8, axis=1, rows=2),
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weight_that_is_pruned_along_the_summed_axis_satisfies_its_pattern(
    case: str, tmp_path: Path
) -> None:
    nodes, weight, axis = CASES[case]
    path = write(tmp_path / "net.onnx", nodes, {"w": weight})
    (row,) = sdm.check_onnx(path, "2:4").rows
    assert (row.name, row.op, row.axis) == ("w", nodes[-1].op_type, axis)
    assert row.shape == tuple(weight.shape)
    assert (str(row.satisfied), row.fits, row.tensor_cores, row.zeros) == ("2:4", True, True, 0.5)
    # The same zeros along another axis are of no use to the product.
    turned = weight.transpose(0, 1).contiguous()
    path = write(tmp_path / "turned.onnx", nodes, {"w": turned})
    (row,) = sdm.check_onnx(path, "2:4").rows
    assert (row.fits, row.tensor_cores) == (False, False)
    assert not sdm.check_onnx(path, "2:4").ok


def test_constant_nodes_and_subgraphs_are_read_too(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    def branch(name: str) -> Any:
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        nodes = [node("MatMul", "x", "inner", out=f"{name}_out")]
        inner = numpy_helper.from_array(prune(16, 8, axis=0, rows=1).numpy(), "inner")
        return helper.make_graph(nodes, name, [], [out], [inner])

    constant = numpy_helper.from_array(prune(16, 16, pattern="1:4", axis=0, rows=1).numpy())
    nodes = [
        node("Constant", out="w", value=constant),
        node("Constant", out="yes", value=numpy_helper.from_array(torch.tensor(True).numpy())),
        node("MatMul", "x", "w", out="h"),
        node("If", "yes", then_branch=branch("a"), else_branch=branch("b")),
    ]
    rows = {row.name: row for row in sdm.check_onnx(write(tmp_path / "n.onnx", nodes, {})).rows}
    assert {name: str(row.satisfied) for name, row in rows.items()} == {"w": "1:4", "inner": "2:4"}
    assert rows["w"].fits is None
    assert rows["w"].tensor_cores


def test_declared_patterns_that_weights_do_not_keep_are_told(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x", "kept", out="h"), node("MatMul", "h", "lost")]
    weights = {"kept": prune(16, 16, axis=0, rows=1), "lost": torch.ones(16, 8)}
    declared = dict.fromkeys(("kept", "lost", "folded"), "2:4")
    record = json.dumps({"version": 1, "patterns": declared})
    report = sdm.check_onnx(write(tmp_path / "net.onnx", nodes, weights, record))
    assert {row.name: row.fits for row in report.rows} == {
        **{"kept": True, "lost": False, "folded": False}
    }
    assert not report.ok
    assert report.rows[-1].op == ""
    lines = str(report).splitlines()
    assert [line.split()[-1] for line in lines[3:6]] == ["yes", "NO", "NO"]


def test_files_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    product = [node("MatMul", "x", "w")]
    weights = {"w": prune(16, 8, axis=0, rows=1)}
    (tmp_path / "text.onnx").write_text("no model")
    for text in ("{", '{"version": 1}', '{"version": 9, "patterns": {}}'):
        path = write(tmp_path / "record.onnx", product, weights, text)
        with pytest.raises(sdm.CheckpointError, match="the record of sparsedm in this file"):
            sdm.check_onnx(path)
    path = write(tmp_path / "parts.onnx", product, weights)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="parts.data", size_threshold=0)
    assert sdm.check_onnx(path, "2:4").ok
    (tmp_path / "parts.data").unlink()
    for name in ("nowhere.onnx", "text.onnx", "parts.onnx"):
        with pytest.raises(sdm.CheckpointError, match=f"{name} is not an ONNX file that can be"):
            sdm.check_onnx(tmp_path / name)
    with pytest.raises(sdm.PatternError):
        sdm.check_onnx(path, "2/4")
