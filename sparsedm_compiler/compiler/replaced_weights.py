"""Pruned weights whose place something dense has taken since the model was compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..errors import DenseRunError
from ..graph.capture import CapturedGraph, Names
from ..graph.flat_graph import get_example_value
from ..graph.names import strip_adapter_prefix
from ..reports import Decision


def require_present_weights(module: nn.Module, decisions: Mapping[str, Decision]) -> None:
    """Raises DenseRunError if a pruned weight has left the model."""
    present = _list_shapes(module)
    for weight, decision in decisions.items():
        if decision.accepted and weight not in present:
            raise DenseRunError(
                f"{weight!r} was pruned and has left the model: its layer was replaced "
                "(quantized, fused) after compile(). Change the layers first, then compile"
            )


def require_read_weights(
    graph: CapturedGraph,
    module: nn.Module,
    is_pruned: Callable[[Names, tuple[int, ...]], bool],
    known: frozenset[str],
) -> None:
    """Raises DenseRunError if a new parameter is read where a pruned weight was.

    Args:
        graph: A graph that holds a whole call of the module.
        module: The module.
        is_pruned: Whether a weight of these names and this shape is pruned where it is multiplied.
        known: The parameters that the module had when it was compiled.
    """
    shapes = _list_shapes(module)
    read = {strip_adapter_prefix(name) for names in graph.names.values() for name in names}
    for added in sorted(read - known):
        for weight in sorted(known & shapes.keys() - read):
            if _could_hold(added, shapes[added], weight, shapes[weight]) and is_pruned(
                (weight,), shapes[weight]
            ):
                raise DenseRunError(
                    f"{weight!r} is pruned, and {added!r}, which was added after compile(), runs "
                    "in its place. Fuse or replace layers first, then compile"
                )


def require_decisions(
    graph: CapturedGraph,
    module: nn.Module,
    decisions: Mapping[str, Decision],
    is_pruned: Callable[[Names, tuple[int, ...]], bool],
) -> None:
    """Raises DenseRunError if an adapter multiplies by what it makes of a weight, undecided on.

    Args:
        graph: A graph of the module.
        module: The module.
        decisions: The decisions by weight name, those on this graph among them.
        is_pruned: As in ``require_read_weights``.
    """
    for node, names in graph.names.items():
        weight = strip_adapter_prefix(names[0])
        if weight in names or weight in decisions or not node.users:
            continue
        owner = module.get_submodule(names[0].rpartition(".")[0])
        multiplies = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd))
        if multiplies and is_pruned((weight,), tuple(get_example_value(node).shape)):
            raise DenseRunError(
                f"{weight!r} would run dense: the adapter around it multiplies by a weight that it "
                "computes of it (HRA does). Call the model once before you add the adapter"
            )


def _list_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters, by the names that decisions use."""
    return {
        strip_adapter_prefix(name): tuple(parameter.shape)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _could_hold(
    added: str, added_shape: tuple[int, ...], weight: str, shape: tuple[int, ...]
) -> bool:
    """Returns whether a new parameter lies beside a weight and is large enough for a fused one."""
    layers = added.rpartition(".")[0], weight.rpartition(".")[0]
    beside = layers[0].rpartition(".")[0] == layers[1].rpartition(".")[0]
    return beside and added_shape[1:] == shape[1:] and added_shape[0] >= shape[0]
