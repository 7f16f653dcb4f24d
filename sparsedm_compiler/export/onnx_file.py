"""``export_onnx``: a compiled model as an ONNX file of standard operators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ..errors import CaptureError, CheckpointError, ConfigError
from ..fileio import replace_together
from ..optional_deps import require_extra
from ..patterns import Pattern
from .check_onnx import OnnxReport, check_onnx, describe_weights, write_declared
from .name_weights import name_batch, name_weights
from .trace import (
    make_example,
    name_outputs,
    require_folder,
    require_inputs,
    summarize,
    trace_masked,
)


def export_onnx(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    external_data: bool | None = None,
) -> OnnxReport:
    """Writes a compiled model as an ONNX file whose pruned weights hold their zeros.

    The file holds the plain model with masked weights, which the compiled one is equal to, in
    standard operators alone: any ONNX runtime loads it, and TensorRT sees 2:4 weights where it
    looks for them, along the axis that a product sums over. Weights keep their names; one that a
    MatMul reads transposed is stored so, under its name and ".T". The metadata declares the
    patterns, which ``check_onnx`` compares with the weights; this call does so before it returns.

    Args:
        model: A compiled model in eval mode. One that has not been called yet is called once.
        args: The positional inputs of one call: a tuple, or the only input. Numbers that are not
            tensors become constants of the file.
        path: The file to write. It appears whole or not at all.
        kwargs: The keyword inputs of the call; None: none.
        dynamic_batch: Whether the file takes any batch size. Then the example needs a batch of 2 or
            more, and every input whose first dimension is of that size is one row per image.
        dynamic_shapes: Other dynamic sizes, as ``torch.export.export`` takes them. None: none.
        input_names: Names of the inputs; None: those of the forward's arguments.
        output_names: Names of the outputs; None: their keys in the model's output, or "output".
        opset: The opset of the file; None: that of ``torch.onnx``.
        external_data: Whether the weights lie in a second file, ``path`` and ".data". None: where
            they are more than the 2 GB that one ONNX file can hold.

    Returns:
        The weights of the file with the patterns that they satisfy; ``str()`` is a table.

    Raises:
        ConfigError: If ``model`` was not compiled, is in training mode, wrapped, or its forward is;
            if a size cannot be dynamic or a name is missing; and without the extra "export".
        CaptureError: If the forward or one of its ops has no form in ``torch.export`` or ONNX, or a
            pruned weight would lose its pattern.
        CheckpointError: If the file cannot be written.
    """
    with require_extra("exporting to ONNX", "export"):
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    file = Path(path)
    require_folder(file)
    example = make_example(args, kwargs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    masked = trace_masked(model, example)
    require_inputs(masked.program, input_names)
    names = (input_names, name_outputs(masked.program, output_names))
    onnx = _convert(masked.program, type(model).__name__, names, opset)
    declared = name_weights(onnx.model.graph, masked.patterns)
    onnx.optimize()
    if dynamic_batch:
        name_batch(onnx.model.graph)
    write_declared(onnx.model, declared)
    require_patterns(onnx.model.graph, declared)
    _write(onnx, file, external_data)
    return check_onnx(file)


def _convert(
    program: ExportedProgram,
    name: str,
    names: tuple[Sequence[str] | None, Sequence[str]],
    opset: int | None,
) -> Any:
    """Returns torch's ONNX program. Raises CaptureError for an op that ONNX does not know."""
    import torch.onnx

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries' own deprecations
            return torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=names[0],
                output_names=names[1],
                opset_version=opset,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise CaptureError(f"ONNX has no form of an op of {name}: {summarize(cause)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torch.onnx cannot export {name} so: {summarize(error)}") from error


def require_patterns(graph: Any, declared: Mapping[str, Pattern]) -> None:
    """Raises CaptureError for a pruned weight that the graph does not hold in its pattern."""
    for row in describe_weights(graph, declared):
        if row.fits is False:
            reason = (
                f"has lost {row.declared} along axis {row.axis}, which {row.op} sums over"
                if row.op
                else "is no constant factor of a MatMul, Gemm or Conv in it"
            )
            raise CaptureError(f"the ONNX graph would not be sparse: {row.name} {reason}")


def _write(onnx: Any, path: Path, external_data: bool | None) -> None:
    """Writes the program and its external data. Raises CheckpointError."""
    try:
        with replace_together(path) as part:
            onnx.save(part, external_data=external_data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
