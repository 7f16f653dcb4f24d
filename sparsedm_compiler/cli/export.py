"""``sparsedm export``: writes a pruned model as an ONNX file or an AOTInductor package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .explain import move_inputs
from .job import DONE, FAILED, Job, check_writable
from .open_student import ModelSource, add_weights, resolve_source
from .options import add_device, add_model

if TYPE_CHECKING:
    import torch

ABOUT = """\
write a pruned model as an ONNX file or an AOTInductor package

An .onnx file holds the masked weights with their zeros, in standard operators; TensorRT sees 2:4
weights where it looks for them, which is checked. A .pt2 file is compiled for this machine, dense
or, with --sparse-kernels, with the fastest kernels."""
EXAMPLE = """\
  sparsedm export student.onnx --model runs/first --dynamic-batch
  sparsedm export student.onnx --model unet --weights student.safetensors --dtype float16
  sparsedm export student.pt2 --model runs/first --sparse-kernels"""
DTYPES = ("float32", "float16", "bfloat16")
SUFFIXES = (".onnx", ".pt2")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("out", metavar="FILE", help="the file to write: .onnx or .pt2")
    add_model(parser)
    add_weights(parser)
    parser.add_argument("--batch", type=int, help="batch size (default: 1; 2 for --dynamic-batch)")
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="let the file take any batch size"
    )
    about = "shapes of the inputs of one call, for a model class that is not known"
    parser.add_argument("--inputs", help=about)
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and inputs (default: as saved)")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: that of torch.onnx)")
    parser.add_argument(
        "--sparse-kernels",
        action="store_true",
        help="run pruned weights of a .pt2 by sparse kernels where they are faster; such a file is "
        "opened by sparsedm_compiler.load_package",
    )
    add_device(parser)


def prepare(options: argparse.Namespace) -> Job:
    """Checks the model, its inputs and the file to write. Raises SparseDMError."""
    from ..models import open_with_inputs
    from ..models.loading import is_function

    suffix = check_writable(options.out).suffix
    if suffix not in SUFFIXES:
        raise ConfigError(f"{options.out} is neither .onnx nor .pt2")
    if suffix == ".onnx" and options.sparse_kernels:
        raise ConfigError("--sparse-kernels is for .pt2: ONNX has no sparse operators")
    if suffix == ".pt2" and options.opset is not None:
        raise ConfigError("--opset is for .onnx")
    options.mode, options.backend = "infer" if options.sparse_kernels else "train", "eager"
    source = resolve_source(options)
    if source.pruned is None:
        raise ConfigError(f"{source.weights} holds no pruned model, so there is nothing to export")
    batch = options.batch or (2 if options.dynamic_batch else 1)
    _, *call = open_with_inputs(
        source.name,
        options=source.options,
        inputs=options.inputs,
        batch=options.batch if is_function(source.name) else batch,
    )
    return Job((f"would write {options.out} of {source}",), lambda: export(options, source, call))


def export(options: argparse.Namespace, source: ModelSource, call: list[Any]) -> int:
    """Writes the file, prints what it holds and returns the exit status."""
    from .. import export_onnx, export_package

    model = source.open().eval()
    args, kwargs = move_inputs(tuple(call), source.device)
    if options.dtype is not None:
        model, args, kwargs = cast((model, args, kwargs), options.dtype)
    common = {"kwargs": kwargs, "dynamic_batch": options.dynamic_batch}
    if Path(options.out).suffix == ".onnx":
        report = export_onnx(model, args, options.out, opset=options.opset, **common)
        print(report)
        return DONE if report.ok else FAILED
    weights = export_package(
        model, args, options.out, sparse_kernels=options.sparse_kernels, **common
    )
    size = Path(options.out).stat().st_size
    print(f"{options.out}: {size:,} bytes, {len(weights)} weights run by sparse kernels")
    return DONE


def cast(values: Any, name: str) -> Any:
    """Returns modules and floating-point tensors in the dtype of that name."""
    import torch
    from torch.utils._pytree import tree_map

    dtype: torch.dtype = getattr(torch, name)

    def move(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating or isinstance(value, torch.nn.Module) else value

    return tree_map(move, values)
