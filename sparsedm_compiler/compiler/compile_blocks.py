"""A rewritten graph -> what runs it: the inner compiler, for repeated blocks once if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..config import CompileConfig
from ..passes import BlockGroup, find_repeated_blocks, outline_blocks
from .inner_backend import compile_graph, is_inductor
from .phase_clock import PhaseClock
from .split_graph import compile_split


def compile_blocks(
    gm: fx.GraphModule, inputs: Sequence[Any], config: CompileConfig, clock: PhaseClock
) -> Callable[..., Any]:
    """Compiles a rewritten graph as the options say.

    With ``regional=True`` the sub-graph of repeated blocks is part of one graph in mode "infer",
    and in mode "train" the graph is cut at its blocks.

    Args:
        gm: The graph; edited in place.
        inputs: What it will be called with.
        config: The user's options.
        clock: Told how long it took, and which blocks were compiled once.
    """
    backend, folded = config.backend, config.mode == "infer"
    with clock.measure("compile"):
        groups: tuple[BlockGroup, ...] = ()
        if config.regional and is_inductor(backend):
            groups = find_repeated_blocks(gm)
        run: Callable[..., Any] | None = None
        if folded:
            outline_blocks(gm, groups)
        elif groups:
            run = compile_split(gm, groups, backend)
            groups = () if run is None else groups
        if run is None:
            run = compile_graph(gm, inputs, backend, folded=folded)
    clock.regions.update(dict.fromkeys(_describe_regions(groups, config)))
    return run


def _describe_regions(groups: Sequence[BlockGroup], config: CompileConfig) -> tuple[str, ...]:
    """Returns the repeated blocks as ``explain`` shows them, or why there are none."""
    if not config.regional:
        return ()
    if not is_inductor(config.backend):
        return ("regional=True changes nothing: it is for Inductor alone",)
    if not groups:
        return ("regional=True changes nothing: no repeated module can be compiled alone",)
    return tuple(f"compiled once: {len(group)} times {group[0].module}" for group in groups)
