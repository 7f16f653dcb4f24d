"""``sparsedm check``: which patterns the weights of a file satisfy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from .job import DONE, FAILED, Job

ABOUT = """\
show which sparsity patterns the weights of a file satisfy

Prints one line per weight: its zeros, the pattern that the file declares, the sparsest pattern that
its zeros satisfy, and whether they keep what is declared (or --pattern). The exit status is 1 where
one does not. Any safetensors file will do, and any pickled state_dict; masks of apex ASP, ModelOpt
and torch's pruning are multiplied in. Of an ONNX file, a weight is read along the axis that its
product sums over; the last column tells whether TensorRT's sparse kernels (2:4) can take it."""
EXAMPLE = """\
  sparsedm check student.safetensors
  sparsedm check unet/diffusion_pytorch_model.safetensors --pattern 2:4
  sparsedm check student.onnx"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "file", metavar="FILE", help="a .safetensors or .onnx file, or a pickled state_dict"
    )
    parser.add_argument("--pattern", help="the pattern to ask every weight for, e.g. 2:4")
    parser.add_argument("--card", metavar="README.md", help="write a stub of a model card as well")


def prepare(options: argparse.Namespace) -> Job:
    """Reads the file. Raises SparseDMError."""
    from ..files import check_file, make_model_card

    if Path(options.file).suffix == ".onnx":
        return prepare_onnx(options)
    report = check_file(options.file, options.pattern)

    def run() -> int:
        print(report)
        if options.card is not None:
            Path(options.card).write_text(make_model_card(report), encoding="utf-8")
        return DONE if report.ok else FAILED

    card = f", and write {options.card}" if options.card else ""
    return Job((f"would show {len(report.rows)} weights of {options.file}{card}",), run)


def prepare_onnx(options: argparse.Namespace) -> Job:
    """Reads an ONNX file. Raises SparseDMError."""
    from ..export import check_onnx

    if options.card is not None:
        raise ConfigError("--card is for safetensors files")
    report = check_onnx(options.file, options.pattern)

    def run() -> int:
        print(report)
        return DONE if report.ok else FAILED

    return Job((f"would show {len(report.rows)} weights of {options.file}",), run)
