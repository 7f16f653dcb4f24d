"""A masked training step over a dense one: bf16 autocast, Inductor, AdamW.

"mask" is the student alone, "sr-ste" has the decayed pruned weights, too: the same compiled student
with an optimizer each, as what a step costs does not depend on what the weights are. "sparse" is
the student whose products are sparse in training, too, where its kernels run the pattern. Of block
patterns there is "frozen" alone: masks that do not change any more, and kernels that skip pruned
blocks in all three products of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import sparsedm_compiler as sdm
from benchmarks.train_step import build_step

from .case import Case, Row, Tell
from .comparing import attempt, compute_medians, compute_speedup, sample_models
from .models import ENTRIES, Call, open_model, per_model
from .plan import Plan
from .pruned import kernels_of

SPARSE = ("2:4", "2:4t")
"""Patterns whose products can be sparse in training."""


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One per model and batch."""
    return per_model(plan.training, partial(compare, plan=plan, avoid=avoid))


def compare(
    which: tuple[str, int], tell: Tell, *, plan: Plan, avoid: frozenset[str]
) -> Iterator[Row]:
    """The row of one model, with one more pattern each time."""
    torch.compiler.reset()
    name, batch = which
    entry = ENTRIES[name]
    row: Row = {"model": entry.title, "batch": batch, "dtype": "bfloat16 autocast", "patterns": {}}
    model, call = open_model(name, batch, plan.device, torch.float32)
    compiled = torch.compile(model, backend=backend(plan))
    dense = build_step(compiled, call, sr_ste=False, autocast=True)
    for text in plan.train_patterns:
        crumb = f"{name} batch {batch} at {text}"
        if crumb in avoid or not known(text):
            why = "the process died of it" if crumb in avoid else "not a pattern of this version"
            row["patterns"][text] = {"refused": why}
            continue
        tell(crumb)
        build = partial(build_steps, model, call, plan, text, policy=entry.policy)
        cell = row["patterns"][text] = attempt(partial(time_steps, dense, build, plan.seconds))
        middle = {kind: round(steps[1], 3) for kind, steps in cell.get("step", {}).items()}
        print(f"training: {entry.title}, {text}, times the dense step: {middle}", flush=True)
        yield row


def time_steps(
    dense: Callable[[], None],
    build: Callable[[], tuple[dict[str, Callable[[], None]], nn.Module]],
    seconds: float,
) -> dict[str, Any]:
    """What a pattern's steps cost beside the dense model's."""
    steps, student = build()
    times = sample_models({"dense": dense, **steps}, seconds)
    masked = sum(weight.numel() for weight, _ in sdm.masked_parameters(student).values())
    return {
        "masked_share": masked / sum(weight.numel() for weight in student.parameters()),
        "ms": compute_medians(times),
        # the other way round than everywhere else: a step over the dense step
        "step": {kind: compute_speedup(times, "dense", kind) for kind in steps},
        "sparse_kernels": kernels_of(student),
    }


def build_steps(
    model: nn.Module, call: Call, plan: Plan, text: str, *, policy: str
) -> tuple[dict[str, Callable[[], None]], nn.Module]:
    """The steps of a pattern by kind, and the student whose products are sparse, if any are."""
    if "@" in text:
        student = freeze(model, call, plan, text, policy=policy)
        return {"frozen": build_step(student, call, sr_ste=False, autocast=True)}, student
    student = sdm.compile(model, text, backend=backend(plan), policy=policy)
    kinds = {"mask": False, "sr-ste": True}
    steps = {
        kind: build_step(student, call, sr_ste=decay, autocast=True)
        for kind, decay in kinds.items()
    }
    if text in SPARSE:
        student = sdm.compile(
            model, text, backend=backend(plan), policy=policy, kernels={"*": "sparse"}
        )
        steps["sparse"] = build_step(student, call, sr_ste=False, autocast=True)
    return steps, student


def freeze(model: nn.Module, call: Call, plan: Plan, text: str, *, policy: str) -> nn.Module:
    """A student with frozen masks; what they are is found by an uncompiled call."""
    args, kwargs = call
    student = sdm.compile(model, text, backend="eager", policy=policy)
    with torch.no_grad():
        student(*args, **kwargs)
    sdm.freeze_masks(student)
    return sdm.compile(student, backend=backend(plan), kernels={"*": "sparse"}, inplace=True)


def compile_steps(plan: Plan, which: tuple[str, int], text: str | None) -> None:
    """Takes one of each training step that is timed, of the dense model where text is None."""
    name, batch = which
    model, call = open_model(name, batch, plan.device, torch.float32)
    if text is None:
        compiled = torch.compile(model, backend=backend(plan))
        return build_step(compiled, call, sr_ste=False, autocast=True)()
    steps, _ = build_steps(model, call, plan, text, policy=ENTRIES[name].policy)
    for kind in steps.keys() - {"sr-ste"}:  # its student is that of "mask"
        steps[kind]()
    return None


def backend(plan: Plan) -> str:
    """What compiles both."""
    return "inductor" if plan.compiled else "eager"


def known(text: str) -> bool:
    """Whether this version knows a pattern."""
    try:
        sdm.Pattern.parse(text)
    except sdm.PatternError:
        return False
    return True
