"""Guards that tie a graph to the modules that it was captured with, and a watch over hooks."""

from __future__ import annotations

from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._guards import ChainedSource, Source, TracingContext
from torch.utils.hooks import RemovableHandle


def pin_modules(gm: fx.GraphModule) -> None:
    """Makes TorchDynamo run a graph for no other modules than those it was captured from.

    A backend calls it. Where a call breaks into several graphs, the frames of layers are compiled
    on their own, and TorchDynamo would else run the graph of one layer for all others of its
    shape: a dense one for a pruned one. Biases and norms, of one dimension, are never pruned.
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        example = None if argument is None else argument.example
        if isinstance(example, nn.Parameter) and example.dim() > 1:
            for source in _find_owners(argument.source):
                install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def pin_modules_without_hooks() -> None:
    """Makes TorchDynamo run a graph for no other modules than those it has met without hooks.

    A backend calls it where graphs do not guard the hooks of each module (``HookWatch`` does).
    """
    guards = TracingContext.get().guards_context.dynamo_guards
    hooks = {g.originating_source for g in guards if g.create_fn_name() == _NO_HOOKS}
    for module in {source.base for source in hooks if isinstance(source, ChainedSource)}:
        install_guard(module.make_guard(GuardBuilder.ID_MATCH))


_NO_HOOKS = GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT.__name__


class HookWatch:
    """Tells whether modules of a model have hooks, at the cost of one comparison per call.

    Graphs that guard the hooks of every module read some hundred dicts at every call, which for a
    small model takes longer than a layer. But torch counts all hooks that it registers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._count = -1
        self._hooked = False

    def sees_hooks(self) -> bool:
        """Returns whether a module has, or has had, a hook that a graph must run."""
        if RemovableHandle.next_id != self._count and not self._hooked:
            self._count = RemovableHandle.next_id
            self._hooked = any(map(_has_hooks, self._module.modules()))
        return self._hooked


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _find_owners(parameter: Source) -> set[Source]:
    """Returns the sources of the module that owns a parameter and of the one that the frame knows.

    The latter, compared first, tells graphs of equal blocks apart at the price of one address. The
    source of the parameter itself stands in for an owner.
    """
    owner, outermost = parameter, None
    source = parameter
    while isinstance(source, ChainedSource):
        if isinstance(source, AttrSource) and source.member == "_parameters":
            owner = source.base
        if isinstance(source, AttrSource) and source.member in ("_parameters", "_modules"):
            outermost = source.base
        source = source.base
    return {owner, outermost or owner}
