"""Counts the MACs of diffusion models, dense and at N:M sparsity, without their weights.

    python examples/count_macs.py                          # a U-ViT of the paper, at 2:4 and 1:8
    python examples/count_macs.py --model flux1 --pattern 2:4 --pattern 1:8
    python examples/count_macs.py --model path/to/unet --per-layer
    python examples/count_macs.py --model package.module:factory --inputs 1x3x32x32,1 --json

The same as ``sparsedm macs``, for a clone that is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparsedm_compiler.cli import macs, run_command
from sparsedm_compiler.models import PRESETS

__all__ = ["PRESETS", "main"]

SHOWN = ("--model", "uvit-cifar10-small", "--pattern", "2:4", "--pattern", "1:8")
"""The arguments where none are given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for a bad request."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(macs, [*arguments] or SHOWN, "count_macs")


if __name__ == "__main__":
    sys.exit(main())
