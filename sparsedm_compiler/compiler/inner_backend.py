"""The inner compiler: the torch.compile backend that runs a rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import list_backends, lookup_backend

from ..backends.cpp_compiler import find_compiler
from ..config import GRAPHS, Backend
from ..errors import ConfigError


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend
) -> Callable[..., Any]:
    """Compiles a graph by a torch.compile backend, named as ``compile`` takes it or callable."""
    compile_fx: Any = backend
    if isinstance(backend, str):
        name = resolve_backend(backend)
        compile_fx = _graphs_backend() if name == GRAPHS else lookup_backend(name)
    run: Callable[..., Any] = compile_fx(gm, list(example_inputs))
    return run


def resolve_backend(backend: str) -> str:
    """Returns the torch.compile backend that ``backend`` names, or ``GRAPHS``.

    "auto" is Inductor where there is a C++ compiler, else "eager". Raises ConfigError for a name
    that torch does not know.
    """
    if backend == "auto":
        return "eager" if find_compiler() is None else "inductor"
    if backend == GRAPHS:
        return backend
    if backend not in list_backends(exclude_tags=()) or backend == "sparsedm":
        raise ConfigError(
            f"backend {backend!r} is no torch.compile backend; "
            f"'auto', 'eager', 'inductor' and {GRAPHS!r} are, e.g. backend='eager'"
        )
    return backend


def _graphs_backend() -> Callable[..., Any]:
    """Returns Inductor with CUDA graphs."""
    from torch._inductor.compile_fx import compile_fx

    return partial(compile_fx, config_patches={"triton.cudagraphs": True})
