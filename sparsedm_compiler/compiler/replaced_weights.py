"""Pruned weights whose place something dense has taken since the model was compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..errors import DenseRunError
from ..graph.capture import CapturedGraph, Names, map_parameter_names
from ..graph.eager_watch import Reference, refer_to
from ..graph.flat_graph import get_example_value
from ..graph.names import strip_adapter_prefix
from ..reports import Decision


class OriginalWeights:
    """The parameters that a model had when it was compiled, which keep their names."""

    def __init__(self, module: nn.Module, known: frozenset[str]) -> None:
        self._known = known
        self._objects: list[tuple[Reference, frozenset[str]]] = []
        names = map_parameter_names(module)
        for parameter in module.parameters():
            stripped = frozenset(map(strip_adapter_prefix, names[id(parameter)]))
            self._objects.append((refer_to(parameter), stripped & known))

    def require_in_place(
        self,
        module: nn.Module,
        decisions: Mapping[str, Decision],
        is_pruned: Callable[[Names, tuple[int, ...]], bool],
    ) -> None:
        """Raises DenseRunError if a weight to be pruned has left the model, or has another name.

        Args:
            module: The model.
            decisions: The decisions by weight name.
            is_pruned: Whether a weight of these names and this shape is pruned where it is
                multiplied.
        """
        shapes = _list_shapes(module)
        self._require_names(module, shapes, is_pruned)
        for weight, decision in decisions.items():
            if decision.accepted and weight not in shapes:
                raise DenseRunError(
                    f"{weight!r} was pruned and has left the model: its layer was replaced "
                    "(quantized, fused) after compile(). Change the layers first, then compile"
                )

    def _require_names(
        self,
        module: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        is_pruned: Callable[[Names, tuple[int, ...]], bool],
    ) -> None:
        names_now = map_parameter_names(module)
        for reference, names in self._objects:
            parameter = reference()
            if parameter is None or not names or not names.isdisjoint(shapes):
                continue
            now = names_now.get(id(parameter))
            if now is not None and is_pruned(tuple(sorted(names)), tuple(parameter.shape)):
                raise _explain_wrapped(min(names), now[0])
        added = shapes.keys() - self._known
        for name in sorted(self._known - shapes.keys()) if added else ():
            layer, _, leaf = name.rpartition(".")
            inside = f"{layer}." if layer else "parametrizations."
            for other in sorted(added):
                stands_in = other.startswith(inside) and leaf in other[len(inside) :]
                if stands_in and is_pruned((name,), shapes[other]):
                    raise _explain_wrapped(name, other)


def _explain_wrapped(name: str, now: str) -> DenseRunError:
    return DenseRunError(
        f"{name!r} is to be pruned, and would run dense as {now!r}: its layer was wrapped or "
        "replaced after compile(). Do that first, then compile (with keep_dense for what the "
        "wrapper adds)"
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
