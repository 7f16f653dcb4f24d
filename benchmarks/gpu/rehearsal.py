"""The CUDA families on CPU tensors, where their ops are references: a rehearsal without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from sparsedm_compiler.backends.registry import FAMILIES


@contextmanager
def cuda_families_on_cpu() -> Iterator[None]:
    """Let the CUDA families, and no other, run the weights of CPU models."""
    cuda = tuple(family for family in FAMILIES if family.device == "cuda")
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("sparsedm_compiler") and "families_of" in vars(module):
                stack.enter_context(patch.object(module, "families_of", lambda device: cuda))
        for kind in {type(family) for family in cuda}:
            stack.enter_context(patch.object(kind, "unavailable", lambda self: None))
        yield
