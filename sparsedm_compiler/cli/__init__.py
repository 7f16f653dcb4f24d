"""The command line ``sparsedm``: one module per command, imported by all without torch."""

from __future__ import annotations

from .commands import main, run_command

__all__ = ["main", "run_command"]
