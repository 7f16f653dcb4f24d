"""``sparsedm check``: which patterns the weights of a file satisfy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .job import DONE, FAILED, Job

ABOUT = """\
show which sparsity patterns the weights of a file satisfy

Prints one line per weight: its zeros, the pattern that the file declares, the sparsest pattern that
its zeros satisfy, and whether they keep what is declared (or --pattern). The exit status is 1 where
one does not. Any safetensors file will do, and any pickled state_dict; masks of apex ASP, ModelOpt
and torch's pruning are multiplied in."""
EXAMPLE = """\
  sparsedm check student.safetensors
  sparsedm check unet/diffusion_pytorch_model.safetensors --pattern 2:4"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, or a pickled state_dict")
    parser.add_argument("--pattern", help="the pattern to ask every weight for, e.g. 2:4")
    parser.add_argument("--card", metavar="README.md", help="write a stub of a model card as well")


def prepare(options: argparse.Namespace) -> Job:
    """Reads the file. Raises SparseDMError."""
    from ..files import check_file, make_model_card

    report = check_file(options.file, options.pattern)

    def run() -> int:
        print(report)
        if options.card is not None:
            Path(options.card).write_text(make_model_card(report), encoding="utf-8")
        return DONE if report.ok else FAILED

    card = f", and write {options.card}" if options.card else ""
    return Job((f"would show {len(report.rows)} weights of {options.file}{card}",), run)
