"""``check_onnx``: the patterns that weights of an ONNX file satisfy, as its products read them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..errors import CheckpointError
from ..files.check_file import satisfies
from ..masks.detect import detect_pattern
from ..optional_deps import require_extra
from ..patterns import NM, Pattern
from .onnx_weights import Factor, iterate_factors

RECORD = "sparsedm"
"""The key of our record among the metadata of an ONNX model."""
VERSION = 1
"""The version of that record."""
TENSOR_CORES = NM(2, 4)
"""The pattern of the sparse tensor cores, which TensorRT looks for."""


@dataclass(frozen=True, slots=True)
class OnnxWeight:
    """One weight of an ONNX file, as the products that read it see it.

    Attributes:
        name: Its name in the file.
        op: The product: "MatMul", "Gemm", "Conv" or "ConvTranspose"; "" where the file declares a
            pattern for it and no product reads it.
        shape: Its shape in the file.
        axis: The axis that the product sums over, along which groups lie.
        dtype: Its dtype, e.g. "FLOAT16".
        zeros: The share of its values that are zero.
        declared: The pattern that the file declares for it; None where it declares none.
        satisfied: The sparsest pattern that its zeros satisfy; None for none.
        fits: Whether its zeros satisfy the wanted pattern, else the declared one; None where there
            is neither.
        tensor_cores: Whether at most 2 of every 4 values along ``axis`` are not zero, which is what
            TensorRT's sparse kernels need.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    axis: int
    dtype: str
    zeros: float
    declared: Pattern | None
    satisfied: Pattern | None
    fits: bool | None
    tensor_cores: bool


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What ``check_onnx`` has read; ``str()`` is a table.

    Attributes:
        path: The file.
        size: Its bytes, with those of its external data.
        rows: One for every weight of two or more dimensions and axis that it is summed over.
    """

    path: Path
    size: int
    rows: tuple[OnnxWeight, ...]

    @property
    def ok(self) -> bool:
        """Whether every weight satisfies the pattern that is declared or was wanted."""
        return all(row.fits is not False for row in self.rows)

    def __str__(self) -> str:
        head = ("weight", "op", "shape", "axis", "dtype", "zeros", "declared", "satisfied", "fits")
        words = {None: "", True: "yes", False: "NO"}
        lines = [
            (
                *(row.name, row.op, "x".join(map(str, row.shape)), row.axis, row.dtype),
                *(f"{row.zeros:.3f}", row.declared or "", row.satisfied or ""),
                *(words[row.fits], "yes" if row.tensor_cores else ""),
            )
            for row in self.rows
        ]
        table = tabulate(lines, (*head, "2:4"), disable_numparse=True)
        cores = sum(row.tensor_cores for row in self.rows)
        return (
            f"{self.path}: ONNX, {self.size:,} bytes\n{table}\n{len(self.rows)} weights, {cores} of"
            " them with at most 2 of every 4 along the axis that is summed over"
        )


def check_onnx(path: str | os.PathLike[str], pattern: str | Pattern | None = None) -> OnnxReport:
    """Reports which patterns the weights of an ONNX file satisfy, as its products read them.

    Groups are sought along the axis that a product sums over, whichever way the file stores the
    weight: input channels of a Conv, K of a MatMul and of a Gemm with or without transB, behind
    transposes and casts too. That is where TensorRT looks for 2:4.

    Args:
        path: Any ONNX file. External data is read from its folder.
        pattern: The pattern to ask every weight for; None asks for those that ``export_onnx`` has
            declared in the file.

    Returns:
        A row for every weight of two or more dimensions that a MatMul, Gemm, Conv or ConvTranspose
        reads, and for every declared one that none reads any more.

    Raises:
        CheckpointError: If the file is missing or damaged.
        ConfigError: If the extra "export" is not installed.
        PatternError: If ``pattern`` is misspelled.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    with require_extra("reading ONNX", "export"):
        import onnx_ir
    file = Path(path)
    try:
        model = onnx_ir.load(file)
        rows = tuple(describe_weights(model.graph, read_declared(model), wanted))
        size = file.stat().st_size + sum(part.stat().st_size for part in _list_parts(model, file))
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds, from protobuf, onnx_ir and numpy
        words = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file} is not an ONNX file that can be read: {words}") from error
    return OnnxReport(file, size, rows)


def describe_weights(
    graph: Any, declared: Mapping[str, Pattern], wanted: Pattern | None = None
) -> Iterator[OnnxWeight]:
    """Yields the rows of ``check_onnx`` for a graph of onnx_ir."""
    seen: set[tuple[str, int]] = set()
    for factor in iterate_factors(graph):
        key = (factor.name, factor.axis)
        if key not in seen and (factor.rows is not None or factor.name in declared):
            seen.add(key)
            yield _describe(factor, declared.get(factor.name), wanted)
    for name in sorted(declared.keys() - {name for name, _ in seen}):
        yield OnnxWeight(name, "", (), 0, "", 0.0, declared[name], None, False, False)


def _describe(factor: Factor, declared: Pattern | None, wanted: Pattern | None) -> OnnxWeight:
    kept, expected = factor.read_kept(), wanted or declared
    return OnnxWeight(
        factor.name,
        factor.op,
        tuple(factor.tensor.shape.numpy()),
        factor.axis,
        factor.tensor.dtype.name,
        1 - int(kept.sum()) / max(1, kept.numel()),
        declared,
        detect_pattern(kept),
        None if expected is None else satisfies(kept, expected),
        satisfies(kept, TENSOR_CORES),
    )


def read_declared(model: Any) -> dict[str, Pattern]:
    """Returns the patterns that our record declares in a model; {} without a record.

    Raises CheckpointError for a damaged record or one of another version.
    """
    text = model.metadata_props.get(RECORD)
    if text is None:
        return {}
    try:
        record = json.loads(text)
        version, patterns = record["version"], record["patterns"]
        parsed = {str(name): Pattern.parse(pattern) for name, pattern in patterns.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the record of sparsedm in this file is damaged: {error}") from error
    if version != VERSION:
        raise CheckpointError(
            f"the record of sparsedm in this file has version {version}, not {VERSION}"
        )
    return parsed


def write_declared(model: Any, patterns: Mapping[str, Pattern]) -> None:
    """Writes the patterns of a model's weights, by their name in the file, into its metadata."""
    texts = {name: str(pattern) for name, pattern in patterns.items()}
    model.metadata_props[RECORD] = json.dumps({"version": VERSION, "patterns": texts})


def _list_parts(model: Any, file: Path) -> set[Path]:
    """Returns the files of external data of a model."""
    import onnx_ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    locations = {str(x.location) for x in tensors if isinstance(x, onnx_ir.ExternalTensor)}
    return {file.parent / location for location in locations}
