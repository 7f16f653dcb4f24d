"""The CUDA families on CPU tensors, where their ops are references: a rehearsal without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from sparsedm_compiler.backends.registry import list_families


@contextmanager
def cuda_families_on_cpu() -> Iterator[None]:
    """Let the CUDA families, and no other, run the weights of CPU models."""
    kinds = {type(family): family.device for family in list_families()}
    with ExitStack() as stack:
        for kind, device in kinds.items():
            on_cpu = device == "cuda"
            stack.enter_context(patch.object(kind, "device", "cpu" if on_cpu else "elsewhere"))
            if on_cpu:
                stack.enter_context(patch.object(kind, "why_unavailable", lambda self: None))
        yield
