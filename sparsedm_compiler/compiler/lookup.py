"""The compiled modules inside a model, and the weights that they prune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..errors import ConfigError
from ..graph.capture import KEY
from ..graph.names import strip_adapter_prefix
from ..patterns import Pattern
from .guarded_forward import SparseForward


def iterate_sparse_forwards(model: nn.Module) -> Iterator[tuple[str, SparseForward]]:
    """Yields (prefix of parameter names, SparseForward) of every compiled module inside."""
    for name, module in model.named_modules():
        forward = module.__dict__.get(KEY)
        if isinstance(forward, SparseForward) and forward.module is module:
            yield (f"{name}." if name else ""), forward


@contextmanager
def analyse_layers(model: nn.Module) -> Iterator[None]:
    """Lets the own forwards of compiled modules inside be captured for an analysis."""
    with ExitStack() as stack:
        for _, forward in iterate_sparse_forwards(model):
            forward.prepare()
            stack.enter_context(forward.guard)
        yield


def require_compiled(model: nn.Module) -> list[tuple[str, SparseForward]]:
    """Returns (prefix, SparseForward) of all inside ``model``. Raises ConfigError for none."""
    forwards = list(iterate_sparse_forwards(model))
    if not forwards:
        raise ConfigError(
            f"{type(model).__name__} was not compiled; first: model = "
            "sparsedm_compiler.compile(model, pattern='2:4')"
        )
    return forwards


def masked_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, Pattern]]:
    """Returns the parameters that run masked, each with its pattern.

    Args:
        model: A compiled model, or a wrapper around one (DDP, an outer torch.compile).

    Returns:
        {parameter name in ``model``: (parameter, pattern)}; empty before the first call of the
        model, which captures it.

    Raises:
        ConfigError: If no module inside ``model`` was compiled.
    """
    masked = {}
    for prefix, forward in require_compiled(model):
        for name, parameter in forward.module.named_parameters():
            decision = forward.decisions.get(strip_adapter_prefix(name))
            if decision is not None and decision.pattern is not None:
                masked[prefix + name] = (parameter, decision.pattern)
    return masked
