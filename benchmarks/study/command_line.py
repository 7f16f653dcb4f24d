"""The options that the benchmarks on the study's model share."""

from __future__ import annotations

import argparse
from pathlib import Path

from .plan import Budget, Study


def make_parser(about: str, out: str, *, teacher: bool = False) -> argparse.ArgumentParser:
    """Returns a parser of the study's images, teacher and output folder.

    ``teacher``: whether the weights of the dense model must be given.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    trained = "" if teacher else "; trained first if left out"
    add = parser.add_argument
    add("--data", default="digits", help="training images, as open_data names them")
    add("--held-out", default="digits:test", help="held-out images")
    add("--teacher", type=Path, required=teacher, help=f"weights of the dense model{trained}")
    add("--size", type=int, help="side the images are resized to")
    add("--out", type=Path, default=Path(out))
    return parser


def open_study(options: argparse.Namespace, budget: Budget) -> Study:
    """Returns the study that the parsed options describe."""
    return Study(options.data, options.held_out, options.size, options.out, budget, options.teacher)
