"""The command line ``sparsedm``, one module per command; importing it does not import torch."""

from __future__ import annotations

from .commands import main, run_command

__all__ = ["main", "run_command"]
