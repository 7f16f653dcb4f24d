"""Captured graph -> what runs it: plan every pruned weight, rewrite, fold, compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..autotune.measure import AutotuneBudget
from ..autotune.select_kernel import (
    prepare_training,
    select_kernel,
    select_training_kernel,
)
from ..backends.kernel_family import WeightFormat
from ..backends.packing import PackedWeight
from ..config import CompileConfig
from ..errors import MaskError
from ..graph.capture import CapturedGraph
from ..graph.flat_graph import get_example_value
from ..graph.names import strip_adapter_prefix
from ..passes import Plan, PlannedWeight, Refusal, Status, find_uses, run_passes
from ..reports import Decision
from ..triton_support import on_device_of
from .compile_blocks import compile_blocks
from .folded_graph import FoldedGraph
from .folded_weights import FoldedWeights
from .frozen_masks import FrozenMasks
from .phase_clock import PhaseClock


def lower(
    graph: CapturedGraph,
    inputs: Sequence[Any],
    plan: Plan,
    config: CompileConfig,
    weights: FoldedWeights,
    clock: PhaseClock,
) -> tuple[Callable[..., Any], Plan]:
    """Rewrites a captured graph as planned and compiles it.

    Args:
        graph: The captured graph; edited in place.
        inputs: Its example inputs, the weights among them.
        plan: One row for every pruned weight, from ``plan_weights``.
        config: The user's options.
        weights: The model's folded weights; not touched in mode "train".
        clock: Told how long folding and compiling took.

    Returns:
        (a callable that takes the inputs of the graph, the plan with the sizes of folded weights).

    Raises:
        GraphError: If a rewritten graph reads a weight in another way than planned.
    """
    run_passes(graph.gm, plan, config.mode)
    if config.mode == "train":
        return _compile_masked(graph.gm, inputs, plan, config, clock), plan
    with (
        torch.no_grad(),
        clock.measure("pack"),
    ):  # whether a gradient is required is for the call to see
        plan, forms = weights.fold(plan, inputs, finalize=config.finalize)
    arguments = list(inputs)
    for row, form in zip(plan, forms, strict=True):
        if row.kernel is not None:
            arguments[row.position] = form
            _set_example_value(row.placeholder, form)
    run = compile_blocks(graph.gm, arguments, config, clock)
    return FoldedGraph(run, plan, weights) if plan else run, plan


def _compile_masked(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    plan: Plan,
    config: CompileConfig,
    clock: PhaseClock,
) -> Callable[..., Any]:
    """Compiles a graph of mode "train"; frozen and held masks, then layouts, come last."""
    masks = [row.frozen for row in plan if row.frozen is not None]
    masks += [row.held for row in plan if row.held is not None]
    masks += [row.layout for row in plan if row.layout is not None]
    run = compile_blocks(gm, [*inputs, *masks], config, clock)
    return (lambda *arguments: run(*arguments, *masks)) if masks else run


def plan_weights(
    graph: CapturedGraph,
    inputs: Sequence[Any],
    decisions: Mapping[str, Decision],
    config: CompileConfig,
    weights: FoldedWeights,
    budget: AutotuneBudget,
    frozen: FrozenMasks | None = None,
) -> tuple[PlannedWeight, ...]:
    """Plans what runs every pruned weight of a graph.

    Args:
        graph: The captured graph; not edited.
        inputs: Its example inputs, the weights among them.
        decisions: By weight name.
        config: The user's options.
        weights: The model's folded weights: of a finalized one only its packed form can run.
        budget: The seconds left to measure kernels; used in mode "infer" alone.
        frozen: Masks that are not computed anew; used in mode "train" alone.

    Returns:
        One row for every placeholder that is a pruned weight, in order.

    Raises:
        MaskError: If a weight to be masked holds NaN or Inf.
    """
    rows = []
    for position, node in enumerate(graph.gm.graph.find_nodes(op="placeholder")):
        names = graph.names.get(node)
        name = "" if names is None else strip_adapter_prefix(names[0])
        decision = decisions.get(name)
        if names is None or decision is None or decision.pattern is None:
            continue
        weight, pattern = inputs[position], decision.pattern
        packed = weights.find_finalized(weight, name)
        if packed is None:
            _require_finite(weight, names[0])
        shape, uses = tuple(weight.shape), find_uses(node)
        row = PlannedWeight(node, position, name, pattern, shape, uses, WeightFormat(pattern))
        with _on_device_of(weight):
            if config.mode == "train":
                pattern.prepare(weight.device)
                if frozen is not None:
                    row = frozen.plan(row, weight.device)
                row = select_training_kernel(row, get_example_value(node), config)
            elif packed is not None:
                row = _plan_finalized(row, packed)
            else:
                row = select_kernel(row, weight, config, budget)
        rows.append(row)
    if config.mode == "train":
        prepare_training(rows)
    return tuple(rows)


def _on_device_of(weight: Any) -> AbstractContextManager[None]:
    """Returns a context in which the card of a weight is the one that families ask about."""
    is_there = isinstance(weight, Tensor) and not isinstance(weight, FakeTensor)
    return on_device_of(weight) if is_there and weight.is_cuda else nullcontext()


def _plan_finalized(row: PlannedWeight, packed: PackedWeight) -> PlannedWeight:
    """Plans a weight of which only the packed form is left."""
    if isinstance(row.uses, Refusal):
        return row.run_dense(f"unpacked: {row.uses.sentence}")
    if {problem.dtype for problem in row.problems} != {packed.dtype}:
        return row.run_dense("unpacked: finalized in another dtype than it runs in here")
    return row.run_sparse(
        packed.kernel, packed.weight_format, status=Status.FINALIZED, reason="finalized"
    )


def _require_finite(weight: Any, name: str) -> None:
    """Raises MaskError if a weight to be masked holds NaN or Inf: its magnitudes mean nothing."""
    if not isinstance(weight, Tensor) or weight.is_meta or isinstance(weight, FakeTensor):
        return
    if not bool(weight.detach().isfinite().all()):
        raise MaskError(
            f"parameter {name!r} holds NaN or Inf, so its mask would be "
            "arbitrary; load a checkpoint with finite weights"
        )


def _set_example_value(placeholder: fx.Node, value: Tensor) -> None:
    """Gives the placeholder the metadata of what will be passed in the place of the weight."""
    before = get_example_value(placeholder)
    if isinstance(before, FakeTensor):
        fake = before.fake_mode.from_tensor(value, static_shapes=True)
        placeholder.meta["example_value"] = fake
