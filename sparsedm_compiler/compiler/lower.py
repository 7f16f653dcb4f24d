"""Graph -> a callable: kernels for folded weights, and the inner compiler for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._subclasses.fake_tensor import FakeTensor

from ..autotune.measure import AutotuneBudget
from ..autotune.select_kernel import Chosen, select_kernel, select_training_kernel
from ..backends.cpu.build import find_compiler
from ..backends.kernel_family import WeightFormat
from ..backends.registry import find_family
from ..config import GRAPHS, Backend, CompileConfig
from ..errors import ConfigError
from ..graph.flat_graph import get_example_value
from ..masks.mask_ste import mask_ste_op
from ..passes import carry_features, find_uses, lower_sparse, pad_tokens, train_sparse
from ..passes.analysis.find_uses import WeightUse
from ..passes.rewrite.lower_sparse import Rewrite
from ..patterns import Pattern, TransposableNM
from ..reports import Choice
from .folded_weights import FoldedGraph, FoldedWeights, PackedWeight

Run = Callable[..., Any]

FINALIZED = "finalized"
"""The reason for the kernel of a weight that was finalized in an earlier graph."""


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend) -> Run:
    """The graph as the inner compiler runs it."""
    compile_graph: Any = backend
    if isinstance(backend, str) and resolve_backend(backend) == GRAPHS:
        from torch._inductor.compile_fx import compile_fx

        compile_graph = partial(compile_fx, config_patches={"triton.cudagraphs": True})
    elif isinstance(backend, str):
        compile_graph = lookup_backend(resolve_backend(backend))
    run: Run = compile_graph(gm, list(example_inputs))
    return run


def resolve_backend(backend: str) -> str:
    """The torch.compile backend that ``backend`` names, or GRAPHS; "auto" depends on the machine.

    Raises ConfigError for a name that torch does not know.
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


def multiply_sparse(
    gm: fx.GraphModule, weights: Mapping[fx.Node, tuple[str, Pattern]], config: CompileConfig
) -> tuple[Choice, ...]:
    """Let masked weights be multiplied sparse in training where ``kernels`` asks for it.

    ``weights``: placeholder -> (name, pattern). Returns what became of those that it asks for.
    """
    choices, rewrites = [], []
    for masked in gm.graph.find_nodes(op="call_function", target=mask_ste_op):
        name, pattern = weights[masked.args[0]]
        uses = find_uses(masked)
        choice = select_training_kernel(
            get_example_value(masked.args[0]), name, pattern, uses, config
        )
        if choice is not None:
            choices.append(choice)
            if choice.kernel != "dense" and not isinstance(uses, str):
                rewrites += [(use, isinstance(pattern, TransposableNM)) for use in uses]
    if train_sparse(gm, rewrites):
        gm.recompile()
    return tuple(choices)


class Folding:
    """What all graphs of one model share: its folded weights, and the seconds left to measure."""

    def __init__(
        self, config: CompileConfig, packed: Mapping[str, PackedWeight] | None = None
    ) -> None:
        self.folds = FoldedWeights(packed)
        self.search = AutotuneBudget(config.autotune_seconds)
        self.pending: list[tuple[Tensor, Chosen]] = []

    def finalize(self) -> None:
        """Keep only the folded form of the weights folded since. Not while a graph is compiled:
        Dynamo guards on the strides, so the next call compiles once more."""
        for weight, found in self.pending:
            choice = found.choice
            self.folds.finalize(weight, found.form, choice.weight, found.kernel)
        self.pending.clear()


def fold(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    weights: Mapping[fx.Node, tuple[str, Pattern]],
    config: CompileConfig,
    folding: Folding,
) -> tuple[Run, tuple[Choice, ...]]:
    """The graph with its pruned weights folded, each run by the kernel chosen for it.

    ``weights``: placeholder -> (name, pattern). The graph takes the same inputs as before.
    """
    inputs, chosen = list(example_inputs), dict[int, Chosen]()
    rewrites: list[Rewrite] = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node in weights:
            name, pattern = weights[node]
            uses = find_uses(node)
            packed = folding.folds.finalized(inputs[place], name)
            if packed is not None:
                found = _left(packed, name, pattern, uses)
            else:
                found = select_kernel(inputs[place], name, pattern, uses, config, folding.search)
            chosen[place] = found
            if found.kernel is not None and not isinstance(uses, str):
                rows = inputs[place].shape[0]
                rewrites += [Rewrite(use, node, rows, found.form, found.kernel) for use in uses]
    if lower_sparse(gm, rewrites):
        carry_features(gm)
        pad_tokens(gm)
        gm.recompile()
    choices = []
    with torch.no_grad():  # whether a gradient is asked for is for the call to see
        for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            if place in chosen:
                weight, found = inputs[place], chosen[place]
                folded = _run_form(weight, found, config, folding)
                sizes = {"dense_bytes": weight.nbytes, "run_bytes": folded.nbytes}
                choices.append(replace(found.choice, **sizes))
                if found.kernel is not None:
                    inputs[place] = folded
                    _stands_for(node, folded)
    run = lower(gm, inputs, config.backend)
    forms = {place: found.form for place, found in chosen.items()}
    names = {place: found.choice.weight for place, found in chosen.items()}
    return FoldedGraph(run, folding.folds, forms, names), tuple(choices)


def _left(
    packed: PackedWeight, name: str, pattern: Pattern, uses: tuple[WeightUse, ...] | str
) -> Chosen:
    """What runs a weight of which only the packed form is left."""
    if isinstance(uses, str) or {use.work.dtype for use in uses} != {packed.dtype}:
        why = uses if isinstance(uses, str) else "finalized in another dtype than it runs in here"
        return Chosen(Choice(name, (), "dense", f"unpacked: {why}"), WeightFormat(pattern))
    inputs = tuple(use.work.inputs for use in uses)
    return Chosen(Choice(name, inputs, packed.kernel.name, FINALIZED), packed.form, packed.kernel)


def _run_form(weight: Tensor, found: Chosen, config: CompileConfig, folding: Folding) -> Tensor:
    """What runs in the place of the weight; noted, if asked, to be finalized."""
    if isinstance(weight, FakeTensor):
        return weight
    name, folds = found.choice.weight, folding.folds
    folded = folds.get(weight, found.form, name)
    exact = found.kernel is None or not find_family(found.kernel.name).inexact
    exact = exact and found.form.dtype is None
    if config.finalize and exact and folds.finalized(weight, name) is None:
        folding.pending.append((weight, found))
    return folded


def _stands_for(placeholder: fx.Node, value: Tensor) -> None:
    """Give the placeholder the metadata of what will be passed in the place of the weight."""
    was = get_example_value(placeholder)
    if isinstance(was, FakeTensor):
        fake = was.fake_mode.from_tensor(value, static_shapes=True)
        placeholder.meta["example_value"] = fake
