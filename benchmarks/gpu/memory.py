"""Bytes: of the folded weights, of a whole model at rest, and at the peak of one call.

Every layer that a sparse kernel takes is pinned to it and finalized, so that this shows what the
format saves, not what the gate chose. Eager, without CUDA graphs, whose pools would hide the rest.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import sparsedm_compiler as sdm

from .case import Case, Row, Tell
from .comparing import attempt
from .models import ENTRIES, Call, open_model, per_model
from .plan import Plan
from .pruned import kernels_of


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """One per model and batch."""
    return per_model(plan.memory, partial(compare, plan=plan, avoid=avoid))


def compare(
    which: tuple[str, int], tell: Tell, *, plan: Plan, avoid: frozenset[str]
) -> Iterator[Row]:
    """The row of one model, with one more pattern each time."""
    torch.compiler.reset()
    name, batch = which
    entry = ENTRIES[name]
    row: Row = {"model": entry.title, "batch": batch, "dtype": "bfloat16", "patterns": {}}
    with torch.no_grad():
        model, call = open_model(name, batch, "cpu", torch.bfloat16)
        row["dense"] = bytes_of(copy.deepcopy(model), call, plan.device)
        for text in plan.model_patterns:
            crumb = f"{name} batch {batch} at {text}"
            if crumb in avoid:
                row["patterns"][text] = {"died": True}
                continue
            tell(crumb)
            sizes = attempt(partial(bytes_of_student, model, call, plan, text, entry.policy))
            row["patterns"][text] = sizes
            print(f"memory: {entry.title}, {text}: {sizes}", flush=True)
            yield row


def bytes_of_student(
    model: nn.Module, call: Call, plan: Plan, text: str, policy: str
) -> dict[str, Any]:
    """The bytes of a student and of its folded weights."""
    student = sdm.compile(
        copy.deepcopy(model).to(plan.device),
        text,
        mode="infer",
        policy=policy,
        backend="eager",
        kernels={"*": "sparse"},
        finalize=True,
        inplace=True,
    )
    sizes = bytes_of(student, call, plan.device)
    choices = {choice.weight: choice for choice in sdm.explain(student).choices}
    sizes["folded"] = sum(choice.run_bytes for choice in choices.values())
    sizes["folded_dense"] = sum(choice.dense_bytes for choice in choices.values())
    sizes["kernels"] = kernels_of(student)
    return sizes


def bytes_of(model: nn.Module, call: Call, device: str) -> dict[str, Any]:
    """{"resting", "peak"}: of the GPU's memory, the model on it; None on a CPU."""
    model = model.to(device)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, call
    )
    for _ in range(3):  # the first folds, the second captures once more
        model(*args, **kwargs)
    if device != "cuda":
        return {"resting": None, "peak": None}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    model(*args, **kwargs)
    torch.cuda.synchronize()
    return {"resting": resting, "peak": torch.cuda.max_memory_allocated()}
