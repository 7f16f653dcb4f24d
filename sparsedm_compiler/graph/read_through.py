"""``op(x, w) -> op(x, target(w, ...))``: one new op between an input and all that reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


def read_through(
    source: fx.Node,
    readers: Sequence[fx.Node],
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    example: Any,
) -> None:
    """Lets readers of a node read one new call instead.

    Args:
        source: The node that they read.
        readers: Those of its users that are to read the call; at least one.
        target: What the call calls.
        arguments: Its arguments, ``source`` among them.
        example: The example value of the call; None gives it none.
    """
    with source.graph.inserting_before(min(readers)):
        call = source.graph.call_function(target, arguments)
    call.meta = {key: source.meta[key] for key in ("stack_trace",) if key in source.meta}
    if example is not None:
        call.meta["example_value"] = example
    for reader in readers:
        reader.replace_input_with(source, call)
