"""What a Python function refers to: closures, partials and wrappers."""

from __future__ import annotations

import functools
import types
from contextlib import suppress
from typing import Any


def list_wrapped(function: Any) -> list[Any]:
    """Returns the callables that a wrapper may call."""
    if isinstance(function, types.MethodType):
        return [function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, *function.args]
    if not isinstance(function, types.FunctionType):
        return []
    cells = list_closure(function)
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [value for value in (*cells, *defaults) if callable(value)]


def list_closure(function: types.FunctionType) -> list[Any]:
    """Returns the values that a function refers to by its closure."""
    values = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            values.append(cell.cell_contents)
    return values
