"""The inner compiler: the torch.compile backend that runs a rewritten graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._ops import OpOverload, OpOverloadPacket

from ..backends.cpp_compiler import find_compiler
from ..config import GRAPHS, Backend
from ..errors import ConfigError
from ..graph.flat_graph import get_example_value
from ..graph.retarget import retarget
from .eager_checkpointing import preserve_randomness

_KNOWN_OPS = ("aten", "prims", "sparsedm")
"""Namespaces of the ops whose outputs are laid out as their meta functions say."""


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend, *, folded: bool = False
) -> Callable[..., Any]:
    """Compiles a graph by a torch.compile backend, named as ``compile`` takes it or callable.

    ``folded``: whether it is called with folded weights. Inductor's code then does not check the
    layout of each input again, which TorchDynamo's guards and the fold check have done.
    """
    # torch.fx writes (-1) ** x as -1 ** x, which Python reads as -(1 ** x).
    retarget(gm, operator.pow, torch.pow, _is_power_of_number)
    compile_fx: Any = backend
    if isinstance(backend, str):
        name = resolve_backend(backend)
        if name == GRAPHS:
            compile_fx = _patch_inductor({"triton.cudagraphs": True})
        elif name == "inductor" and folded and _is_checked(gm):
            compile_fx = _patch_inductor({"size_asserts": False})
        else:
            compile_fx = lookup_backend(name)
        if name == "eager":
            preserve_randomness(gm)
    run: Callable[..., Any] = compile_fx(gm, list(example_inputs))
    return keep_outputs(run) if backend == GRAPHS else run


def _is_power_of_number(node: fx.Node) -> bool:
    return isinstance(node.args[0], (int, float)) and isinstance(get_example_value(node), Tensor)


def keep_outputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a call whose results stay: CUDA graphs would write the next call's over them.

    A sampler may call a model twice before it reads either result. Those that a backward follows
    are left as they are.
    """

    def call(*inputs: Any) -> Any:
        return tuple(
            x.clone() if isinstance(x, Tensor) and not (x.is_cpu or x.requires_grad) else x
            for x in run(*inputs)
        )

    return call


def _is_checked(gm: fx.GraphModule) -> bool:
    """Returns whether no layout is left to be checked at run time.

    The outputs of custom ops are: a meta function may be wrong. So are the addresses of the inputs
    of CUDA graphs.
    """
    from torch._inductor import config

    targets = [
        node.target
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    ]
    ops = [target for target in targets if isinstance(target, (OpOverload, OpOverloadPacket))]
    names = {str(op).partition(".")[0] for op in ops}
    return names.issubset(_KNOWN_OPS) and not config.triton.cudagraphs


def is_inductor(backend: Backend) -> bool:
    """Returns whether a backend is Inductor, as ``compile`` names it."""
    return isinstance(backend, str) and resolve_backend(backend) in ("inductor", GRAPHS)


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


def _patch_inductor(settings: dict[str, Any]) -> Callable[..., Any]:
    """Returns Inductor under some of its settings."""
    from torch._inductor.compile_fx import compile_fx

    return partial(compile_fx, config_patches=settings)
