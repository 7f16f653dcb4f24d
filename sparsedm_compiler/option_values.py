"""Checks of options that are numbers, whole or real, or switches: of the right type, in range."""

from __future__ import annotations

import math
import numbers
from typing import Any

from .errors import ConfigError

SEEDS = range(-(2**63), 2**64)
"""The seeds that torch.manual_seed takes."""


def check_whole(name: str, value: Any, *, least: int | None = None, owner: str = "") -> None:
    """Raises ConfigError for a value of option ``name`` that is no whole number >= ``least``.

    None allows negative ones. ``owner`` follows name and value in the message, e.g.
    " of a fine-tune".

    >>> check_whole("steps", 2.5, least=1)
    Traceback (most recent call last):
    sparsedm_compiler.errors.ConfigError: steps 2.5 is not a whole number
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name} {value!r}{owner} is not a whole number")
    if least is not None and value < least:
        raise ConfigError(f"{name} {value}{owner} is not >= {least}")


def check_seed(name: str, value: Any, *, owner: str = "") -> None:
    """Raises ConfigError for a value that is no seed of torch: whole, from -2^63 to 2^64 - 1.

    >>> check_seed("seed", 2**64)
    Traceback (most recent call last):
    sparsedm_compiler.errors.ConfigError: seed 18446744073709551616 is not from -2^63 to 2^64 - 1
    """
    check_whole(name, value, owner=owner)
    if value not in SEEDS:
        raise ConfigError(f"{name} {value}{owner} is not from -2^63 to 2^64 - 1")


def check_real(name: str, value: Any, *, owner: str = "") -> None:
    """Raises ConfigError for a value that is no finite number; a switch is none.

    >>> check_real("lr", "high")
    Traceback (most recent call last):
    sparsedm_compiler.errors.ConfigError: lr 'high' is not a number
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name} {value!r}{owner} is not a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise ConfigError(f"{name} {value}{owner} is not a finite number")


def check_switch(name: str, value: Any, *, owner: str = "") -> None:
    """Raises ConfigError for a value that is neither True nor False.

    >>> check_switch("flip", "no")
    Traceback (most recent call last):
    sparsedm_compiler.errors.ConfigError: flip 'no' is neither true nor false
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {value!r}{owner} is neither true nor false")
