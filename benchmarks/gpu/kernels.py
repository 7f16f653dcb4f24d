"""Compiling ahead, in several processes while the tests run: what is then found on disk.

Nothing is timed here. Kernels are compiled by one call each, dense models by Inductor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch

from sparsedm_compiler import PatternError
from sparsedm_compiler.backends.registry import find_families
from sparsedm_compiler.patterns import Pattern

from .case import Case, Row, Tell
from .comparing import bind_call, dense
from .models import open_model
from .ops import DTYPE, calls, draw_operands
from .plan import Layer, Plan
from .training import compile_steps

AHEAD = 4
"""Models compiled ahead: the first of the plan, as few more are timed in the time there is."""


def cases(plan: Plan, avoid: frozenset[str]) -> Iterator[Case]:
    """In the order in which they are needed."""
    for name, batch in plan.models[:AHEAD] if plan.compiled else ():
        yield Case(f"{name} {batch}", partial(compile_dense, plan, name, batch))
    acts = sorted({layer.act for layer in plan.layers})
    for text in plan.op_patterns:
        for act in acts:
            yield Case(f"{text} {act}", partial(build_kernels, plan, text, act))
    for which in plan.training[:1] if plan.compiled else ():
        for pattern in (None, *plan.train_patterns):
            yield Case(f"training {pattern}", partial(compile_step, plan, which, pattern))


def compile_dense(plan: Plan, name: str, batch: int, tell: Tell) -> Iterator[Row]:
    """A dense model, compiled."""
    with torch.no_grad():
        model, call = open_model(name, batch, plan.device, DTYPE)
        bind_call(dense(model, plan), call)()
    yield {}


def compile_step(plan: Plan, which: tuple[str, int], text: str | None, tell: Tell) -> Iterator[Row]:
    """The training steps of a pattern, compiled; text: None for the dense model's."""
    with suppress(PatternError):
        compile_steps(plan, which, text)
    yield {}


def build_kernels(plan: Plan, text: str, act: str, tell: Tell) -> Iterator[Row]:
    """All kernels for a pattern and an activation, compiled."""
    with suppress(PatternError):
        pattern = Pattern.parse(text)
        operands = draw_operands(Layer("any", "any", 256, 256, act), 512, plan.device)
        for family in find_families(operands.x.device.type):
            if not (family.why_unavailable() or family.why_refused(pattern, 256, 256, DTYPE)):
                for _, run in calls(operands, pattern, family):
                    with suppress(Exception):  # Triton's of too little shared memory, too
                        run()
    yield {}
