"""Pruned copies of models, and whether they compute what they should."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn

import sparsedm_compiler as sdm
from sparsedm_compiler.config import GRAPHS
from sparsedm_compiler.masks.nm_mask import apply_mask, nm_mask

from .comparing import error, output
from .models import Call, cast
from .plan import Plan

SLACK = 2e-3


def student_of(
    model: nn.Module, pattern: str, plan: Plan, *, policy: str, kernels: str = "auto"
) -> nn.Module:
    """The model for inference, each layer run by what is fastest here, or as pinned."""
    backend = GRAPHS if plan.compiled else "eager"
    pinned = {} if kernels == "auto" else {"*": kernels}
    return sdm.compile(model, pattern, mode="infer", policy=policy, backend=backend, kernels=pinned)


def check_student(model: nn.Module, student: nn.Module, call: Call) -> dict[str, Any]:
    """How far the student is from the masked model in float32, and how far plain torch is.

    ``wrong``: whether it is more than twice as far as the same masked weights run dense in the
    model's dtype. The first call of the student, which compiles it, is in here.
    """
    out = output(student, call).clone()
    plain = make_masked(model, student)
    rounded = output(plain, call)
    exact = output(plain.float(), cast(call, torch.float32))
    off, usual = error(out, exact), error(rounded, exact)
    return {"error": off, "dense_error": usual, "wrong": not off <= 2 * usual + SLACK}


def make_masked(model: nn.Module, student: nn.Module) -> nn.Module:
    """A copy of the model with the student's masks in its weights."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, (_, pattern) in sdm.masked_parameters(student).items():
            weight = plain.get_parameter(name)
            weight.copy_(apply_mask(weight, nm_mask(weight, pattern)))
    return plain


def kernels_of(student: nn.Module) -> dict[str, int]:
    """How many of its pruned weights each kernel runs."""
    kernels = {choice.weight: choice.kernel for choice in sdm.explain(student).choices}
    return dict(Counter(kernels.values()))


def reasons_of(student: nn.Module) -> dict[str, int]:
    """Why pruned weights run dense, and how many for each reason."""
    choices = sdm.explain(student).choices
    return dict(Counter(choice.reason for choice in choices if choice.kernel == "dense"))
