"""The sections, in the order of their worth, with their shares of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import block, first_calls, kernels, memory, ops, training, whole
from .case import Case

CASES: dict[str, Callable[[Any, frozenset[str]], Iterable[Case]]] = {
    "ops": ops.cases,
    "models": whole.cases,
    "table": block.cases,
    "training": training.cases,
    "memory": memory.cases,
    "first_call": first_calls.cases,
    "warm": kernels.cases,
}
